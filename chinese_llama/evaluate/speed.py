"""Decoding speed in characters per second: fewer tokens per character are worth what they save here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from chinese_llama.data.templates import text_ids
from chinese_llama.errors import UserError
from chinese_llama.progress import track

CHARACTERS = 256
REPEATS = 5
PIECES = 16  # of a run: models take turns after each
PATIENCE = 60.0  # seconds of work per model after which a run is the last one
WARM_UP = 8  # tokens


def sample(documents: list[str]) -> str:
    """The first CHARACTERS characters of documents."""
    return "\n".join(documents[:CHARACTERS])[:CHARACTERS]


def decoding_speeds(models: Sequence[tuple[Any, Any]], text: str) -> list[dict[str, Any]]:
    """For each (model, tokenizer): characters_per_second, tokens_per_second, characters_per_token, characters,
    tokens, repeats, device, dtype.

    The text is decoded token by token with the cache, as greedy decoding does it: a forward pass for one token,
    the likeliest next one, and a look at it; but the next token is the text's, so every model writes the same
    text. Where the model's context is full, the cache begins anew. Models take turns after each of PIECES, so a
    machine that is busy for a while slows all of them; a piece counts with the median of its tokens over
    REPEATS runs, so one that stood still does not count. Raises UserError for a text without a token.
    """
    found = [text_ids(tokenizer, text) for _, tokenizer in models]
    if not all(found):
        raise UserError("Decoding speed needs a text with a token in it.")
    for (model, tokenizer), ids in zip(models, found, strict=True):
        list(_decode(model, tokenizer.bos_token_id, ids[:WARM_UP]))
    seconds = [[list[float]() for _ in range(PIECES)] for _ in models]
    start, repeats = time.thread_time(), 0  # not the clock: it goes on where the process stands still
    for turn in track(range(REPEATS * PIECES), "decoding", REPEATS * PIECES, "pieces"):
        piece = turn % PIECES
        if piece == 0:
            if repeats and time.thread_time() - start > PATIENCE * len(models):
                break
            repeats += 1
            runs = [_decode(m, t.bos_token_id, ids) for (m, t), ids in zip(models, found, strict=True)]
        for times, run, ids in zip(seconds, runs, found, strict=True):
            count = len(ids) * (piece + 1) // PIECES - len(ids) * piece // PIECES
            times[piece] += islice(run, count)
    return [
        _told(model, text, len(ids), times, repeats)
        for (model, _), ids, times in zip(models, found, seconds, strict=True)
    ]


def _told(model: Any, text: str, tokens: int, seconds: list[list[float]], repeats: int) -> dict[str, Any]:
    spent = sum(statistics.median(times) * len(times) / repeats for times in seconds if times)
    return {
        "characters_per_second": len(text) / spent,
        "tokens_per_second": tokens / spent,
        "characters_per_token": len(text) / tokens,
        "characters": len(text),
        "tokens": tokens,
        "repeats": repeats,
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


@torch.no_grad()
def _decode(model: Any, bos: int, ids: list[int]) -> Iterator[float]:
    """Seconds that each of `ids` takes, in windows as long as the model reads."""
    limit = getattr(model.config, "max_position_embeddings", None) or len(ids)
    for start in range(0, len(ids), limit):
        past = None
        for index in [bos, *ids[start : start + limit]][:-1]:
            before = time.perf_counter()
            step = torch.tensor([[index]], device=model.device)
            output = model(input_ids=step, past_key_values=past, use_cache=True)
            past = output.past_key_values
            int(output.logits[0, -1].argmax())  # waits for the GPU
            yield time.perf_counter() - before
