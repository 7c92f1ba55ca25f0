"""What the records say: gains of each step, what reach predicts, and what factors add."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.adapting.experiment import (
    ADAPTED,
    ESTIMATED,
    FIRST,
    HALF,
    LARGER,
    LEARNABLE,
    NONE,
    SCALE,
    STOCK,
)
from benchmarks.intervals import Mean, mean_of, paired, rank_correlation, resampled
from benchmarks.records import Record

MEASURE = "AP50_all"
FITS = (STOCK, SCALE, ADAPTED, LARGER)
NAMES = {
    STOCK: "stock",
    SCALE: "best anchors",
    ADAPTED: "anchors and finer level",
    LARGER: "larger input",
    HALF: "factors of .5",
    ESTIMATED: "S-alpha",
    LEARNABLE: "learnable",
    FIRST: "first function",
    NONE: "factors of 0",
}
# All that may differ between two runs that are compared.
_ROW = ("data", "row", "seed", "finer_level", "anchor_scale", "input_scale")


@dataclass(frozen=True)
class Runs:
    """Records that differ in nothing but data set, row and seed.

    Attributes:
        setting: What they have in common.
        by_row: Records by data set, row and seed.
    """

    setting: dict[str, Any]
    by_row: dict[str, dict[str, dict[int, Record]]]

    def values(self, data: str, row: str, measure: str = MEASURE) -> dict[int, float]:
        """A figure by seed, in percent; a run that diverged has found nothing."""
        found = self.by_row.get(data, {}).get(row, {})
        return {seed: record[measure] or 0.0 for seed, record in sorted(found.items())}

    def mean(self, data: str, row: str, measure: str = MEASURE) -> Mean:
        """Mean over seeds, with its interval."""
        return mean_of(list(self.values(data, row, measure).values()))

    def gain(self, data: str, row: str, other: str, measure: str = MEASURE) -> Mean:
        """How much better a row is than another: mean of the differences of seeds."""
        return mean_of(paired(self.values(data, row, measure), self.values(data, other, measure)))

    def over_sets(self, row: str, other: str) -> Mean:
        """The mean of `gain` over data sets, with the interval over them."""
        gains = [self.gain(data, row, other) for data in self.by_row]
        return mean_of([gain.mean for gain in gains if gain.count])

    def any(self, data: str, row: str) -> Record:
        """The record of one seed, for what does not depend on it."""
        return next(iter(self.by_row[data][row].values()))

    def average(self, data: str, row: str, name: str) -> float:
        """The mean over seeds of something in the records, such as `reached` or `cost`."""
        return float(np.mean([record[name] for record in self.by_row[data][row].values()]))

    def rows(self, data: str, wanted: Sequence[str]) -> list[str]:
        """The rows of a data set that were run, of those that are wanted."""
        return [row for row in wanted if self.by_row[data].get(row)]


def studies(records: Sequence[Record]) -> dict[str, list[Runs]]:
    """Records by study, and in each by what its runs have in common."""
    found: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        setting = _setting(record)
        found[record["config"]["study"]][repr(sorted(setting.items()))].append(record)
    return {study: [_runs(group) for group in groups.values()] for study, groups in found.items()}


def _setting(record: Record) -> dict[str, Any]:
    # Steps and crops belong to the data set.
    own = (*_ROW, "steps", "crop", "train", "val")
    return {name: value for name, value in record["config"].items() if name not in own}


def _runs(group: Sequence[Record]) -> Runs:
    by_row: dict[str, dict[str, dict[int, Record]]] = {}
    for record in group:
        config = record["config"]
        rows = by_row.setdefault(config["data"], {})
        rows.setdefault(config["row"], {})[config["seed"]] = record
    return Runs(_setting(group[0]), by_row)


@dataclass(frozen=True)
class Prediction:
    """Whether reach predicts AP over the rows of a data set.

    Attributes:
        by_data: Spearman's rank correlation of reach and mean AP over the rows of each data set.
        mean: Of these.
        low: Of the 95 % interval of the mean, over resampled data sets.
        high: Likewise.
    """

    by_data: dict[str, float]
    mean: float
    low: float
    high: float


def prediction(runs: Runs) -> Prediction:
    """Compares the order by reach with the order by AP."""
    by_data = {}
    for data in runs.by_row:
        rows = runs.rows(data, FITS)
        reach = [runs.average(data, row, "reached") for row in rows]
        by_data[data] = rank_correlation(reach, [runs.mean(data, row).mean for row in rows])
    values = np.array([value for value in by_data.values() if not math.isnan(value)])
    low, high = resampled(lambda chosen: float(values[chosen].mean()), len(values))
    return Prediction(by_data, float(values.mean()), low, high)


def regrets(runs: Runs, among: Sequence[str] = (STOCK, SCALE, ADAPTED)) -> dict[str, float]:
    """By data set, how far the best row by reach is below the best one by AP, in points."""
    found = {}
    for data in runs.by_row:
        rows = runs.rows(data, among)
        if ADAPTED in rows:
            means = {row: runs.mean(data, row).mean for row in rows}
            found[data] = max(means.values()) - means[ADAPTED]
    return found
