"""Numbers and words as a report writes them; what is missing, null or not finite reads as None or ''."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from chinese_llama.terminal import columns

ARROW = "→"
HUGE = 1e12  # numbers from here on are written with powers of ten
BREAKS = re.compile("\r\n|[\r\x85\u2028\u2029]")
UNREADABLE = re.compile(
    "[\x80-\x9f\ud800-\udfff\ufdd0-\ufdef"
    + "".join(chr(plane * 0x10000 + low) for plane in range(17) for low in (0xFFFE, 0xFFFF))
    + "]"
)
# Control characters, and marks that would turn the direction of what stands around the text.
UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069]")
HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
KANA, HANGUL = re.compile("[\u3041-\u30ff]"), re.compile("[\uac00-\ud7a3\u1100-\u11ff]")


@dataclass(frozen=True)
class Measure:
    """A figure and, where one was computed, its 95 % interval."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def half(self) -> float | None:
        """Half the width of the interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    @property
    def span(self) -> list[float]:
        return [value for value in (self.value, self.low, self.high) if value is not None]


def number(value: Any) -> float | None:
    """A number, None if it is none or not finite; as none or as 0 counts what no measure yields and products of
    which may leave the floats."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e100:
        return None
    return float(value) if abs(value) > 1e-100 else 0.0


def mapping(value: Any) -> dict[str, Any]:
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}


def items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def records(value: Any) -> list[dict[str, Any]]:
    return [mapping(item) for item in items(value) if isinstance(item, dict)]


def measure(value: Any, interval: Any = None) -> Measure | None:
    """A figure with its interval [low, high]; None where there is no figure."""
    found, ends = number(value), [number(end) for end in items(interval)]
    if found is None:
        return None
    if len(ends) != 2 or ends[0] is None or ends[1] is None or ends[0] > ends[1]:
        return Measure(found)
    return Measure(found, ends[0], ends[1])


def clean(value: Any) -> str:
    """Text that any of the three forms can hold: line ends as \\n, control characters and marks that turn the
    direction of writing by their numbers ([U+001B]), what is no character as �."""
    text = "" if value is None else value if isinstance(value, str) else str(value)
    text = UNREADABLE.sub("\ufffd", BREAKS.sub("\n", text))
    return UNSEEN.sub(lambda found: f"[U+{ord(found[0]):04X}]", text)


def one_line(value: Any) -> str:
    return " ".join(clean(value).split())


def language(text: str) -> str:
    """'zh-Hans', 'ja' or 'ko' for text with such characters, which share code points but not glyphs; else ''."""
    if HANGUL.search(text):
        return "ko"
    if KANA.search(text):
        return "ja"
    return "zh-Hans" if HAN.search(text) else ""


def cut(text: str, width: int) -> str:
    """`text` in at most `width` columns, with an ellipsis where it was longer."""
    return shortened(text, width, 1, columns)


def shortened(text: str, most: float, ellipsis: float, size: Callable[[str], float]) -> str:
    """`text` if its characters' sizes sum to at most `most`, else what of it leaves room for an ellipsis."""
    spent = list(accumulate(size(character) for character in text[: int(most) * 8 + 8]))
    if len(spent) == len(text) and (not spent or spent[-1] <= most):
        return text
    return text[: sum(end <= most - ellipsis for end in spent)].rstrip() + "…"


def decimals(measures: Iterable[Measure | None]) -> int:
    """2 or 3: what the narrowest interval supports, else 3 for figures below 5."""
    found = [one for one in measures if one is not None]
    halves = [one.half for one in found if one.half]
    if halves:
        return min(3, max(2, 1 - math.floor(math.log10(min(halves)))))
    return 3 if found and max(abs(one.value) for one in found) < 5 else 2


def fixed(value: float | None, places: int = 2) -> str:
    """'1,234.50' with a true minus sign; '' for None."""
    if value is None:
        return ""
    if abs(value) >= HUGE:
        return brief(value)
    shown = f"{value:,.{places}f}"
    return (shown if float(shown.replace(",", "")) else shown.lstrip("-")).replace("-", "−")


def ends(one: Measure | None, places: int) -> str:
    """'[8.31, 8.62]', '' where there is no interval."""
    return f"[{fixed(one.low, places)}, {fixed(one.high, places)}]" if one and one.half is not None else ""


def share(value: float | None, places: int = 0) -> str:
    """'83 %'."""
    return f"{fixed(100 * value, places)} %" if value is not None else ""


def shares(one: Measure | None, places: int = 0) -> str:
    """'83 % [76, 89]'."""
    if one is None:
        return ""
    return f"{share(one.value, places)} {share_ends(one, places)}".strip()


def share_ends(one: Measure, places: int = 0) -> str:
    """'[76, 89]', in per cent."""
    return (
        ends(Measure(100 * one.value, 100 * one.low, 100 * one.high), places)
        if one.low is not None and one.high is not None
        else ""
    )


def change(value: float | None, places: int = 1) -> str:
    """'+1.4 %', '−54.5 %', '0.0 %'."""
    shown = share(value, places)
    return f"+{shown}" if value is not None and value > 0 and re.search("[1-9]", shown) else shown


def changes(one: Measure | None) -> tuple[str, str]:
    """('+1.4 %', '[+0.9, +1.9]'), the second '' without an interval."""
    if one is None:
        return "", ""
    places = 2 if one.half and one.half < 0.001 else 1
    between = [change(end, places).removesuffix(" %") for end in (one.low, one.high)]
    return change(one.value, places), f"[{', '.join(between)}]" if one.half is not None else ""


def count(value: Any) -> str:
    """'49,920'; '' for what is no number."""
    found = number(value)
    return fixed(found, 0)


def brief(value: float) -> str:
    """A number on an axis: '0.5', '12', '1.5k', '20M', '1e+15'."""
    if abs(value) >= HUGE:
        return f"{value:.3g}".replace("-", "−")
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def duration(value: Any) -> str:
    """'2 h 14 min', '5 min 12 s', '8 s'."""
    found = number(value)
    if found is None or found < 0:
        return ""
    minutes, seconds = divmod(round(found), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
