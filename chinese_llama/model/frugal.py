"""LoRA and the gated product of an MLP, which keep for the backward pass only what is kept anyway.

What LoRA's A is given (the output of a norm, or the product in an MLP, after dropout) is a matter of a few cheap
operations: it is made again in the backward pass, dropout included, whose mask follows from a seed. PEFT keeps it for each
projection. No matrix product is done twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Made:
    """How a tensor came about: `function(*inputs)` gives it again."""

    function: Callable[..., torch.Tensor]
    inputs: tuple[torch.Tensor, ...]


def remember(
    tensor: torch.Tensor, function: Callable[..., torch.Tensor], *inputs: torch.Tensor
) -> torch.Tensor:
    """`tensor`, with a note of how it was made for `add_lora_product`."""
    tensor.made = Made(function, inputs)  # type: ignore[attr-defined]
    return tensor


def add_lora_product(
    result: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, dropout: float
) -> torch.Tensor:
    """`result` [..., out] + scale * dropout(x) A' B' (LoRA, arXiv 2106.09685), in the dtype of `result`.

    x [..., in], A [rank, in], B [out, rank]; A and B may be float32, and so are their gradients then. The mask of dropout
    is drawn from a seed that PyTorch's generator of the CPU gives, which checkpoints and recomputation restore; each
    process has masks of its own, though all were seeded alike.
    """
    seed = int(torch.randint(1 << 62, ())) + _process() if dropout else 0
    made = getattr(x, "made", None) or Made(_same, (x,))
    return _LoraProduct.apply(result, x, a, b, scale, dropout, seed, made)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`swiglu(gate, up)`, of which only `gate` and `up` are kept."""
    return _Gated.apply(gate, up)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (arXiv 2002.05202)."""
    return functional.silu(gate) * up


def _process() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _mask(x: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.empty_like(x).bernoulli_(1 - dropout, generator=generator)


class _LoraProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        result: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        dropout: float,
        seed: int,
        made: Made,
    ) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            a16, b16 = a.to(result.dtype), b.to(result.dtype)
            given = (_mask(x, dropout, seed).mul_(x) if dropout else x).to(result.dtype)
            factor = scale / ((1 - dropout) or 1)  # of 1 nothing is left
            narrow = functional.linear(given.flatten(0, -2), a16) * factor
            wide = torch.addmm(result.flatten(0, -2), narrow, b16.t())
        ctx.save_for_backward(a16, b16, narrow, *made.inputs)
        ctx.how = made.function, factor, dropout, seed, x.dtype, a.dtype
        return wide.view(result.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        a, b, narrow, *inputs = ctx.saved_tensors
        function, factor, dropout, seed, dtype, trained = ctx.how
        wide = gradient.flatten(0, -2)
        for_narrow = (wide @ b) * factor
        for_b = wide.t() @ narrow
        with torch.autocast(gradient.device.type, enabled=False):
            x = function(*inputs)
        mask = _mask(x, dropout, seed) if dropout else None
        given = (x if mask is None else x * mask).to(a.dtype)
        for_a = for_narrow.t() @ given.flatten(0, -2)
        for_x = (for_narrow @ a).view(x.shape)
        if mask is not None:
            for_x = for_x.mul_(mask)
        return gradient, for_x.to(dtype), for_a.to(trained), for_b.to(trained), None, None, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        for_up = gradient * functional.silu(gate)
        return torch.ops.aten.silu_backward(gradient * up, gate), for_up
