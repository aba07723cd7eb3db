"""Decoding speed in characters per second: fewer tokens per character are worth what they save here."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from chinese_llama.data.templates import text_ids
from chinese_llama.errors import UserError
from chinese_llama.progress import track

CHARACTERS = 256
REPEATS = 5
PATIENCE = 60.0  # seconds after which a run is the last one
WARM_UP = 8  # tokens


def sample(documents: list[str]) -> str:
    """The first CHARACTERS characters of documents."""
    return "\n".join(documents[:CHARACTERS])[:CHARACTERS]


def decoding_speed(model: Any, tokenizer: Any, text: str) -> dict[str, Any]:
    """characters_per_second, tokens_per_second, characters_per_token, characters, tokens, repeats, device,
    dtype.

    The text is decoded token by token with the cache, as greedy decoding does it: a forward pass for one token,
    the likeliest next one, and a look at it; but the next token is the text's, so every model writes the same
    text. Where the model's context is full, the cache begins anew. Of REPEATS runs each token's time is the
    median (a busy machine disturbs single ones); their sum is the time. Raises UserError for a text without
    a token.
    """
    ids = text_ids(tokenizer, text)
    if not ids:
        raise UserError("Decoding speed needs a text with a token in it.")
    limit = min(getattr(model.config, "max_position_embeddings", None) or len(ids), len(ids))
    _run(model, tokenizer.bos_token_id, ids[:WARM_UP], limit)
    start, runs = time.monotonic(), list[list[float]]()
    for _ in track(range(REPEATS), "decoding", REPEATS, "runs"):
        runs.append(_run(model, tokenizer.bos_token_id, ids, limit))
        if time.monotonic() - start > PATIENCE:
            break
    seconds = sum(statistics.median(times) for times in zip(*runs, strict=True))
    return {
        "characters_per_second": len(text) / seconds,
        "tokens_per_second": len(ids) / seconds,
        "characters_per_token": len(text) / len(ids),
        "characters": len(text),
        "tokens": len(ids),
        "repeats": len(runs),
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


@torch.no_grad()
def _run(model: Any, bos: int, ids: list[int], limit: int) -> list[float]:
    """Seconds that each of `ids` takes, in windows of `limit` tokens."""
    seconds = []
    for start in range(0, len(ids), limit):
        past = None
        for index in [bos, *ids[start : start + limit]][:-1]:
            before = time.perf_counter()
            step = torch.tensor([[index]], device=model.device)
            output = model(input_ids=step, past_key_values=past, use_cache=True)
            past = output.past_key_values
            int(output.logits[0, -1].argmax())  # waits for the GPU
            seconds.append(time.perf_counter() - before)
    return seconds
