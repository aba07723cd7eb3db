"""Columns of text in a terminal."""

from __future__ import annotations

import pytest

from chinese_llama.terminal import columns


@pytest.mark.parametrize(
    ("text", "taken"), [("", 0), ("plain", 5), ("中文a", 5), ("（！）", 6), ("e\u0301", 1)]
)
def test_columns(text: str, taken: int) -> None:
    assert columns(text) == taken
