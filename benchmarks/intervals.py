"""Means over seeds, how certain they are, and rank correlations."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats  # type: ignore[import-untyped]

LEVEL, POWER = 0.95, 0.8
_RESAMPLES = 2000


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its t-interval; the last two are nan with fewer than two seeds."""

    count: int
    mean: float
    half: float  # half the width of the 95 % interval
    detectable: float  # smallest true mean that as many seeds tell from 0 in 80 % of experiments

    def __str__(self) -> str:
        return self.text(sign="+")

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half

    def text(self, digits: int = 1, sign: str = "") -> str:
        """The mean and its interval as tables show them; empty without values."""
        if not self.count:
            return ""
        half = "" if math.isnan(self.half) else f" ± {self.half:.{digits}f}"
        return f"{self.mean:{sign}.{digits}f}{half}"


def mean_of(values: Sequence[float]) -> Mean:
    """Mean, interval and detectable size of values, one per seed."""
    count = len(values)
    if count < 2:
        return Mean(count, float(np.mean(values)) if count else math.nan, math.nan, math.nan)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    half = _critical(count - 1) * error
    return Mean(count, float(np.mean(values)), half, _detectable(count) * error)


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> list[float]:
    """Differences of the seeds that both have."""
    return [value - others[seed] for seed, value in sorted(values.items()) if seed in others]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation; nan if either holds one value only."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return math.nan
    return float(stats.spearmanr(first, second).statistic)


def resampled(statistic: Callable[[Sequence[int]], float], count: int) -> tuple[float, float]:
    """95 % interval of a statistic of `count` things, given the indices of resampled ones."""
    rng = np.random.default_rng(0)
    values = [statistic(rng.integers(0, count, count).tolist()) for _ in range(_RESAMPLES)]
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return math.nan, math.nan
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


@functools.cache
def _critical(free: int) -> float:
    return float(stats.t.ppf((1 + LEVEL) / 2, free))


@functools.cache
def _detectable(count: int) -> float:
    """The detectable mean in standard errors."""
    free = count - 1
    critical = _critical(free)

    def lack(effect: float) -> float:
        # The share of the other tail is below 1e-4 if the power is anywhere near 80 %.
        return float(stats.nct.sf(critical, free, effect)) - POWER

    return float(optimize.brentq(lack, 0.1, 2 * critical + 2))
