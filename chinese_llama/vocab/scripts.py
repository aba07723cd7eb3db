"""Which characters a Chinese piece may hold."""

from __future__ import annotations

import re

# Han with its extensions and compatibility forms, kana and bopomofo.
LETTERS = (
    (0x2E80, 0x2FDF),  # radicals
    (0x3005, 0x3007),  # iteration mark, closing mark, zero
    (0x3021, 0x3029),  # Hangzhou numerals
    (0x3040, 0x30FF),  # kana
    (0x3100, 0x312F),  # bopomofo
    (0x31C0, 0x31EF),  # strokes
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
# CJK and full-width punctuation. Full-width digits and Latin letters stay out, and the ideographic
# space: the base spells those as it always did.
MARKS = (
    (0x3001, 0x3004),
    (0x3008, 0x3020),
    (0x302A, 0x303F),
    (0xFF01, 0xFF0F),
    (0xFF1A, 0xFF20),
    (0xFF3B, 0xFF40),
    (0xFF5B, 0xFF65),
    (0xFFE0, 0xFFE6),
)
RANGES = tuple(sorted((*LETTERS, *MARKS)))
SHARED = "“”‘’—…·"  # marks of Chinese and of English text: in a piece only beside a Chinese one, as in 。”


def _characters(ranges: tuple[tuple[int, int], ...]) -> str:
    return "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in ranges)


CHINESE = re.compile(f"[{_characters(RANGES)}]")
_MARKS = f"[{_characters(MARKS)}{SHARED}]"
CLAUSE = re.compile(f"{_MARKS}?[{_characters(LETTERS)}]+|{_MARKS}+")
_PIECE = re.compile(f"[{SHARED}]*{CHINESE.pattern}[{_characters(RANGES)}{SHARED}]*")


def is_chinese(piece: str) -> bool:
    """True if a Chinese piece may be spelt so: a Chinese character, and beside it none but Chinese
    ones and the marks that Chinese shares with English."""
    return _PIECE.fullmatch(piece) is not None
