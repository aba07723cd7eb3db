"""Shares and win rates with intervals of 95 %."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

Z = NormalDist().inv_cdf(0.975)
RESAMPLES = 10_000


def wilson(successes: int, trials: int) -> list[float]:
    """[low, high] of the share of successes: Wilson's score interval (J. Amer. Statist. Assoc. 22, 1927), which
    keeps its level for few trials and for shares near 0 and 1 (Brown, Cai and DasGupta, Statist. Sci. 16, 2001).
    [0, 1] where nothing was tried.
    """
    if not trials:
        return [0.0, 1.0]
    share, z2 = successes / trials, Z * Z / trials
    middle = (share + z2 / 2) / (1 + z2)
    half = Z * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials)) / (1 + z2)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def win_rate(wins: int, losses: int, ties: int) -> dict[str, Any]:
    """{"prompts", "wins", "losses", "ties", "rate", "interval": [low, high]}; a tie counts half a win. No prompts:
    0.5 in [0, 1].

    (1 + d) / 2 with d = (wins - losses) / prompts, the difference of matched proportions; its interval is that of
    Agresti and Min (Statist. Med. 24, 2005): Wald's after half a prompt is added to each of the four cells, two of
    which are the ties. So it has a width where all prompts are won, or tied, unlike a bootstrap's.
    """
    count = wins + losses + ties
    rate = (wins + ties / 2) / count if count else 0.5
    more, discordant = count + 2, wins + losses + 1
    middle = (wins - losses) / more
    half = Z * math.sqrt(discordant - (wins - losses) ** 2 / more) / more
    low, high = (1 + middle - half) / 2, (1 + middle + half) / 2
    interval = [max(0.0, low), min(1.0, high)] if count else [0.0, 1.0]
    return {
        "prompts": count, "wins": wins, "losses": losses, "ties": ties, "rate": rate, "interval": interval
    }  # fmt: skip


def mean(values: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """{"prompts", "mean", "interval": [low, high]} of one value a prompt: the percentile bootstrap over prompts
    (Efron and Tibshirani, An Introduction to the Bootstrap, 1993). The interval is None for fewer than two."""
    import numpy as np

    found = np.asarray(values, np.float64)
    interval = None
    if len(found) > 1:
        generator = np.random.default_rng(seed)
        means = [generator.choice(found, len(found)).mean() for _ in range(RESAMPLES)]
        interval = [float(bound) for bound in np.quantile(means, (0.025, 0.975))]
    return {"prompts": len(found), "mean": float(found.mean()), "interval": interval}


def told(rate: dict[str, Any], names: dict[str, str]) -> str:
    """Two lines on a `win_rate` of the first of the two models in `names` ({label: name}) over the second."""
    first, second = (f"{label} ({name})" for label, name in names.items())
    one, other = names
    low, high = rate["interval"]
    return (
        f"{first} better: {rate['wins']}, {second} better: {rate['losses']}, ties: {rate['ties']}.\n"
        f"Win rate of {one} over {other}, ties half: {rate['rate']:.1%} (95 %: {low:.1%} to {high:.1%})."
    )
