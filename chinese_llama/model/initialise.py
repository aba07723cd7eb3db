"""How the rows of new pieces start: pure tensor maths, one function a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

Parts = Sequence[Sequence[int]]
Side = Literal["input", "output", "tied"]
SEED = 20_000
PUSH = 4.0  # with 2, new ids keep 0.3 % of the probability on English (python -m benchmarks rows)
NOISE = 0.1
NOISY = 256  # rows of noise made at once; torch draws 16 numbers at a time, so a multiple of 16


def new_rows(method: str, old: torch.Tensor, parts: Parts, side: Side) -> torch.Tensor:
    """Rows for new pieces, float32 [new, hidden].

    `old` [rows, hidden] is the matrix as it was; `parts` gives, for each new piece, the old ids that its
    text was tokenised into (may be empty); `side` is what the matrix does: "input" for embeddings, "output"
    for the head, "tied" where one matrix is both. The same arguments give the same rows.
    """
    return _FUNCTIONS[method](old.float(), parts, side)


def _random(old: torch.Tensor, parts: Parts, side: Side) -> torch.Tensor:
    """N(0, 0.02), as LLaMA's own rows began."""
    return torch.randn(len(parts), old.shape[1], generator=_generator()) * 0.02


def _mean_resizing(old: torch.Tensor, parts: Parts, side: Side) -> torch.Tensor:
    """Mean of all old rows plus a little noise of their covariance, as `resize_token_embeddings`
    does by default (Hewitt 2021, "Initializing New Word Embeddings")."""
    mean = old.mean(0)
    centred = (old - mean).double()
    covariance = 1e-9 * centred.T @ centred / len(old)
    jitter = 1e-6 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.double)
    factor, failed = torch.linalg.cholesky_ex(covariance + jitter)
    if failed:  # all rows are equal
        return mean.repeat(len(parts), 1)
    factor = factor.float()
    return mean + torch.randn(len(parts), old.shape[1], generator=_generator()) @ factor.T


def _subword_mean(old: torch.Tensor, parts: Parts, side: Side) -> torch.Tensor:
    """Mean of the old rows of the piece's parts; of all old rows where it has none."""
    return _weighted(old, parts, lambda count: [1.0] * count)


def _asymmetric(old: torch.Tensor, parts: Parts, side: Side) -> torch.Tensor:
    """Weighted means of the parts' rows: an input row leans towards the last part, where the model used to
    have read the piece; an output row towards the first, which it used to predict there (EEVE, arXiv
    2402.14714). So parts in another order give another row.

    Input rows get the median norm of old rows, for a mean of many is short. Output rows are pushed away from
    the mean of all old rows, together, by PUSH times the distance that they have from it on the average, so
    that they begin unlikely where the base expects other pieces than their parts; they are longer than old
    rows for that. Pieces that repeat one part (twice, three times) would start alike: noise tells them apart.
    """
    if side == "output":
        rows = _weighted(old, parts, lambda count: range(count, 0, -1))
        has = torch.tensor([len(ids) > 0 for ids in parts])
        if has.any():
            rows += PUSH * ((rows if has.all() else rows[has]).mean(0) - old.mean(0))
        return _told_apart(rows, old, parts)
    rows = _weighted(old, parts, lambda count: range(1, count + 1))
    norms = rows.norm(dim=1, keepdim=True)
    rows *= old.norm(dim=1).median() / norms.clamp(min=torch.finfo(torch.float32).tiny)
    return _told_apart(rows, old, parts)


def _told_apart(rows: torch.Tensor, old: torch.Tensor, parts: Parts) -> torch.Tensor:
    """`rows`, with a little noise (NOISE of the old rows' spread) in those of pieces that repeat one part.

    The noise is that of a matrix as large as `rows`, made a few rows at a time; it ends after the last that is used.
    """
    alike = [index for index, ids in enumerate(parts) if len(ids) > 1 and len(set(ids)) == 1]
    if not alike:
        return rows
    generator, scale = _generator(), NOISE * old.std()
    for start in range(0, alike[-1] + 1, NOISY):
        noise = torch.randn(min(NOISY, len(rows) - start), rows.shape[1], generator=generator) * scale
        for index in (index for index in alike if start <= index < start + NOISY):
            rows[index] += noise[index - start]
    return rows


def _weighted(old: torch.Tensor, parts: Parts, weights: Callable[[int], Sequence[float]]) -> torch.Tensor:
    """Means of the parts' rows, weighted by `weights` of their count; where there is no part, of all rows."""
    counts = torch.tensor([len(ids) for ids in parts], dtype=torch.long)
    flat = torch.tensor([index for ids in parts for index in ids], dtype=torch.long)
    each = torch.tensor([weight for ids in parts for weight in _shares(weights(len(ids)))])
    offsets = torch.cumsum(counts, 0) - counts
    rows = torch.nn.functional.embedding_bag(flat, old, offsets, mode="sum", per_sample_weights=each)
    rows[counts == 0] = old.mean(0)
    return rows


def _shares(weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    return [weight / total for weight in weights]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


_FUNCTIONS: dict[str, Callable[[torch.Tensor, Parts, Side], torch.Tensor]] = {
    "asymmetric": _asymmetric,
    "subword-mean": _subword_mean,
    "mean-resizing": _mean_resizing,
    "random": _random,
}
METHODS = tuple(_FUNCTIONS)
