"""Figures of a model on texts, in one call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from chinese_llama.evaluate.bits import score, text_windows, window_length


def evaluate_text(
    model: Any, tokenizer: Any, texts: Iterable[str], stride: int | None = None, window: int | None = None
) -> dict[str, Any]:
    """Figures of a model on documents, in windows as long as it reads."""
    length = window_length(getattr(model.config, "max_position_embeddings", None), window)
    return score(model, text_windows(tokenizer, texts, length, stride), tokenizer.eos_token_id).figures()
