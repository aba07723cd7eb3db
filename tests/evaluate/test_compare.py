"""Intervals by bootstrap over documents: they hold what they promise, and pairs are compared as pairs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chinese_llama.errors import DoesNotFit
from chinese_llama.evaluate import compare as module
from chinese_llama.evaluate.compare import ALONE, BETTER, SAME, TOO_FEW, WORSE, broken, compare, interval

SIZES = st.lists(st.integers(1, 400), min_size=2, max_size=30)


def drawn(sizes: list[int], rate: float = 2.0, noise: float = 0.3, seed: int = 0) -> dict[str, Any]:
    """Documents of so many characters, of about `rate` nats each."""
    draw = np.random.default_rng(seed)
    nats = [size * rate * math.exp(noise * draw.standard_normal()) for size in sizes]
    return {"nats": nats, "characters": sizes, "bytes": [3 * size for size in sizes]}


def times(documents: dict[str, Any], factor: float) -> dict[str, Any]:
    return documents | {"nats": [factor * value for value in documents["nats"]]}


@settings(max_examples=30, deadline=None)
@given(SIZES, st.floats(0.5, 2))
def test_documents_that_all_change_alike_leave_no_doubt(sizes: list[int], factor: float) -> None:
    """Paired: whatever documents are drawn, the change is the same."""
    first = drawn(sizes)
    told = compare(times(first, factor), first)
    assert told["difference"] == pytest.approx(factor - 1)
    assert told["interval"] == pytest.approx([factor - 1] * 2)
    if len(sizes) < 6:  # 2 / 2 ** 5 > 0.05 > 2 / 2 ** 6
        assert told["verdict"] == TOO_FEW
    elif abs(factor - 1) > 1e-6:
        assert told["verdict"] == (BETTER if factor < 1 else WORSE)


def test_a_model_against_itself_shows_nothing() -> None:
    first = drawn([100] * 30)
    assert compare(first, first) == {"difference": 0.0, "interval": [0.0, 0.0], "verdict": SAME}


def test_noise_shows_no_difference() -> None:
    told = compare(drawn([100] * 40, seed=1), drawn([100] * 40, seed=2))
    assert told["interval"][0] < 0 < told["interval"][1]
    assert told["verdict"] == SAME


@settings(max_examples=20, deadline=None)
@given(SIZES)
def test_an_interval_holds_the_figure_and_scales_with_the_unit(sizes: list[int]) -> None:
    told = drawn(sizes)
    low, high = interval(told, "characters") or [0.0, 0.0]
    ratios = [n / c / math.log(2) for n, c in zip(told["nats"], told["characters"], strict=True)]
    assert min(ratios) - 1e-9 <= low <= high <= max(ratios) + 1e-9
    assert [3 * value for value in interval(told, "bytes") or []] == pytest.approx([low, high])


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """200 samples of 60 documents from one distribution: of 95 % intervals, some 90 to 99 % hold its mean."""
    truth = 2.0 * math.exp(0.3**2 / 2) / math.log(2)
    draw = np.random.default_rng(5)
    held = 0
    for seed in range(200):
        low, high = interval(drawn(draw.integers(50, 400, 60).tolist(), seed=seed), "characters") or [
            0.0,
            0.0,
        ]
        held += low <= truth <= high
    assert 180 <= held <= 198


def test_large_documents_weigh_more() -> None:
    """Bits per character are of the whole set, not a mean over documents."""
    sizes = [10_000, *[10] * 50]
    told = drawn(sizes, noise=0) | {"nats": [10_000.0, *[40.0] * 50]}
    low, high = interval(told, "characters") or [0.0, 0.0]
    assert low < sum(told["nats"]) / sum(sizes) / math.log(2) < high
    assert high > 2 * low  # whether the large one is drawn decides


def test_few_draws_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    told = drawn([100] * 50)
    whole = interval(told, "characters")
    monkeypatch.setattr(module, "BLOCK", 60)
    assert interval(told, "characters") == pytest.approx(whole)
    assert module._resampled(told["nats"]).shape == (1, module.RESAMPLES)


def test_many_documents_are_drawn_in_groups_and_vary_as_much() -> None:
    """Against the standard error of a ratio of sums (delta method)."""
    many = drawn(np.random.default_rng(3).integers(50, 400, 10 * module.MOST + 7).tolist())
    nats, size = np.array(many["nats"]), np.array(many["characters"])
    rate = nats.sum() / size.sum()
    error = 1.96 * math.sqrt(((nats - rate * size) ** 2).sum()) / size.sum()
    low, high = interval(many, "characters") or [0.0, 0.0]
    assert [low, high] == pytest.approx(
        [(rate - error) / math.log(2), (rate + error) / math.log(2)], rel=5e-4
    )
    assert (high - low) * math.log(2) / 2 == pytest.approx(error, rel=0.08)
    assert compare(times(many, 1.5), many)["interval"] == pytest.approx([0.5, 0.5])
    assert interval(many, "characters") == [low, high]


@pytest.mark.parametrize(("documents", "least"), [(6, 0.88), (10, 0.88), (20, 0.89)])
def test_intervals_of_few_documents_hold_the_truth_too(documents: int, least: float) -> None:
    """Plain percentiles would in 81 to 88 of 100 cases."""
    draw = np.random.default_rng(7)
    truth, held, samples = 2.0 * math.exp(0.3**2 / 2) / math.log(2), 0, 300
    for seed in range(samples):
        low, high = interval(drawn(draw.integers(50, 400, documents).tolist(), seed=seed), "bytes") or [
            0.0,
            0.0,
        ]
        held += low <= truth / 3 <= high
    assert least <= held / samples <= 0.99


def test_a_baseline_without_bits_is_refused() -> None:
    with pytest.raises(DoesNotFit, match=r"^The baseline needs no bits for these documents; .*\.$"):
        compare(drawn([10, 10]), drawn([10, 10]) | {"nats": [0.0, 0.0]})


def test_one_document_shows_nothing() -> None:
    one = drawn([100])
    assert interval(one, "characters") is None
    assert compare(times(one, 0.5), one) == {"difference": -0.5, "interval": None, "verdict": ALONE}


@pytest.mark.parametrize("unit", ["characters", "bytes"])
def test_other_documents_are_refused(unit: str) -> None:
    first = drawn([100, 50])
    for other in ([50, 100], [100], [100, 50, 50]):
        with pytest.raises(DoesNotFit, match="different documents"):
            compare(first | {unit: other}, first)


def test_a_limit_is_for_the_point_estimate() -> None:
    told: dict[str, Any] = {
        "en": {"difference": 0.03, "interval": [-0.01, 0.07], "verdict": SAME},
        "zh": {"difference": -0.5, "interval": None, "verdict": ALONE},
    }
    found = broken(told, {"en": 0.02, "zh": 0.0})
    assert list(found) == ["en"]
    assert (
        found["en"] == "en: +3.00% bits per byte (95 % interval -1.00% to +7.00%), over the limit of +2.00%."
    )
    assert broken(told, {"en": 0.03}) == {}
    rounded = compare(
        {"nats": [1.02], "characters": [1], "bytes": [1]}, {"nats": [1.0], "characters": [1], "bytes": [1]}
    )
    assert rounded["difference"] > 0.02 and broken({"en": rounded}, {"en": 0.02}) == {}
    assert list(broken({"en": rounded}, {"en": 0.0199999})) == ["en"]
    assert ALONE in broken({"zh": told["zh"] | {"difference": 1.0}}, {"zh": 0.5})["zh"]
