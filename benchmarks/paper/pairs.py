"""Paired comparisons: the same seed with other factors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats  # type: ignore[import-untyped]

LEVEL, POWER = 0.95, 0.8
_CHANGED = ("alpha", "start", "seed")


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its t-interval; nan where there are too few seeds.

    Attributes:
        count: seeds.
        mean: of the values.
        half: half the width of the 95 % interval.
        detectable: the smallest true mean that as many seeds, with this spread, tell from 0 in
            80 % of all experiments (two-sided t-test at 5 %).
    """

    count: int
    mean: float
    half: float
    detectable: float


def mean_of(values: Sequence[float]) -> Mean:
    """Mean, interval and detectable size of values, one per seed."""
    count = len(values)
    if count < 2:
        return Mean(count, float(np.mean(values)) if count else math.nan, math.nan, math.nan)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    return Mean(count, float(np.mean(values)), half, _detectable(count) * error)


def _detectable(count: int) -> float:
    """Detectable mean in standard errors."""
    free = count - 1
    critical = stats.t.ppf((1 + LEVEL) / 2, free)

    def lack(effect: float) -> float:
        # The other tail's share is below 1e-4 where the power is anywhere near 80 %.
        return float(stats.nct.sf(critical, free, effect)) - POWER

    return float(optimize.brentq(lack, 0.1, 2 * critical + 2))


@dataclass(frozen=True)
class Variant:
    """The runs of a setting that differ in nothing but their seed.

    Attributes:
        alpha: as configured.
        start: factors whose function the first weights compute; empty: its own.
        runs: records by seed, without those that diverged.
        diverged: how many did.
    """

    alpha: str
    start: str
    runs: Mapping[int, dict[str, Any]]
    diverged: int

    @property
    def is_baseline(self) -> bool:
        """Whether it is the plain pyramid."""
        return (self.alpha, self.start) == ("1", "")

    @property
    def name(self) -> str:
        """What tables call it."""
        known = {
            "1": "baseline (1)",
            "s-alpha": "S-alpha",
            "one": "one-alpha",
            "three": "three-alpha",
            "attention": "atten-alpha",
        }
        name = known.get(self.alpha, self.alpha)
        return f"{name}, starting as {known.get(self.start, self.start)}" if self.start else name

    @property
    def factors(self) -> list[float]:
        """The factors at the end of training, finest edge first, in the mean over seeds."""
        found = [run["alpha"] for run in self.runs.values()]
        return [float(value) for value in np.mean(found, axis=0)] if found else []

    @property
    def constant(self) -> float | None:
        """The number that all edges have, where it was given as one."""
        try:
            return None if self.start else float(self.alpha)
        except ValueError:
            return None

    def values(self, figure: str) -> list[float]:
        """A figure of each run, in percent."""
        return [100 * run["figures"][figure] for run in self.runs.values()]

    def against(self, other: Variant, figure: str) -> dict[int, float]:
        """By seed, how much better it is than another, in percent points."""
        return {
            seed: 100 * (run["figures"][figure] - other.runs[seed]["figures"][figure])
            for seed, run in self.runs.items()
            if seed in other.runs
        }


@dataclass(frozen=True)
class Setting:
    """All runs that differ in nothing but factors, initialisation of the pyramid and seed."""

    config: dict[str, Any]
    variants: list[Variant]
    runs: list[dict[str, Any]]

    @property
    def baseline(self) -> Variant | None:
        """The plain pyramid, if it was run."""
        return next((variant for variant in self.variants if variant.is_baseline), None)


def settings(records: Sequence[dict[str, Any]]) -> list[Setting]:
    """Records by setting; baseline first in each, then S-alpha, constants and the rest."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        common = {k: v for k, v in record["config"].items() if k not in _CHANGED}
        found.setdefault(repr(sorted(common.items())), []).append(record)
    result = []
    for runs in found.values():
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for run in runs:
            config = run["config"]
            groups.setdefault((config["alpha"], config["start"]), []).append(run)
        variants = []
        for (alpha, start), group in groups.items():
            good = {run["config"]["seed"]: run for run in group if run["diverged_at"] is None}
            variants.append(
                Variant(alpha, start, dict(sorted(good.items())), len(group) - len(good))
            )
        variants.sort(key=_order)
        common = {k: v for k, v in runs[0]["config"].items() if k not in _CHANGED}
        result.append(Setting(common, variants, runs))
    return sorted(result, key=lambda setting: -len(setting.runs))


def _order(variant: Variant) -> tuple[bool, bool, bool, float, str]:
    number = variant.constant
    return (
        not variant.is_baseline,
        variant.alpha != "s-alpha",
        number is None,
        number or 0.0,
        variant.name,
    )
