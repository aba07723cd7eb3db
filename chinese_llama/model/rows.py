"""Trainable rows of the vocabulary beside frozen ones: lookup, logits and cross-entropy.

The frozen matrix [vocabulary, hidden] and the rows that train [new, hidden] are never put together: no copy of the
matrix, no gradient for what does not train. The cross-entropy works on some tokens at a time and makes its gradients
in the forward pass, as Liger's fused loss does (arXiv 2410.10989), so that [tokens, vocabulary] logits are never there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from chinese_llama.data.templates import IGNORE

LOGITS = {"cuda": 1 << 26, "cpu": 1 << 23}  # logits that are there at once; on a CPU its cache holds no more


@dataclass(frozen=True)
class Span:
    """The ids from `start` to before `stop`; their rows in what trains begin at `row`, or are frozen (None)."""

    start: int
    stop: int
    row: int | None


class Head:
    """Rows `ids` (one each of what trains, in its order) of a vocabulary of `size`; `ids` None: all of them train."""

    def __init__(self, size: int, ids: Sequence[int] | None) -> None:
        self.size = size
        self.spans = list(spans(size, range(size) if ids is None else ids))
        self._places = torch.full((size,), -1)
        for span in self.spans:
            if span.row is not None:
                self._places[span.start : span.stop] = torch.arange(
                    span.row, span.row + span.stop - span.start
                )

    def places(self, device: torch.device) -> torch.Tensor:
        """For each id the row in what trains, or -1; int64 [vocabulary]."""
        if self._places.device != device:
            self._places = self._places.to(device)
        return self._places

    def weights(
        self, frozen: torch.Tensor | None, rows: torch.Tensor | None
    ) -> Iterator[tuple[Span, torch.Tensor]]:
        """Each span with its part of a matrix, as a view."""
        for span in self.spans:
            if span.row is not None and rows is not None:
                yield span, rows[span.row : span.row + span.stop - span.start]
            elif frozen is not None:
                yield span, frozen[span.start : span.stop]


def spans(size: int, ids: Sequence[int]) -> Iterator[Span]:
    """The vocabulary in order, cut where what trains begins and ends.

    >>> [(s.start, s.stop, s.row) for s in spans(8, [3, 4, 6])]
    [(0, 3, None), (3, 5, 0), (5, 6, None), (6, 7, 2), (7, 8, None)]
    """
    end = 0
    order = sorted(range(len(ids)), key=lambda row: ids[row])
    first = 0
    for number, row in enumerate(order):
        after = order[number + 1] if number + 1 < len(order) else None
        if after is not None and after == row + 1 and ids[after] == ids[row] + 1:
            continue
        begin = order[first]
        if ids[begin] > end:
            yield Span(end, ids[begin], None)
        yield Span(ids[begin], ids[row] + 1, begin)
        end, first = ids[row] + 1, number + 1
    if end < size:
        yield Span(end, size, None)


def split_lookup(
    input_ids: torch.Tensor, head: Head, frozen: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """The embeddings [..., hidden] of `input_ids` [...], in the dtype of `frozen`; gradients go to `rows` alone."""
    place = head.places(input_ids.device)[input_ids]
    new = functional.embedding(place.clamp(min=0), rows).to(frozen.dtype)
    old = functional.embedding(input_ids, frozen)
    return torch.where((place >= 0).unsqueeze(-1), new, old)


def split_logits(
    hidden: torch.Tensor, head: Head, frozen: torch.Tensor | None, rows: torch.Tensor | None
) -> torch.Tensor:
    """The logits [..., vocabulary] of `hidden` [..., hidden]."""
    parts = [functional.linear(hidden, weight.to(hidden.dtype)) for _, weight in head.weights(frozen, rows)]
    return torch.cat(parts, -1)


def split_cross_entropy(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head: Head,
    frozen: torch.Tensor | None,
    rows: torch.Tensor | None,
    items: torch.Tensor | int | None = None,
    learnt: int | None = None,
) -> torch.Tensor:
    """The cross-entropy in nats of `labels` [batch, seq], each predicted by `hidden` [batch, seq, hidden] one place before
    it, where they are not IGNORE; as transformers' ForCausalLMLoss of the logits, in float32 (float64 for float64).

    The sum is divided by `items` (num_items_in_batch: the tokens of all micro batches of a step), or by the number of
    tokens learnt here. `learnt` is that number, if the host knows it: what is ignored is then left out beforehand.
    """
    wanted = functional.pad(labels[..., 1:], (0, 1), value=IGNORE).flatten()
    hidden = hidden.flatten(0, -2)
    if learnt is not None:
        kept = torch.nonzero_static(wanted != IGNORE, size=learnt).flatten()
        hidden, wanted = hidden.index_select(0, kept), wanted[kept]
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    total = _Nats.apply(hidden, rows, frozen, wanted, head, dtype, torch.is_grad_enabled())
    return total / ((wanted != IGNORE).sum() if items is None else items)


class _Nats(torch.autograd.Function):
    """The sum of the negative log-likelihoods. The gradients of a sum are kept, and scaled in the backward pass: divided
    by the tokens of a step they would be lost in float16."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        rows: torch.Tensor | None,
        frozen: torch.Tensor | None,
        wanted: torch.Tensor,
        head: Head,
        dtype: torch.dtype,
        learning: bool,
    ) -> torch.Tensor:
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        trains = learning and rows is not None and rows.requires_grad
        for_hidden = torch.empty_like(hidden) if learning and hidden.requires_grad else None
        for_rows = torch.zeros_like(rows, dtype=exact) if trains else None  # type: ignore[arg-type]
        total = torch.zeros((), dtype=exact, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            parts = [(span, weight.to(dtype)) for span, weight in head.weights(frozen, rows)]
            step = max(1, LOGITS.get(hidden.device.type, LOGITS["cuda"]) // head.size)
            logits = torch.empty(min(step, len(hidden)), head.size, dtype=dtype, device=hidden.device)
            for start in range(0, len(hidden), step):
                here = slice(start, start + step)
                given, targets = hidden[here].to(dtype), wanted[here]
                scores = logits[: len(given)]
                for span, weight in parts:
                    torch.mm(given, weight.t(), out=scores[:, span.start : span.stop])
                nats, gradient = _nats(scores, targets, exact)
                total += nats
                if for_hidden is not None:
                    for_hidden[here] = _back(gradient, parts)
                    for_hidden[here].masked_fill_((targets == IGNORE)[:, None], 0)
                if for_rows is not None:
                    _add_rows(for_rows, gradient, given.masked_fill((targets == IGNORE)[:, None], 0), parts)
        ctx.gradients = for_hidden, for_rows, rows.dtype if rows is not None else None
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "The gradients of this loss were used up; it cannot go backward a second time."
            )
        for_hidden, for_rows, dtype = ctx.gradients
        ctx.gradients = None
        for gradient in (for_hidden, for_rows):
            if gradient is not None:
                gradient.mul_(scale)
        return for_hidden, None if for_rows is None else for_rows.to(dtype), None, None, None, None, None


def _nats(
    scores: torch.Tensor, targets: torch.Tensor, exact: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the negative log-likelihoods of `targets` [tokens] by logits `scores` [tokens, vocabulary], and its
    gradient for those (where a target is IGNORE, it does not count, and the gradient is not to be used). `scores` are
    used up."""
    logs = torch.log_softmax(scores, -1, dtype=exact)
    index = targets.masked_fill(targets == IGNORE, 0)[:, None]
    nats = -logs.gather(1, index)[:, 0].masked_fill(targets == IGNORE, 0).sum()
    logs.exp_().scatter_add_(1, index, logs.new_full(index.shape, -1))
    return nats, logs if logs.dtype == scores.dtype else scores.copy_(logs)


def _back(gradient: torch.Tensor, parts: list[tuple[Span, torch.Tensor]]) -> torch.Tensor:
    """What `gradient` of the logits [tokens, vocabulary] is for what the head was given [tokens, hidden]."""
    (first, weight), *others = parts
    found = gradient[:, first.start : first.stop] @ weight
    for span, weight in others:
        found.addmm_(gradient[:, span.start : span.stop], weight)
    return found


def _add_rows(
    total: torch.Tensor, gradient: torch.Tensor, given: torch.Tensor, parts: list[tuple[Span, torch.Tensor]]
) -> None:
    """Add to `total` [new, hidden] what `gradient` [tokens, vocabulary] is for the rows that train."""
    for span, weight in parts:
        if span.row is not None:
            mine = total[span.row : span.row + len(weight)]
            columns = gradient[:, span.start : span.stop].t()
            if given.dtype == total.dtype:
                mine.addmm_(columns, given)
            else:
                mine += columns @ given
