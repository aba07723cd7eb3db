"""How new rows start."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.model.initialise import METHODS, new_rows

ROWS, HIDDEN = 40, 6
OLD = torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(1)) + 3
PARTS = st.lists(st.lists(st.integers(0, ROWS - 1), max_size=5), min_size=1, max_size=12)


@settings(max_examples=50, deadline=None)
@given(PARTS)
def test_subword_mean_is_the_mean_of_the_parts(parts: list[list[int]]) -> None:
    rows = new_rows("subword-mean", OLD, parts)
    assert rows.dtype == torch.float32
    for row, ids in zip(rows, parts, strict=True):
        chosen = [OLD[i].double() for i in ids] or list(OLD.double())
        torch.testing.assert_close(row.double(), sum(chosen) / len(chosen), rtol=1e-6, atol=1e-6)


def test_the_mean_of_half_precision_rows_is_taken_in_float32() -> None:
    old = OLD.to(torch.bfloat16)
    [row] = new_rows("subword-mean", old, [[0, 1, 2]])
    torch.testing.assert_close(row.double(), old[:3].double().mean(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_arguments_give_the_same_rows(method: str) -> None:
    parts = [[1, 2], [], [3]]
    before = OLD.clone()
    torch.manual_seed(1)
    first = new_rows(method, OLD, parts)
    torch.manual_seed(2)
    assert torch.equal(first, new_rows(method, OLD, parts))
    assert first.shape == (3, HIDDEN)
    assert torch.equal(OLD, before)


def test_mean_resizing_is_the_mean_and_a_little_noise_of_the_covariance() -> None:
    old = OLD * torch.tensor([1.0, 1, 1, 1, 1, 100])
    rows = new_rows("mean-resizing", old, [[]] * 4000).double()
    noise = rows - old.double().mean(0)
    expected = 1e-9 * torch.cov(old.double().T, correction=0)
    # The noise is about 1e-5 beside a mean of 3 in float32, so only its order of size is checked.
    measured = (noise.T @ noise / len(noise))[5, 5]
    assert 0.8 * expected[5, 5] < measured < 1.2 * expected[5, 5]
    assert noise[:, :5].abs().max() < 1e-3
    assert len(torch.unique(rows, dim=0)) > 3900


def test_mean_resizing_of_equal_rows_gives_that_row() -> None:
    rows = new_rows("mean-resizing", torch.full((4, HIDDEN), 0.5), [[1], [2]])
    torch.testing.assert_close(rows, torch.full((2, HIDDEN), 0.5))


def test_random_rows_are_small_and_centred() -> None:
    rows = new_rows("random", OLD, [[]] * 4000)
    assert abs(float(rows.mean())) < 1e-3
    assert 0.019 < float(rows.std()) < 0.021
