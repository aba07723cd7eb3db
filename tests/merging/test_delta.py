"""The maths of a LoRA pair against float64, on all rows or on some."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.merging.delta import Factors, add_delta, combined, dora, joined, scale_of

EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def add_all(weight: torch.Tensor, pairs: list[Factors], start: int = 0) -> torch.Tensor:
    """All deltas on a float32 copy, rounded once, as merging does."""
    total = weight.to(torch.float32, copy=True)
    for pair in pairs:
        add_delta(total, pair, start)
    return total.to(weight.dtype)


def drawn(out: int, into: int, rank: int, draw: torch.Generator) -> Factors:
    return Factors(torch.randn(out, rank, generator=draw), torch.randn(rank, into, generator=draw))


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 8), st.integers(1, 8), st.integers(1, 4), st.integers(0, 3),
    st.sampled_from(sorted(EPS, key=str)), st.integers(0, 2**31), st.data(),
)  # fmt: skip
def test_the_sum_is_rounded_once(
    out: int, into: int, rank: int, count: int, dtype: torch.dtype, seed: int, data: st.DataObject
) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, into, generator=draw).to(dtype)
    kept = weight.clone()
    pairs = [drawn(out, into, rank, draw) for _ in range(count)]
    exact = weight.double() + sum(pair.left.double() @ pair.right.double() for pair in pairs)
    start = data.draw(st.integers(0, out))
    stop = data.draw(st.integers(start, out))
    for merged in (
        add_all(weight[start:stop], pairs, start),
        add_all(weight[start:stop], [joined(pairs)] if pairs else [], start),
    ):
        assert merged.dtype == dtype
        wanted = exact[start:stop]
        assert ((merged.double() - wanted).abs() <= EPS[dtype] * wanted.abs() + 2e-5).all()
    assert torch.equal(weight, kept)
    if not pairs:
        assert torch.equal(add_all(weight, pairs), weight)


def test_rows_that_a_pair_does_not_have_stay() -> None:
    """A LoRA on lm_head below a vocabulary that grew after it."""
    pair = Factors(torch.ones(3, 1), torch.ones(1, 2))
    total = torch.zeros(5, 2)
    add_delta(total, pair)
    assert total[:, 0].tolist() == [1, 1, 1, 0, 0]
    add_delta(total[3:], pair, 3)
    assert total[:, 0].tolist() == [1, 1, 1, 0, 0]


def test_small_deltas_are_not_lost_one_by_one() -> None:
    """Each delta alone would round away in bfloat16; together they count."""
    weight = torch.ones(1, 1, dtype=torch.bfloat16)
    pair = Factors(torch.ones(1, 1), torch.full((1, 1), 2.0**-9))
    assert add_all(weight, [pair]).item() == 1.0
    assert add_all(weight, [pair] * 4).item() == 1.0 + 2.0**-7


@pytest.mark.parametrize(("rslora", "expected"), [(False, 4.0), (True, 8.0)])
def test_scale(rslora: bool, expected: float) -> None:
    assert scale_of(16, 4, rslora) == expected


def test_dora_gives_rows_their_magnitude_and_the_direction_of_the_sum() -> None:
    draw = torch.Generator().manual_seed(1)
    weight, pair = torch.randn(6, 5, generator=draw), drawn(6, 5, 2, draw)
    pair.magnitude = torch.rand(6, generator=draw) + 0.5
    whole = dora(weight, pair)
    torch.testing.assert_close(whole.norm(dim=1), pair.magnitude)
    summed = weight + pair.left @ pair.right
    torch.testing.assert_close(torch.cosine_similarity(whole, summed), torch.ones(6))
    assert torch.equal(dora(weight[2:4], pair, 2), whole[2:4])


def test_combining_linearly_is_the_weighted_sum() -> None:
    deltas = [torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 4.0]])]
    assert combined(deltas, [0.5, 2.0], "linear", 1.0, 0).tolist() == [[6.5, 7.0]]


def test_ties_keeps_the_largest_and_drops_the_sign_that_loses() -> None:
    """Worked by hand after the paper: trim to half, elect signs by mass, mean of those that agree."""
    deltas = [torch.tensor([[4.0, -3.0, 0.1, 0.2]]), torch.tensor([[2.0, 5.0, 0.1, -0.3]])]
    assert combined(deltas, [1.0, 1.0], "ties", 0.5, 0).tolist() == [[3.0, 5.0, 0.0, 0.0]]


def test_dare_draws_with_its_seed_and_leaves_other_draws_alone() -> None:
    deltas = [torch.ones(40, 50), torch.ones(40, 50)]
    torch.manual_seed(7)
    first = combined(deltas, [1.0, 1.0], "dare_linear", 0.25, 3)
    after = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(after, torch.rand(3))
    assert torch.equal(first, combined(deltas, [1.0, 1.0], "dare_linear", 0.25, 3))
    assert not torch.equal(first, combined(deltas, [1.0, 1.0], "dare_linear", 0.25, 4))
    assert set(first.unique().tolist()) == {0.0, 4.0, 8.0}  # kept by none, one or both, scaled up
    assert abs(float(first.mean()) - 2.0) < 0.2
