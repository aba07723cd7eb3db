"""What the report says of how a result was made."""

from __future__ import annotations

import pytest

from chinese_llama.adapt.made import _characters


def source(tokens: int, characters: int, weight: float | None = None) -> dict[str, float | None]:
    return {"tokens": tokens, "characters": characters, "weight": weight}


def test_an_epoch_without_weights_reads_every_character_once() -> None:
    assert _characters([source(100, 150), source(300, 900)]) == pytest.approx(1050)
    assert _characters([]) == 0


def test_with_weights_it_reads_as_many_tokens_shared_by_them() -> None:
    """100 tokens together: 80 of 1.5 characters, 20 of 4."""
    assert _characters([source(50, 75, 4.0), source(50, 200, 1.0)]) == pytest.approx(80 * 1.5 + 20 * 4)
