"""Bits per character and bits per byte: comparable between models with different tokenizers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from chinese_llama.data.templates import text_ids
from chinese_llama.errors import UserError
from chinese_llama.progress import track

BATCH_TOKENS = 4096
CHUNK = 512  # tokens whose logits are looked at together
WINDOW = 4096  # tokens of a window where nothing is asked for: more context changes little, and costs memory


class NotFinite(UserError):
    """A model that gives a document (`document`, from 0) no number."""

    def __init__(self, document: int, value: float) -> None:
        self.document, self.value = document, value
        super().__init__(f"The model gives document {document + 1:,} values that are not finite ({value}).")


@dataclass
class Window:
    """Ids that the model sees at once; the first `context` of them are not scored."""

    ids: Sequence[int]
    context: int
    document: int = 0


def windows(ids: Sequence[int], length: int, stride: int, document: int = 0) -> Iterator[Window]:
    """Windows of at most `length` ids that score every id but the first exactly once.

    One begins every `stride` ids, and each after the first repeats `length - stride` as context, the last one
    too, which may be shorter (https://huggingface.co/docs/transformers/perplexity).
    """
    scored = 1
    while scored < len(ids):
        end = min(len(ids), length if scored == 1 else scored + stride)
        start = max(0, scored - (length - stride))
        yield Window(ids[start:end], scored - start, document)
        scored = end


def window_length(limit: int | None, asked: int | None = None) -> int:
    """Tokens of a window for a model that reads `limit` (None: its config does not say): as `asked`, else
    all of them, at most WINDOW. Raises UserError where the model does not read as many."""
    if asked is None:
        return min(limit or WINDOW, WINDOW)
    if asked < 2:
        raise UserError(
            f"A window of {asked} leaves nothing to score after the token that it begins with; give 2 or more."
        )
    if limit and asked > limit:
        raise UserError(
            f"A window of {asked:,} tokens is longer than the model's context of {limit:,}; give at most that."
        )
    return asked


def window_stride(length: int, asked: int | None = None) -> int:
    """How far windows of `length` tokens move: as `asked`, else half the length. Raises UserError where
    tokens would be skipped, or have no context."""
    stride = length // 2 if asked is None else asked
    if not 1 <= stride < length:
        raise UserError(
            f"A stride of {stride} does not fit windows of {length} tokens; give 1 to {length - 1}."
        )
    return stride


@torch.no_grad()
def window_nats(model: Any, batch: list[Window], filler: int) -> list[float]:
    """Negative log-likelihood in nats of the scored ids of each window.

    Windows are padded on the right, where causal attention does not look. The largest tensor is the model's
    logits, [windows, scored positions, vocabulary] in its dtype (4096 tokens of 49,953 in float32: 0.8 GB);
    they are made float32 and normalised CHUNK tokens at a time (0.1 GB twice). One transfer from the GPU.
    """
    longest = max(len(window.ids) for window in batch)
    first = min(window.context for window in batch) - 1  # the position whose logits score the first id
    ids = torch.full((len(batch), longest), filler)
    for row, window in enumerate(batch):
        ids[row, : len(window.ids)] = torch.as_tensor(window.ids)
    places = torch.arange(first + 1, longest)
    starts, ends = (
        torch.tensor(found)[:, None] for found in zip(*((w.context, len(w.ids)) for w in batch), strict=True)
    )
    scored = ((places >= starts) & (places < ends)).to(model.device)
    ids = ids.to(model.device)
    # The last id is only asked for: with it, a window of one token more than the model reads would be too long.
    logits = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=longest - 1 - first).logits
    logits, wanted = logits[:, first + 1 - longest :], ids[:, first + 1 :]
    nats = torch.zeros(len(batch), dtype=torch.float64, device=model.device)
    step = max(1, CHUNK // len(batch))
    for start in range(0, longest - first - 1, step):
        here = slice(start, start + step)
        part = logits[:, here].float().flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(part, wanted[:, here].flatten(), reduction="none")
        nats += losses.view(len(batch), -1).where(scored[:, here], 0.0).double().sum(1)
    return nats.tolist()


@dataclass
class Windows:
    """Texts as windows of ids, shortest first, and their counts by document: what `score` takes, again and
    again. `length` and `stride` are in tokens; `unknown` is how many of the tokens stand for nothing (<unk>)."""

    length: int
    stride: int
    unknown: int = 0
    windows: list[Window] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def context(self) -> float:
        """How many tokens are seen before a scored one, on average, the bos of the document among them."""
        seen = sum((w.context + len(w.ids) - 1) * (len(w.ids) - w.context) // 2 for w in self.windows)
        return seen / sum(self.tokens)


def text_windows(tokenizer: Any, texts: Iterable[str], length: int, stride: int | None = None) -> Windows:
    """Windows of at most `length` tokens over documents; each starts after a bos, which is not counted.

    `stride` (default: half the length) is how far a window moves. Raises UserError where it does not fit, and
    where there is not one token.
    """
    made = Windows(length, window_stride(length, stride))
    for number, text in enumerate(texts):
        ids = text_ids(tokenizer, text)
        made.characters.append(len(text))
        made.bytes.append(len(text.encode()))
        made.tokens.append(len(ids))
        made.unknown += ids.count(tokenizer.unk_token_id)
        whole: Any = np.array(
            [tokenizer.bos_token_id, *ids], np.int32
        )  # windows are views: a short stride costs little
        made.windows += windows(whole, length, made.stride, number)
    if not made.windows:
        raise UserError("The text has not one token; give one with more in it.")
    made.windows.sort(key=lambda window: (len(window.ids), window.context))
    return made


@dataclass
class Scores:
    """What a model makes of each document, in their order: `nats` (negative log-likelihood), and what it is
    divided by. `window` and `stride` are in tokens; `context` is how many tokens are seen before a scored
    one, on average; `unknown` tokens hide characters, so their nats are too few."""

    nats: list[float]
    characters: list[int]
    bytes: list[int]
    tokens: list[int]
    window: int
    stride: int
    context: float
    unknown: int = 0

    def figures(self) -> dict[str, Any]:
        """bits_per_character, bits_per_byte, perplexity (per token), characters_per_token; characters, bytes,
        tokens, unknown, documents, window, stride, context."""
        nats, characters = math.fsum(self.nats), sum(self.characters)
        size, tokens = sum(self.bytes), sum(self.tokens)
        return {
            "bits_per_character": nats / math.log(2) / characters,
            "bits_per_byte": nats / math.log(2) / size,
            "perplexity": math.exp(min(nats / tokens, 700.0)),
            "characters_per_token": characters / tokens,
            "characters": characters,
            "bytes": size,
            "tokens": tokens,
            "unknown": self.unknown,
            "documents": len(self.nats),
            "window": self.window,
            "stride": self.stride,
            "context": self.context,
        }


def score(
    model: Any, texts: Windows, filler: int, batch_tokens: int = BATCH_TOKENS, what: str = "scoring"
) -> Scores:
    """Scores of a model on texts. `filler` pads windows; at most `batch_tokens` tokens run at once (or one
    window); `what` is shown while it runs. Raises NotFinite if a document's is not finite."""
    nats = [0.0] * len(texts.tokens)
    batches = list(_batches(texts.windows, batch_tokens))
    for batch in track(batches, what, len(batches), "batches"):
        for window, value in zip(batch, window_nats(model, batch, filler), strict=True):
            if not math.isfinite(value):
                raise NotFinite(window.document, value)
            nats[window.document] += value
    counts = (texts.characters, texts.bytes, texts.tokens)
    return Scores(nats, *counts, texts.length, texts.stride, texts.context, texts.unknown)


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
