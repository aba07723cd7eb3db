"""What adapters add to a weight: pure tensor maths, on some of its rows at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass
class Factors:
    """What a LoRA pair adds: `left` [out, r] @ `right` [r, in], float32, the scale is in `right`.

    `magnitude` [out] is DoRA's (Liu 2024, arXiv 2402.09353): each row of the sum gets that length.
    """

    left: torch.Tensor
    right: torch.Tensor
    magnitude: torch.Tensor | None = None


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def joined(pairs: list[Factors]) -> Factors:
    """One pair that adds what all of `pairs` (without magnitudes) add: their ranks side by side."""
    if len(pairs) == 1:
        return pairs[0]
    return Factors(torch.cat([p.left for p in pairs], 1), torch.cat([p.right for p in pairs]))


def add_delta(total: torch.Tensor, pair: Factors, start: int = 0) -> None:
    """Add the pair's rows from `start` on to `total` [rows, in] (float32), in place. Rows that the pair
    does not have stay."""
    left = pair.left[start : start + len(total)]
    total[: len(left)].addmm_(left, pair.right)


def dora(total: torch.Tensor, pair: Factors, start: int = 0) -> torch.Tensor:
    """The rows of `total` with a DoRA pair added and brought to their magnitude, [rows, in]."""
    assert pair.magnitude is not None
    added = total.clone()
    add_delta(added, pair, start)
    magnitude = pair.magnitude[start : start + len(total)]
    count = len(magnitude)
    added[:count] *= (magnitude / added[:count].norm(dim=1)).unsqueeze(1)
    return added


def combined(
    deltas: list[torch.Tensor], weights: list[float], method: str, density: float, seed: int
) -> torch.Tensor:
    """Deltas [rows, in] of adapters that share what lies below them, as one.

    `method`: linear is their weighted sum; ties (Yadav 2023, arXiv 2306.01708) keeps of each the
    `density` largest and of those the ones that agree in sign; dare_linear and dare_ties (Yu 2023, arXiv
    2311.03099) keep `density` of them by chance (`seed`) and scale them up. TIES and DARE are PEFT's.
    """
    if method == "linear":
        return torch.stack([w * delta for w, delta in zip(weights, deltas, strict=True)]).sum(0)
    from peft.utils import merge_utils

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(merge_utils, method)(deltas, torch.tensor(weights), density)
