"""What the records say: gains of each step, what reach predicts, and what factors add."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.adapting.rows import FITS, Row
from benchmarks.intervals import Mean, mean_of, paired, rank_correlation, resampled
from benchmarks.records import Record, by_seed, settings

MEASURE = "AP50_all"
# All that may differ between two runs that are compared; the last four belong to the data set.
_VARIED = (
    *("data", "row", "seed", "finer_level", "anchor_scale", "input_scale"),
    *("steps", "crop", "train", "val"),
)


@dataclass(frozen=True)
class Runs:
    """Records that differ in nothing but data set, row and seed."""

    setting: dict[str, Any]  # what they have in common
    by_row: dict[str, dict[str, dict[int, Record]]]  # records by data set, row and seed

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

    def gains(self, row: str, other: str) -> dict[str, Mean]:
        """`gain` of each data set that has both rows."""
        found = {data: self.gain(data, row, other) for data in self.by_row}
        return {data: gain for data, gain in found.items() if gain.count}

    def over_sets(self, row: str, other: str) -> Mean:
        """The mean of `gain` over data sets, with the interval over them."""
        return mean_of([gain.mean for gain in self.gains(row, other).values()])

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
    found: dict[str, list[Runs]] = defaultdict(list)
    for group in settings(records, _VARIED):
        common = {k: v for k, v in group[0]["config"].items() if k not in _VARIED}
        rows: dict[str, dict[str, dict[int, Record]]] = defaultdict(dict)
        for (data, row), runs in by_seed(group, "data", "row").items():
            rows[data][row] = runs
        found[common["study"]].append(Runs(common, rows))
    return found


def prediction(runs: Runs) -> tuple[dict[str, float], float, float, float]:
    """Spearman's rank correlation of reach and mean AP over the rows of each data set.

    Also their mean, and its 95 % interval over resampled data sets, low and high.
    """
    by_data = {}
    for data in runs.by_row:
        rows = runs.rows(data, FITS)
        reach = [runs.average(data, row, "reached") for row in rows]
        by_data[data] = rank_correlation(reach, [runs.mean(data, row).mean for row in rows])
    values = np.array(list(by_data.values()))
    interval = resampled(lambda chosen: float(values[chosen].mean()), len(values))
    return by_data, float(values.mean()), *interval


def regrets(runs: Runs, among: Sequence[str] = FITS[:3]) -> dict[str, float]:
    """By data set, how far the best row by reach is below the best one by AP, in points."""
    return {
        data: max(runs.mean(data, row).mean for row in runs.rows(data, among))
        - runs.mean(data, Row.ADAPTED).mean
        for data in runs.by_row
    }
