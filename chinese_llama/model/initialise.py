"""How the rows of new pieces start: pure tensor maths, one function a method."""

from __future__ import annotations

from collections.abc import Sequence

import torch

METHODS = ("subword-mean", "mean-resizing", "random")
SEED = 20_000


def new_rows(method: str, old: torch.Tensor, parts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rows for new pieces, float32 [new, hidden].

    `old` [rows, hidden] is the matrix as it was (input or output, each on its own); `parts` gives,
    for each new piece, the old ids that its text was tokenised into (may be empty). The same
    arguments give the same rows.
    """
    generator = torch.Generator().manual_seed(SEED)
    return _FUNCTIONS[method](old.float(), parts, generator)


def _random(old: torch.Tensor, parts: Sequence[Sequence[int]], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(len(parts), old.shape[1], generator=generator) * 0.02


def _mean_resizing(
    old: torch.Tensor, parts: Sequence[Sequence[int]], generator: torch.Generator
) -> torch.Tensor:
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
    return mean + torch.randn(len(parts), old.shape[1], generator=generator) @ factor.T


def _subword_mean(
    old: torch.Tensor, parts: Sequence[Sequence[int]], generator: torch.Generator
) -> torch.Tensor:
    """Mean of the old rows of the piece's parts; of all old rows where it has none."""
    lengths = torch.tensor([len(ids) for ids in parts])
    flat = torch.tensor([index for ids in parts for index in ids], dtype=torch.long)
    offsets = torch.cumsum(lengths, 0) - lengths
    rows = torch.nn.functional.embedding_bag(flat, old, offsets, mode="mean")
    rows[lengths == 0] = old.mean(0)
    return rows


_FUNCTIONS = {"subword-mean": _subword_mean, "mean-resizing": _mean_resizing, "random": _random}
