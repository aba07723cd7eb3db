"""How new rows start."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.model import initialise
from chinese_llama.model.initialise import METHODS, NOISE, NOISY, PUSH, SEED, Side, new_rows

ROWS, HIDDEN = 40, 6
OLD = torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(1)) + 3
PARTS = st.lists(st.lists(st.integers(0, ROWS - 1), max_size=5), min_size=1, max_size=12)


SIDES = ("input", "output", "tied")


@settings(max_examples=50, deadline=None)
@given(PARTS, st.sampled_from(SIDES))
def test_subword_mean_is_the_mean_of_the_parts(parts: list[list[int]], side: Side) -> None:
    rows = new_rows("subword-mean", OLD, parts, side)
    assert rows.dtype == torch.float32
    for row, ids in zip(rows, parts, strict=True):
        chosen = [OLD[i].double() for i in ids] or list(OLD.double())
        torch.testing.assert_close(row.double(), sum(chosen) / len(chosen), rtol=1e-6, atol=1e-6)


def test_the_mean_of_half_precision_rows_is_taken_in_float32() -> None:
    old = OLD.to(torch.bfloat16)
    [row] = new_rows("subword-mean", old, [[0, 1, 2]], "input")
    torch.testing.assert_close(row.double(), old[:3].double().mean(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("method", METHODS)
def test_the_same_arguments_give_the_same_rows(method: str, side: Side) -> None:
    parts = [[1, 2], [], [3]]
    before = OLD.clone()
    torch.manual_seed(1)
    first = new_rows(method, OLD, parts, side)
    torch.manual_seed(2)
    assert torch.equal(first, new_rows(method, OLD, parts, side))
    assert first.shape == (3, HIDDEN)
    assert torch.equal(OLD, before)


def test_mean_resizing_is_the_mean_and_a_little_noise_of_the_covariance() -> None:
    old = OLD * torch.tensor([1.0, 1, 1, 1, 1, 100])
    rows = new_rows("mean-resizing", old, [[]] * 4000, "input").double()
    noise = rows - old.double().mean(0)
    expected = 1e-9 * torch.cov(old.double().T, correction=0)
    # The noise is about 1e-5 beside a mean of 3 in float32, so only its order of size is checked.
    measured = (noise.T @ noise / len(noise))[5, 5]
    assert 0.8 * expected[5, 5] < measured < 1.2 * expected[5, 5]
    assert noise[:, :5].abs().max() < 1e-3
    assert len(torch.unique(rows, dim=0)) > 3900


def test_mean_resizing_of_equal_rows_gives_that_row() -> None:
    rows = new_rows("mean-resizing", torch.full((4, HIDDEN), 0.5), [[1], [2]], "output")
    torch.testing.assert_close(rows, torch.full((2, HIDDEN), 0.5))


def test_random_rows_are_small_and_centred() -> None:
    rows = new_rows("random", OLD, [[]] * 4000, "output")
    assert abs(float(rows.mean())) < 1e-3
    assert 0.019 < float(rows.std()) < 0.021


def repeats(ids: list[int]) -> bool:
    """Such a piece's row has noise."""
    return len(ids) > 1 and len(set(ids)) == 1


@settings(max_examples=50, deadline=None)
@given(PARTS)
def test_asymmetric_input_rows_lean_to_the_last_part_and_have_the_median_norm(
    parts: list[list[int]],
) -> None:
    rows = new_rows("asymmetric", OLD, parts, "input").double()
    assert torch.equal(rows, new_rows("asymmetric", OLD, parts, "tied").double())
    norm = OLD.norm(dim=1).median().double()
    for row, ids in zip(rows, parts, strict=True):
        if repeats(ids):
            continue
        row_of_parts = (
            sum((k + 1) * OLD[i].double() for k, i in enumerate(ids)) if ids else OLD.double().mean(0)
        )
        torch.testing.assert_close(row, row_of_parts / row_of_parts.norm() * norm, rtol=1e-4, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(PARTS)
def test_asymmetric_output_rows_lean_to_the_first_part_and_are_pushed_alike(parts: list[list[int]]) -> None:
    rows = new_rows("asymmetric", OLD, parts, "output").double()
    mean = OLD.double().mean(0)
    composed = []
    for ids in parts:
        weights = range(len(ids), 0, -1)
        weighted = (w * OLD[i].double() for w, i in zip(weights, ids, strict=True))
        composed.append(sum(weighted) / sum(weights) if ids else mean)
    with_parts = [row for row, ids in zip(composed, parts, strict=True) if ids]
    push = PUSH * (torch.stack(with_parts).mean(0) - mean) if with_parts else 0.0
    plain = torch.tensor([not repeats(ids) for ids in parts])
    torch.testing.assert_close(rows[plain], (torch.stack(composed) + push)[plain], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", SIDES)
def test_asymmetric_rows_tell_repetitions_apart(side: Side) -> None:
    """哈, 哈哈 and 哈哈哈: means of one row, however weighted."""
    rows = new_rows("asymmetric", OLD, [[5], [5, 5], [5, 5, 5], [6, 6]], side)
    assert len(torch.unique(rows.to(torch.bfloat16), dim=0)) == 4
    assert torch.nn.functional.cosine_similarity(rows[0], rows[1], dim=0) > 0.8


@pytest.mark.parametrize("width", [16, 40])
def test_the_noise_is_that_of_a_whole_matrix(width: int) -> None:
    """Made a few rows at a time, it has the bits that it has when it is made at once."""
    old, count = torch.randn(12, width, generator=torch.Generator().manual_seed(1)), 2 * NOISY + 5
    parts = [[index % 12] * (1 + index % 3) for index in range(count)]
    noise = torch.randn(count, width, generator=torch.Generator().manual_seed(SEED)) * (NOISE * old.std())
    alike = torch.tensor([len(ids) > 1 for ids in parts])
    quiet = initialise._weighted(old, parts, lambda n: [1.0] * n)
    found = initialise._told_apart(quiet.clone(), old, parts)
    assert torch.equal(found, torch.where(alike[:, None], quiet + noise, quiet))


@pytest.mark.parametrize("side", SIDES)
def test_asymmetric_rows_tell_the_order_of_parts(side: Side) -> None:
    """The same bag of pieces, as of 中国 and 国中, or of bytes, in another order."""
    parts = [[1, 2], [2, 1], [7, 8, 9], [9, 8, 7], [8, 7, 9], [7, 8, 9, 7]]
    rows = new_rows("asymmetric", OLD, parts, side).to(torch.bfloat16)
    assert len(torch.unique(rows, dim=0)) == len(parts)
    assert len(torch.unique(new_rows("subword-mean", OLD, parts, side).to(torch.bfloat16), dim=0)) == 3


@settings(max_examples=30, deadline=None)
@given(PARTS, st.sampled_from(SIDES), st.sampled_from([2.0**-10, 2.0**7]))
def test_asymmetric_rows_scale_with_the_matrix(parts: list[list[int]], side: Side, scale: float) -> None:
    rows = new_rows("asymmetric", OLD, parts, side)
    scaled = new_rows("asymmetric", OLD * scale, parts, side)
    torch.testing.assert_close(scaled, rows * scale, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("old", [torch.zeros(5, HIDDEN), torch.ones(5, HIDDEN)], ids=["zero", "equal"])
@pytest.mark.parametrize("side", SIDES)
def test_asymmetric_rows_of_degenerate_matrices_are_finite(old: torch.Tensor, side: Side) -> None:
    rows = new_rows("asymmetric", old, [[0, 1], [], [2]], side)
    torch.testing.assert_close(rows, old[:3])
    torch.testing.assert_close(new_rows("asymmetric", old, [[], []], side), old[:2])


def test_the_push_takes_probability_from_new_pieces_where_the_base_had_other_ones_in_mind() -> None:
    """Old pieces 0 to 29 are likely in a context, 30 to 39 are not, and the new ones are made of the latter."""
    generator = torch.Generator().manual_seed(3)
    context = torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
    old = torch.randn(40, 64, generator=generator) * 0.1
    old += context * torch.where(torch.arange(40) < 30, 8.0, 5.0)[:, None]
    parts = [[30 + i % 10, 30 + i // 10] for i in range(100)]

    def share(method: str) -> float:
        rows = new_rows(method, old, parts, "output")
        return float(torch.softmax(torch.cat([old, rows]) @ context, 0)[40:].sum())

    assert share("asymmetric") < 0.01 < 0.1 < share("subword-mean")
