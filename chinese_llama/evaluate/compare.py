"""Two models on the same documents: is one better, and is that more than chance? Pure arithmetic.

Documents, not tokens, are what a text set draws: those of one document are alike. So intervals come from a
bootstrap over documents (Efron & Tibshirani 1993, percentiles), of ratios of sums; between two models it is
paired, each resample takes the same documents of both (as Koehn 2004 does for translations). Percentiles of
few documents are too near each other; they are taken as far apart as t is from z (Hesterberg 2015, 5.3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from chinese_llama.errors import DoesNotFit

RESAMPLES = 2000
LEVEL = 0.95
LEAST = 6  # documents; of fewer, all agree by chance more than once in twenty times (sign test)
FEW = 20  # documents; with fewer an interval is narrower than it should be
BLOCK = 1 << 20  # numbers drawn at a time
MOST = 2048  # documents are drawn one by one; more are drawn in so many groups, made at random
EXACT = 1e-9  # a relative change below which two sums are the same: they are rounded
BETTER, WORSE, SAME = "better", "worse", "no difference shown"
ALONE, TOO_FEW = "one document shows nothing", f"fewer than {LEAST} documents show nothing"

# {"nats", "characters", "bytes"} of each document, in their order
Documents = Mapping[str, Sequence[float]]


def interval(documents: Documents, unit: str) -> list[float] | None:
    """[low, high] of the bits per `unit` ("characters", "bytes") of a model on a set; None for one document."""
    if len(documents["nats"]) < 2:
        return None
    nats, units = _resampled(documents["nats"], documents[unit])
    return _percentiles(nats / units / math.log(2), len(documents["nats"]))


def compare(documents: Documents, baseline: Documents) -> dict[str, Any]:
    """{"difference", "interval", "verdict"} of a model against another on the same documents.

    The difference is the relative change of the bits, less than 0 where the model needs fewer; it is the same
    per character and per byte. Fewer than LEAST documents show nothing, whatever the interval. Raises
    DoesNotFit if the documents are not the same, or the baseline needs no bits at all.
    """
    for unit in ("characters", "bytes"):
        if list(documents[unit]) != list(baseline[unit]):
            raise DoesNotFit("The two models were measured on different documents; measure both again.")
    if not math.fsum(baseline["nats"]) > 0:
        raise DoesNotFit("The baseline needs no bits for these documents; there is nothing to compare with.")
    difference = math.fsum(documents["nats"]) / math.fsum(baseline["nats"]) - 1
    if len(documents["nats"]) < 2:
        return {"difference": difference, "interval": None, "verdict": ALONE}
    mine, theirs = _resampled(documents["nats"], baseline["nats"])
    low, high = _percentiles(mine / theirs - 1, len(documents["nats"]))
    verdict = BETTER if high < 0 else WORSE if low > 0 else SAME
    if len(documents["nats"]) < LEAST:
        verdict = TOO_FEW
    return {"difference": difference, "interval": [low, high], "verdict": verdict}


def broken(comparison: Mapping[str, dict[str, Any]], limits: Mapping[str, float]) -> dict[str, str]:
    """The sets whose bits rose by a larger share than their limit, with a sentence each."""
    found = {}
    for name, limit in limits.items():
        told = comparison[name]
        if told["difference"] > limit + EXACT:
            interval = told["interval"]
            sure = f"95 % interval {interval[0]:+.2%} to {interval[1]:+.2%}" if interval else ALONE
            found[name] = (
                f"{name}: {told['difference']:+.2%} bits per byte ({sure}), over the limit of {limit:+.2%}."
            )
    return found


def _resampled(*columns: Sequence[float]) -> np.ndarray:
    """Sums over documents drawn with replacement, the same ones of each column: [columns, RESAMPLES]."""
    values, draw = np.asarray(columns, dtype=np.float64), np.random.default_rng(0)  # [columns, documents]
    if values.shape[1] > MOST:  # sums of such groups vary as those of documents do
        firsts = np.arange(MOST) * values.shape[1] // MOST
        values = np.add.reduceat(values[:, draw.permutation(values.shape[1])], firsts, axis=1)
    count = values.shape[1]
    rows = max(1, BLOCK // count)
    sums = []
    for start in range(0, RESAMPLES, rows):
        chosen = draw.integers(0, count, (min(rows, RESAMPLES - start), count))
        sums.append(np.stack([column[chosen].sum(1) for column in values]))
    return np.concatenate(sums, axis=1)


def _percentiles(values: np.ndarray, documents: int) -> list[float]:
    tail = 100 * _tail(documents)
    return [float(value) for value in np.percentile(values, [tail, 100 - tail])]


def _tail(documents: int) -> float:
    """The share of resamples that lies beyond each end: (1 - LEVEL) / 2 of many documents, less of few. Student's t
    is by its series around the normal quantile (Abramowitz & Stegun 26.7.5)."""
    normal, free = NormalDist(), documents - 1
    z = normal.inv_cdf((1 + LEVEL) / 2)
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return normal.cdf(-t * math.sqrt(documents / free))
