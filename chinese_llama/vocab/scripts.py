"""Which characters a Chinese piece may hold."""

from __future__ import annotations

import re

# Han with its extensions and compatibility forms, kana and bopomofo, CJK and full-width punctuation.
# Full-width digits and Latin letters stay out: the base spells those as it always did.
RANGES = (
    (0x2E80, 0x2FDF),  # radicals
    (0x3001, 0x303F),  # CJK punctuation (not the ideographic space)
    (0x3040, 0x30FF),  # kana
    (0x3100, 0x312F),  # bopomofo
    (0x31C0, 0x31EF),  # strokes
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF01, 0xFF0F),
    (0xFF1A, 0xFF20),
    (0xFF3B, 0xFF40),
    (0xFF5B, 0xFF65),
    (0xFFE0, 0xFFE6),
    (0x20000, 0x3FFFF),
)
_CLASS = "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in RANGES)
CHINESE = re.compile(f"[{_CLASS}]")
RUN = re.compile(f"[{_CLASS}]+")


def is_chinese(piece: str) -> bool:
    """True if every character of `piece` is one that a Chinese piece may hold."""
    return RUN.fullmatch(piece) is not None
