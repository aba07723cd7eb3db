"""Intervals: published values, the level they promise, and what turning the sides round must do."""

from __future__ import annotations

from math import comb, factorial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chinese_llama.evaluate.wins import mean, told, wilson, win_rate

COUNT = st.integers(0, 300)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # Newcombe, Statist. Med. 17, 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_is_what_newcombe_prints(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == pytest.approx([low, high], abs=5e-5)


@given(a=COUNT, b=COUNT)
def test_wilson_holds_the_share_and_turns_round(a: int, b: int) -> None:
    low, high = wilson(a, a + b)
    assert 0 <= low < high <= 1
    if a + b:
        assert low - 1e-12 <= a / (a + b) <= high + 1e-12
    assert wilson(b, a + b) == pytest.approx([1 - high, 1 - low])


def test_wilson_keeps_its_level() -> None:
    """On average over shares, as Brown, Cai and DasGupta measure it."""
    for trials in (5, 20, 60):
        bounds = [wilson(successes, trials) for successes in range(trials + 1)]
        levels = [
            sum(
                comb(trials, s) * p**s * (1 - p) ** (trials - s)
                for s, (low, high) in enumerate(bounds)
                if low <= p <= high
            )
            for p in np.linspace(0.01, 0.99, 99)
        ]
        assert 0.94 < float(np.mean(levels)) < 0.97


@given(wins=COUNT, losses=COUNT, ties=COUNT)
def test_a_win_rate_turns_round_with_the_sides(wins: int, losses: int, ties: int) -> None:
    one, other = win_rate(wins, losses, ties), win_rate(losses, wins, ties)
    assert one["rate"] == pytest.approx(1 - other["rate"])
    low, high = one["interval"]
    assert other["interval"] == pytest.approx([1 - high, 1 - low])
    assert 0 <= low < high <= 1
    assert low - 1e-9 <= one["rate"] <= high + 1e-9
    assert one["prompts"] == wins + losses + ties


def test_ties_count_half_and_make_it_narrower() -> None:
    few, many = win_rate(6, 4, 0), win_rate(6, 4, 90)
    assert few["rate"] == 0.6 and many["rate"] == 0.51
    width = [high - low for low, high in (few["interval"], many["interval"])]
    assert width[1] < width[0] / 5
    assert win_rate(0, 0, 0)["interval"] == [0.0, 1.0]


def test_the_win_rate_keeps_its_level() -> None:
    """Exactly: over all outcomes of n prompts. Wald's, and a bootstrap's, is far below for few prompts."""
    n = 20
    for p_win, p_loss in ((0.2, 0.2), (0.5, 0.1), (0.8, 0.1), (0.05, 0.05), (0.9, 0.05)):
        rate, level = (1 + p_win - p_loss) / 2, 0.0
        for wins in range(n + 1):
            for losses in range(n + 1 - wins):
                ties = n - wins - losses
                low, high = win_rate(wins, losses, ties)["interval"]
                ways = factorial(n) // (factorial(wins) * factorial(losses) * factorial(ties))
                if low <= rate <= high:
                    level += ways * p_win**wins * p_loss**losses * (1 - p_win - p_loss) ** ties
        assert level > 0.93, (p_win, p_loss, level)


def test_the_mean_and_its_bootstrap() -> None:
    values = np.random.default_rng(1).integers(1, 11, 200).astype(float)
    found = mean(list(values))
    half = 1.96 * values.std(ddof=1) / np.sqrt(200)
    assert found["mean"] == values.mean() and found["prompts"] == 200
    assert found["interval"] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.05)
    assert mean(list(values)) == found, "seeded"
    assert mean([7.0]) == {"prompts": 1, "mean": 7.0, "interval": None}


def test_it_is_told_who_won() -> None:
    text = told(win_rate(7, 2, 1), {"A": "work/merged", "B": "work/control"})
    assert "A (work/merged) better: 7, B (work/control) better: 2, ties: 1." in text
    assert "Win rate of A over B, ties half: 75.0% (95 %: " in text
