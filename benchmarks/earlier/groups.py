"""The 2,200 runs with fixed factors, by data set and regime."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.intervals import paired, rank_correlation
from benchmarks.records import Record, by_seed

BASELINE, ESTIMATED = "1", "S-alpha"
FIRST, RATES = "1 from S-alpha", "S-alpha from 1"
# Train with 1 first. If the forward share fell meanwhile, train again with .5.
LOOK = "look first"
# Seeds from this one on confirm the drift: the idea came after the earlier ones were seen.
CONFIRMING = 3
FEWEST = 3  # seeds that a group needs to be shown
# How the names of the data sets begin, and what tables call these data sets.
FAMILIES = {
    "near": "drawn, near",
    "far": "drawn, far",
    "cells": "blood cells",
    "people": "TinyPerson",
}
_REGIME = ("weights", "optimizer", "rate", "steps", "data")
_RESAMPLES = 2000


@dataclass(frozen=True)
class Group:
    """The runs of one data set under one regime."""

    weights: str  # what the backbone starts from
    optimizer: str
    rate: float  # the highest
    steps: int
    data: str
    runs: Mapping[str, Mapping[int, Record]]  # by kind of factors and seed

    @property
    def family(self) -> str:
        """The kind of data: a key of `FAMILIES`."""
        return self.data.split()[0]

    @property
    def regime(self) -> str:
        """How it was trained."""
        return f"{self.weights}, {self.optimizer}, {self.rate:g}, {self.steps}"

    @property
    def measure(self) -> str:
        """The figure that is compared. Few of the blood cells are tiny, so all of them count."""
        return "AP50_all" if self.family == "cells" else "AP50_tiny"

    def values(self, kind: str) -> dict[int, float]:
        """The measure in percent, by seed. A run that diverged has found nothing."""
        if kind == LOOK:
            stay, change, drifts = self.values(BASELINE), self.values("0.5"), self.drifts
            seeds = [seed for seed in stay if seed in change and seed in drifts]
            return {seed: (change if drifts[seed] < 0 else stay)[seed] for seed in seeds}
        return {
            seed: 100 * (run["figures"] or {self.measure: 0.0})[self.measure]
            for seed, run in sorted(self.runs.get(kind, {}).items())
        }

    def against(self, kind: str, other: str = BASELINE) -> list[float]:
        """Differences between two kinds, of the seeds that both have."""
        return paired(self.values(kind), self.values(other))

    @property
    def shown(self) -> bool:
        """Whether there are enough seeds."""
        return len(self.values(BASELINE)) >= FEWEST

    @functools.cached_property
    def constants(self) -> list[float]:
        """The constant factors that were run, ascending."""
        return sorted(float(kind) for kind in self.runs if _is_number(kind))

    @functools.cached_property
    def _seeds(self) -> list[int]:
        values = [self.values(f"{constant:g}") for constant in self.constants]
        return sorted(set.intersection(*map(set, values))) if values else []

    @functools.cached_property
    def table(self) -> NDArray[np.float64]:
        """The measure [constants, seeds], for the seeds that all constants have."""
        values = [self.values(f"{constant:g}") for constant in self.constants]
        return np.array([[row[seed] for seed in self._seeds] for row in values])

    @property
    def peak(self) -> float:
        """The constant that is best on average over seeds."""
        return self.constants[int(self.table.mean(1).argmax())]

    def regret(self, kind: str) -> float:
        """How far a kind is below the best constant, which is chosen on the other seeds."""
        values, losses = self.values(kind), []
        for column, seed in enumerate(self._seeds):
            if seed in values:
                others = np.delete(self.table, column, axis=1).mean(1)
                losses.append(self.table[int(others.argmax()), column] - values[seed])
        return float(np.mean(losses))

    @property
    def s_alpha(self) -> list[float]:
        """S-alpha averaged over seeds, finest edge first."""
        runs = self.runs[BASELINE].values()
        return [float(v) for v in np.mean([run["s_alpha"] for run in runs], axis=0)]

    @property
    def first_shares(self) -> list[float]:
        """Forward shares at the start with factors of 1, finest edge first."""
        runs = [run for run in self.runs[BASELINE].values() if run["figures"]]
        return [float(v) for v in np.mean([run["shares"][0]["forward"] for run in runs], axis=0)]

    @property
    def drifts(self) -> dict[int, float]:
        """By seed: how much the forward share rises while factors of 1 are trained."""
        return {
            seed: float(
                np.subtract(run["shares"][-1]["forward"], run["shares"][0]["forward"]).mean()
            )
            for seed, run in self.runs[BASELINE].items()
            if run["figures"]
        }


def groups(records: Sequence[Record]) -> list[Group]:
    """Records by regime and data set, in the order in which they were first run."""
    found: dict[tuple[Any, ...], dict[str, dict[int, Record]]] = defaultdict(dict)
    names = ("alpha", "start", "laterals")
    for (*regime, alpha, start, laterals), runs in by_seed(records, *_REGIME, *names).items():
        kind = alpha + f" from {start}" * bool(start) + ", equal laterals" * bool(laterals)
        found[tuple(regime)][kind] = runs
    return [Group(*key, runs) for key, runs in found.items() if BASELINE in runs]


def follow(found: Sequence[Group], predictor: Sequence[float]) -> tuple[float, float, float]:
    """Rank correlation of the best constants with a predictor, low and high.

    The 95 % interval is over resampled data sets and seeds.
    """
    rng = np.random.default_rng(0)
    values = []
    for _ in range(_RESAMPLES):
        rows = rng.integers(0, len(found), len(found))
        peaks = [_resampled_peak(found[row], rng) for row in rows]
        value = rank_correlation(peaks, [predictor[row] for row in rows])
        if not math.isnan(value):
            values.append(value)
    low, high = np.percentile(values, [2.5, 97.5]) if values else (math.nan, math.nan)
    return rank_correlation([g.peak for g in found], predictor), float(low), float(high)


def _resampled_peak(group: Group, rng: np.random.Generator) -> float:
    columns = rng.integers(0, group.table.shape[1], group.table.shape[1])
    return group.constants[int(group.table[:, columns].mean(1).argmax())]


def _is_number(kind: str) -> bool:
    try:
        float(kind)
    except ValueError:
        return False
    return True
