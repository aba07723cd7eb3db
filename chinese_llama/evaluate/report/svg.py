"""The small code that draws: scales, ticks, text, marks. A drawing is WIDTH units wide, about the width of a
phone, so that its text is as large there as it was set; colours are the page's CSS variables."""

from __future__ import annotations

import html
import math
import unicodedata
from dataclasses import dataclass

from chinese_llama.evaluate.report.values import brief, language, shortened

WIDTH = 360.0
LETTER = 12.0  # size of text; page.html sets the same


@dataclass(frozen=True)
class Scale:
    """Data from `low` to `high` onto `start` to `end` units."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


AIR = 0.06  # of the range, beyond the values


def domain(values: list[float], zero: bool = False, near: float = 0.6) -> tuple[float, float]:
    """The range that an axis shows: all values and some air, from 0 where asked for or where the least value
    is less than `near` of the largest."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    if size < 1e-9:
        return (0.0, 1.0) if low >= 0 else (-1.0, 1.0)
    if low >= 0 and (zero or low < near * high):
        return 0.0, high * (1 + AIR)
    air = (high - low) * AIR if high - low > 1e-9 * size else 0.05 * size
    return low - air, high + air


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5, 5 times a power of ten) from low to high, at most `most`."""
    rough = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def width(text: str) -> float:
    """About how many units a text takes."""
    size = {"W": 1.0, "F": 1.0}
    return sum(
        0.0
        if unicodedata.combining(c)
        else LETTER * size.get(unicodedata.east_asian_width(c), 0.66 if c.isupper() else 0.54)
        for c in text
    )


def fit(text: str, most: float) -> str:
    """`text` in at most `most` units, with an ellipsis where it was longer."""
    return shortened(text, most, LETTER, width)


def wrap(text: str, most: float) -> list[str]:
    """`text` in one or two lines of at most `most` units, the second cut where it has to be."""
    if width(text) <= most:
        return [text]
    parts = text.split(" ")
    first = max((n for n in range(1, len(parts)) if width(" ".join(parts[:n])) <= most), default=0)
    if not first:
        return [fit(text, most)]
    return [" ".join(parts[:first]), fit(" ".join(parts[first:]), most)]


def attribute(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".") or "0"


def words(x: float, y: float, text: str, kind: str = "", anchor: str = "start", whole: str = "") -> str:
    """A line of text; `whole` is told by a pointer that rests on one that was cut."""
    names = f' class="{kind}"' if kind else ""
    names += f' text-anchor="{anchor}"' if anchor != "start" else ""
    tongue = language(text)
    names += f' lang="{tongue}"' if tongue else ""
    more = f"<title>{html.escape(whole)}</title>" if whole and whole != text else ""
    return f'<text x="{attribute(x)}" y="{attribute(y)}"{names}>{more}{html.escape(text)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    places = zip(("x1", "y1", "x2", "y2"), (x1, y1, x2, y2), strict=True)
    return "<line " + " ".join(f'{name}="{attribute(at)}"' for name, at in places) + f' class="{kind}"/>'


def mark(x: float, y: float, kind: str) -> str:
    """Base: a ring; a stage: a disc; the final one: a larger disc; a control: a diamond. Shape tells them apart
    without colour."""
    if kind == "control":
        edge = " ".join(
            f"{attribute(x + dx)},{attribute(y + dy)}" for dx, dy in ((0, -5), (5, 0), (0, 5), (-5, 0))
        )
        return f'<polygon points="{edge}" class="mark {kind}"/>'
    radius = {"final": 5, "base": 4.2}.get(kind, 4)
    return f'<circle cx="{attribute(x)}" cy="{attribute(y)}" r="{radius}" class="mark {kind}"/>'


def path(points: list[tuple[float, float]], kind: str) -> str:
    along = "L".join(f"{attribute(x)} {attribute(y)}" for x, y in points)
    return f'<path d="M{along}" class="{kind}"/>'


def tick_label(value: float, unit: str) -> str:
    return f"{brief(round(100 * value, 9))} %" if unit == "%" else brief(value)
