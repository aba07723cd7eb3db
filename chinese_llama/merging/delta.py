"""What adapters add to a weight: pure tensor maths."""

from __future__ import annotations

import math
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


def add_delta(total: torch.Tensor, pair: Factors) -> None:
    """Add scale * B @ A to `total` [out, in] (float32), in place."""
    a, b = pair.a.float() * pair.scale, pair.b.float()
    if pair.transposed:
        total.addmm_(a.T, b.T)
    else:
        total.addmm_(b, a)
