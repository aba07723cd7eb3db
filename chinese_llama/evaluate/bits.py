"""Bits per character and bits per byte: comparable between models with different tokenizers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chinese_llama.data.formats import documents
from chinese_llama.data.templates import text_ids
from chinese_llama.errors import UserError
from chinese_llama.progress import track

BATCH_TOKENS = 4096


@dataclass
class Window:
    """Ids that the model sees at once; the first `context` of them are not scored."""

    ids: list[int]
    context: int


def windows(ids: list[int], length: int, stride: int) -> Iterator[Window]:
    """Windows of at most `length` ids that score every id but the first exactly once.

    Each window after the first repeats `length - stride` ids as context
    (https://huggingface.co/docs/transformers/perplexity).
    """
    scored = 1
    while scored < len(ids):
        end = min(len(ids), length if scored == 1 else scored + stride)
        start = max(0, end - length)
        yield Window(ids[start:end], scored - start)
        scored = end


@torch.no_grad()
def window_nats(model: Any, batch: list[Window], filler: int) -> list[float]:
    """Negative log-likelihood in nats of the scored ids of each window.

    Windows are padded on the right, where causal attention does not look; logits are float32.
    """
    longest = max(len(window.ids) for window in batch)
    ids = torch.tensor([w.ids + [filler] * (longest - len(w.ids)) for w in batch], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").double()
    return [
        float(losses[row, window.context - 1 : len(window.ids) - 1].sum()) for row, window in enumerate(batch)
    ]


@dataclass
class Windows:
    """Texts as windows of ids, shortest first, and their counts: what `score` takes, again and again."""

    windows: list[Window]
    counts: dict[str, int]


def text_windows(tokenizer: Any, texts: Iterable[str], length: int, stride: int | None = None) -> Windows:
    """Windows of at most `length` tokens over documents; each starts after a bos, which is not counted.

    `stride` (default: half the length) is how far a window moves. Raises UserError where it does not fit.
    """
    stride = stride or length // 2
    if not 1 <= stride < length:
        raise UserError(
            f"A stride of {stride} does not fit windows of {length} tokens; give 1 to {length - 1}."
        )
    todo: list[Window] = []
    counts = dict.fromkeys(("characters", "bytes", "tokens", "documents"), 0)
    for text in texts:
        ids = text_ids(tokenizer, text)
        counts["characters"] += len(text)
        counts["bytes"] += len(text.encode())
        counts["tokens"] += len(ids)
        counts["documents"] += 1
        todo += windows([tokenizer.bos_token_id, *ids], length, stride)
    return Windows(sorted(todo, key=lambda window: len(window.ids)), counts)


def score(model: Any, texts: Windows, filler: int, batch_tokens: int = BATCH_TOKENS) -> dict[str, Any]:
    """Figures of a model on texts: bits_per_character, bits_per_byte, perplexity (per token),
    characters_per_token, characters, bytes, tokens, documents.

    `filler` pads windows; at most `batch_tokens` tokens run at once. Raises UserError if a figure is not
    finite.
    """
    batches = list(_batches(texts.windows, batch_tokens))
    nats = sum(
        sum(window_nats(model, batch, filler)) for batch in track(batches, "scoring", len(batches), "batches")
    )
    if not math.isfinite(nats):
        raise UserError("The model gives values that are not finite; is it damaged, or in float16?")
    bits, counts = nats / math.log(2), texts.counts
    return {
        "bits_per_character": bits / counts["characters"],
        "bits_per_byte": bits / counts["bytes"],
        "perplexity": math.exp(min(nats / counts["tokens"], 700.0)),
        "characters_per_token": counts["characters"] / counts["tokens"],
        **counts,
    }


def evaluate_text(
    model: Any, tokenizer: Any, texts: Iterable[str], stride: int | None = None
) -> dict[str, Any]:
    """`score` of documents, in windows as long as the model reads."""
    found = text_windows(tokenizer, texts, model.config.max_position_embeddings, stride)
    return score(model, found, tokenizer.eos_token_id)


def _batches(todo: list[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Windows of about equal length, `batch_tokens` tokens at a time."""
    batch: list[Window] = []
    for window in todo:
        if batch and (len(batch) + 1) * len(window.ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def evaluate(model_place: str, sets: dict[str, Path], stride: int | None = None) -> dict[str, Any]:
    """{"model", "sets": {name: figures}} of the model in a directory, on GPU or CPU."""
    from chinese_llama.model.load import check_pair, device, load_model, load_tokenizer

    for path in sets.values():
        next(iter(documents(path)))  # complain about the text before the model is loaded
    tokenizer = load_tokenizer(model_place)
    model = load_model(model_place).to(device())
    check_pair(model, tokenizer, model_place)
    results = {name: evaluate_text(model, tokenizer, documents(path), stride) for name, path in sets.items()}
    return {"model": str(model_place), "sets": results}
