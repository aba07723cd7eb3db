"""What adapters add to a weight: pure tensor maths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass
class Factors:
    """One LoRA pair: `a` [r, in], `b` [out, r] and its scale; the weight is stored as [in, out] if
    `transposed` (PEFT's fan_in_fan_out)."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    transposed: bool = False


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def add_deltas(weight: torch.Tensor, factors: Sequence[Factors]) -> torch.Tensor:
    """weight + sum of scale * B @ A over `factors` [out, in], in float32, rounded once.

    Returns a new tensor of the dtype of `weight`.
    """
    total = weight.to(torch.float32, copy=True)
    for pair in factors:
        a, b = pair.a.float() * pair.scale, pair.b.float()
        if pair.transposed:
            total.addmm_(a.T, b.T)
        else:
            total.addmm_(b, a)
    return total.to(weight.dtype)
