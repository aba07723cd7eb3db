"""What counts as a Chinese character."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.vocab.scripts import CHINESE, LETTERS, MARKS, RANGES, SHARED, is_chinese


@pytest.mark.parametrize(
    "piece", ["中", "中国", "，", "！？", "（", "《", "。", "の", "カ", "ㄅ", "〇", "䶮", "𠮷", "豈"]
)
def test_chinese_pieces(piece: str) -> None:
    assert is_chinese(piece)


@pytest.mark.parametrize(
    "piece",
    [
        "",
        "a",
        "1",
        "２",
        "Ａ",
        "ｚ",
        " ",
        "\u3000",
        "▁",
        "▁中",
        "中a",
        "中 国",
        "é",
        "한",
        "\n",
        "“",
        "…",
        "😀",
    ],
)
def test_pieces_with_anything_else_are_not(piece: str) -> None:
    """Full-width letters and digits, the ideographic space, curly quotes: spelt as by the base."""
    assert not is_chinese(piece)


@pytest.mark.parametrize("piece", ["。”", "“中", "中…", "‘中’", "——《", "……。", "中·国", "·中", "”——“中"])
def test_marks_shared_with_english_stand_beside_chinese_characters(piece: str) -> None:
    assert is_chinese(piece)


@pytest.mark.parametrize(
    "piece", ["”", "“”", "——", "……", "‘a’", "“中a", "…1。", "。” ", "”\u3000。", "“２”中"]
)
def test_shared_marks_alone_and_beside_others_are_not(piece: str) -> None:
    assert not is_chinese(piece)


@settings(max_examples=200, deadline=None)
@given(piece=st.text(alphabet=f"中の，。{SHARED}a1 \n▁２\u3000", max_size=6))
def test_a_piece_is_chinese_and_shared_marks_with_at_least_one_chinese_character(piece: str) -> None:
    chinese = [character for character in piece if CHINESE.match(character)]
    assert is_chinese(piece) == (bool(chinese) and all(c in SHARED for c in piece if c not in chinese))


def test_letters_and_marks_are_apart_and_together_all_ranges() -> None:
    assert sorted((*LETTERS, *MARKS)) == list(RANGES)
    assert not any(CHINESE.search(mark) for mark in SHARED)


def test_ranges_are_sorted_and_apart() -> None:
    flat = [bound for pair in RANGES for bound in pair]
    assert flat == sorted(flat)
    assert len(set(flat)) == len(flat)


def test_the_expressions_hold_exactly_the_ranges() -> None:
    inside = {code for low, high in RANGES for code in (low, high)}
    outside = {code + step for low, high in RANGES for code, step in ((low, -1), (high, 1))}
    assert all(is_chinese(chr(code)) for code in inside)
    assert not any(is_chinese(chr(code)) for code in outside if not any(a <= code <= b for a, b in RANGES))


def test_every_named_ideograph_is_han_and_may_be_in_a_piece() -> None:
    named = [
        chr(code)
        for code in range(0x3400, 0x32000)
        if unicodedata.name(chr(code), "").startswith(("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH"))
    ]
    assert len(named) > 90_000
    assert all(is_chinese(character) for character in named)


def test_no_ascii_or_latin_1_character_is_chinese() -> None:
    assert not any(CHINESE.search(chr(code)) for code in range(0x2E80))


@settings(max_examples=50, deadline=None)
@given(text=st.text(alphabet="中国の，。！a1 \n▁“"))
def test_the_pattern_finds_the_chinese_characters_in_order(text: str) -> None:
    assert CHINESE.findall(text) == [character for character in text if is_chinese(character)]
