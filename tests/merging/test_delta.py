"""The maths of a LoRA pair against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.merging.delta import Factors, add_delta, scale_of

EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def add_all(weight: torch.Tensor, pairs: list[Factors]) -> torch.Tensor:
    """All deltas on a float32 copy, rounded once, as merging does."""
    total = weight.to(torch.float32, copy=True)
    for pair in pairs:
        add_delta(total, pair)
    return total.to(weight.dtype)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 8), st.integers(1, 8), st.integers(1, 4), st.integers(0, 3), st.booleans(),
    st.sampled_from(sorted(EPS, key=str)), st.integers(0, 2**31),
)  # fmt: skip
def test_the_sum_is_rounded_once(
    out: int, into: int, rank: int, count: int, transposed: bool, dtype: torch.dtype, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    shape = (into, out) if transposed else (out, into)
    weight = torch.randn(shape, generator=draw).to(dtype)
    kept = weight.clone()
    pairs = [
        Factors(
            torch.randn(rank, into, generator=draw),
            torch.randn(out, rank, generator=draw),
            0.5 + i,
            transposed,
        )
        for i in range(count)
    ]
    merged = add_all(weight, pairs)
    exact = weight.double()
    for pair in pairs:
        delta = pair.scale * pair.b.double() @ pair.a.double()
        exact = exact + (delta.T if transposed else delta)
    assert merged.dtype == dtype
    assert torch.equal(weight, kept)
    assert ((merged.double() - exact).abs() <= EPS[dtype] * exact.abs() + 2e-5).all()
    if not pairs:
        assert torch.equal(merged, weight)


def test_small_deltas_are_not_lost_one_by_one() -> None:
    """Each delta alone would round away in bfloat16; together they count."""
    weight = torch.ones(1, 1, dtype=torch.bfloat16)
    pair = Factors(torch.ones(1, 1), torch.ones(1, 1), 2.0**-9)
    assert add_all(weight, [pair]).item() == 1.0
    assert add_all(weight, [pair] * 4).item() == 1.0 + 2.0**-7


@pytest.mark.parametrize(("rslora", "expected"), [(False, 4.0), (True, 8.0)])
def test_scale(rslora: bool, expected: float) -> None:
    assert scale_of(16, 4, rslora) == expected
