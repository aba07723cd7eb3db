"""LoRA's product and SwiGLU that keep little: exact, also with dropout and under activation checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from chinese_llama.model.frugal import add_lora_product, gated, remember, swiglu

DOUBLE = {"dtype": torch.float64, "requires_grad": True}


def operands(*shape: int, outputs: int = 5, rank: int = 2) -> list[torch.Tensor]:
    """result, x, A and B."""
    torch.manual_seed(0)
    inputs = shape[-1]
    sizes = [(*shape[:-1], outputs), shape, (rank, inputs), (outputs, rank)]
    return [torch.randn(size, **DOUBLE) for size in sizes]  # type: ignore[call-overload]


@settings(deadline=None, max_examples=20)
@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=3),
    scale=st.floats(0.1, 4),
    dropout=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    noted=st.booleans(),
)
def test_the_gradients_are_those_of_the_values(
    shape: list[int], scale: float, dropout: float, noted: bool
) -> None:
    """By finite differences; `noted`: x is made again from what it was made of."""

    def product(result: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)  # the same mask each time
        given = remember(x.sin(), torch.sin, x.detach()) if noted else x
        return add_lora_product(result, given, a, b, scale, dropout)

    assert torch.autograd.gradcheck(product, operands(*shape))


def test_without_dropout_it_is_lora() -> None:
    result, x, a, b = operands(2, 3, 4)
    expected = result + functional.linear(functional.linear(x, a), b) * 1.5
    torch.testing.assert_close(add_lora_product(result, x, a, b, 1.5, 0.0), expected)


def test_dropout_leaves_out_its_share_and_keeps_the_mean() -> None:
    """With A and B that pass each number on alone, what is added is dropout of x."""
    torch.manual_seed(0)
    x, one = torch.ones(500, 64), torch.eye(64)
    first, second = (add_lora_product(torch.zeros(500, 64), x, one, one, 1.0, 0.25) for _ in range(2))
    assert (first == 0).float().mean() == pytest.approx(0.25, abs=0.01)
    assert first.mean() == pytest.approx(1, abs=0.01)
    assert first.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (first != second).float().mean() > 0.3
    torch.manual_seed(0)
    assert torch.equal(first, add_lora_product(torch.zeros(500, 64), x, one, one, 1.0, 0.25))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_mask_again(reentrant: bool) -> None:
    found = []
    for again in (False, True):
        given = operands(6, 8)
        torch.manual_seed(5)

        def product(result: Any, x: Any, a: Any, b: Any) -> Any:
            return add_lora_product(result, x, a, b, 2.0, 0.5)

        value = checkpoint(product, *given, use_reentrant=reentrant) if again else product(*given)
        value.square().sum().backward()
        found.append([tensor.grad for tensor in given])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_swiglu() -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 4, **DOUBLE) for _ in range(2))  # type: ignore[call-overload]
    torch.testing.assert_close(gated(gate, up), swiglu(gate, up))
    assert torch.autograd.gradcheck(gated, (gate, up))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_nothing_of_the_size_of_the_input_is_kept_but_what_it_is_made_from(dropout: float) -> None:
    gate, up = (torch.randn(50, 64, requires_grad=True) for _ in range(2))
    a, b = torch.randn(2, 64, requires_grad=True), torch.randn(32, 2, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        add_lora_product(torch.zeros(50, 32), remember(gated(gate, up), swiglu, gate, up), a, b, 1.0, dropout)
    narrow = 50 * 2
    assert sum(kept.values()) == 4 * (gate.numel() + up.numel() + a.numel() + b.numel() + narrow)


def test_in_half_precision_parameters_have_gradients_in_float32() -> None:
    result, x, a, b = (tensor.detach() for tensor in operands(4, 6))
    mine = [t.bfloat16().requires_grad_() for t in (result, x)] + [t.float().requires_grad_() for t in (a, b)]
    result, x, a, b = mine
    found = add_lora_product(result, x, a, b, 1.0, 0.0)
    found.sum().backward()
    assert found.dtype == torch.bfloat16
    assert [t.grad.dtype for t in mine] == [torch.bfloat16] * 2 + [torch.float32] * 2  # type: ignore[union-attr]
