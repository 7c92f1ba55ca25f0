"""Means and rank correlations over seeds, with their 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

LEVEL = 0.95
_RESAMPLES = 2000


@dataclass(frozen=True)
class Mean:
    """A mean with its t-interval.

    Attributes:
        count: Values.
        mean: Of them; nan if there are none.
        half: Half the width of the interval; nan if there are fewer than two.
    """

    count: int
    mean: float
    half: float

    def __str__(self) -> str:
        half = "" if math.isnan(self.half) else f" ± {self.half:.1f}"
        return f"{self.mean:+.1f}{half}" if self.count else ""

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and interval of values that are independent, such as one for each seed."""
    count = len(values)
    if count < 2:
        return Mean(count, float(values[0]) if count else math.nan, math.nan)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    return Mean(count, float(np.mean(values)), half)


def paired(found: Mapping[int, float], others: Mapping[int, float]) -> list[float]:
    """Differences of the seeds that both have."""
    return [value - others[seed] for seed, value in sorted(found.items()) if seed in others]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's; nan where all values of one side are the same."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return math.nan
    return float(stats.spearmanr(first, second).statistic)


def resampled(
    statistic: Callable[[Sequence[int]], float], count: int, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of a statistic of `count` things, over samples of them drawn again.

    Args:
        statistic: Takes the indices of a sample.
        count: How many things there are.
        seed: Of the draws.
    """
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(0, count, count).tolist()) for _ in range(_RESAMPLES)]
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return math.nan, math.nan
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
