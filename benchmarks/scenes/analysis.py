"""What the records say: paired differences, peaks, regrets, and how sure all that is."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]

from benchmarks.paper.pairs import Mean, mean_of

BASELINE, ESTIMATED, HALF = "1", "S-alpha", "half-way"
FIRST, RATES = "1 from S-alpha", "S-alpha from 1"
# Train with 1 and look: where its drift is below 0, train again with .5.
LOOK = "look first"
EQUAL, BOTH = "1, equal laterals", "S-alpha, equal laterals"
_REGIME = ("weights", "optimizer", "rate", "steps", "data")
_RESAMPLES = 2000
_WEIGHTS = {
    "scratch": "from scratch",
    "pretrained": "pretrained backbone",
    "imagenet": "ImageNet's backbone",
}
_OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD"}


@dataclass(frozen=True)
class Group:
    """The runs of one data set under one regime, in percent, by kind of factors and seed.

    Attributes:
        weights: `scratch`, `pretrained` or `imagenet`.
        optimizer: `adamw` or `sgd`.
        rate: Its highest.
        steps: Of the optimizer.
        data: Name of the data set.
        runs: Records by kind and seed.
    """

    weights: str
    optimizer: str
    rate: float
    steps: int
    data: str
    runs: Mapping[str, Mapping[int, dict[str, Any]]]

    @property
    def regime(self) -> str:
        """How it was trained, in words."""
        optimizer = f"{_OPTIMIZERS[self.optimizer]} at {self.rate:g}"
        return f"{_WEIGHTS[self.weights]}, {optimizer}, {self.steps} steps"

    @property
    def measure(self) -> str:
        """The figure that is compared: of tiny objects, or of all where hardly any is tiny."""
        return "AP50_all" if self.data.startswith("cells") else "AP50_tiny"

    def values(self, kind: str) -> dict[int, float]:
        """The measure by seed; a run that diverged has found nothing."""
        if kind == LOOK:
            stay, change = self.values(BASELINE), self.values("0.5")
            falls = {seed: drift < 0 for seed, drift in self.drifts.items()}
            return {
                s: (change if falls[s] else stay)[s] for s in stay if s in change and s in falls
            }
        return {
            seed: 100 * (run["figures"] or {self.measure: 0.0})[self.measure]
            for seed, run in sorted(self.runs.get(kind, {}).items())
        }

    def against(self, kind: str, other: str = BASELINE) -> list[float]:
        """Differences of the seeds that both have."""
        mine, theirs = self.values(kind), self.values(other)
        return [value - theirs[seed] for seed, value in mine.items() if seed in theirs]

    @property
    def constants(self) -> list[float]:
        """The constants that were run, ascending."""
        return sorted(float(kind) for kind in self.runs if _is_number(kind))

    @functools.cached_property
    def table(self) -> NDArray[np.float64]:
        """The measure [constants, seeds], for the seeds that all constants have."""
        values = [self.values(f"{constant:g}") for constant in self.constants]
        seeds = sorted(set.intersection(*map(set, values))) if values else []
        return np.array([[row[seed] for seed in seeds] for row in values])

    @property
    def peak(self) -> float:
        """The constant that is best in the mean over seeds."""
        return self.constants[int(self.table.mean(1).argmax())]

    @property
    def s_alpha(self) -> list[float]:
        """S-alpha in the mean over seeds, finest edge first."""
        runs = self.runs[BASELINE].values()
        return [float(v) for v in np.mean([run["s_alpha"] for run in runs], axis=0)]

    def shares(self, kind: str, when: int) -> list[float]:
        """Forward shares at each edge, in the mean over seeds: at the start (0) or the end (-1)."""
        runs = [run for run in self.runs[kind].values() if run["figures"]]
        return [float(v) for v in np.mean([run["shares"][when]["forward"] for run in runs], axis=0)]

    @property
    def drifts(self) -> dict[int, float]:
        """By seed: how much the forward shares rise while 1 is trained, in the mean over edges."""
        return {
            seed: float(
                np.subtract(run["shares"][-1]["forward"], run["shares"][0]["forward"]).mean()
            )
            for seed, run in self.runs[BASELINE].items()
            if run["figures"]
        }

    def regret(self, kind: str) -> float:
        """How far a kind is below the best constant, which is chosen on the other seeds."""
        values = self.values(kind)
        table, seeds = self.table, self._seeds
        losses = []
        for column, seed in enumerate(seeds):
            if seed in values:
                others = np.delete(table, column, axis=1).mean(1)
                losses.append(table[int(others.argmax()), column] - values[seed])
        return float(np.mean(losses))

    @property
    def _seeds(self) -> list[int]:
        values = [self.values(f"{constant:g}") for constant in self.constants]
        return sorted(set.intersection(*map(set, values)))


def _is_number(kind: str) -> bool:
    try:
        float(kind)
    except ValueError:
        return False
    return True


def kind_of(config: Mapping[str, Any]) -> str:
    """Names the factors of a run and how it starts, as tables do."""
    name = config["alpha"]
    if config["start"]:
        name += f" from {config['start']}"
    return name + ", equal laterals" * bool(config["laterals"])


# The drift was thought of after the first three seeds were seen: the others have to confirm it.
CONFIRMING = 3


def groups(records: Sequence[dict[str, Any]]) -> list[Group]:
    """Records by regime and data set, in the order in which they were first run."""
    found: dict[tuple[Any, ...], dict[str, dict[int, dict[str, Any]]]] = defaultdict(dict)
    for record in records:
        config = record["config"]
        key = tuple(config[name] for name in _REGIME)
        found[key].setdefault(kind_of(config), {})[config["seed"]] = record
    return [Group(*key, runs) for key, runs in found.items() if BASELINE in runs]


def holm(differences: Sequence[Sequence[float]]) -> list[float]:
    """P-values of paired t-tests against 0, by Holm's correction for having looked at all."""
    raw = np.array([_p_value(values) for values in differences])
    order = raw.argsort()
    corrected = np.empty(len(raw))
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(raw) - rank) * raw[index]))
        corrected[index] = largest
    return [float(value) for value in corrected]


def _p_value(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 1.0
    return float(stats.ttest_1samp(values, 0.0).pvalue)


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation over data sets, with what resampled seeds make of it.

    Attributes:
        value: Of the peaks with a predictor; nan where all peaks are the same.
        low: Of the 95 % interval over resampled seeds and data sets.
        high: Likewise.
        count: Data sets.
    """

    value: float
    low: float
    high: float
    count: int


def follow(found: Sequence[Group], predictor: Sequence[float], seed: int = 0) -> Correlation:
    """Whether the best constants of data sets are in the order of a predictor."""
    peaks = [group.peak for group in found]
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(_RESAMPLES):
        rows = rng.integers(0, len(found), len(found))
        chosen = [_resampled_peak(found[row], rng) for row in rows]
        value = _spearman(chosen, [predictor[row] for row in rows])
        if not np.isnan(value):
            values.append(value)
    low, high = np.percentile(values, [2.5, 97.5]) if values else (np.nan, np.nan)
    return Correlation(_spearman(peaks, predictor), float(low), float(high), len(found))


def _resampled_peak(group: Group, rng: np.random.Generator) -> float:
    table = group.table
    columns = rng.integers(0, table.shape[1], table.shape[1])
    return group.constants[int(table[:, columns].mean(1).argmax())]


def _spearman(first: Sequence[float], second: Sequence[float]) -> float:
    if len(set(first)) < 2 or len(set(second)) < 2:
        return float("nan")
    return float(stats.spearmanr(first, second).statistic)


def summary(group: Group, kind: str) -> Mean:
    """A kind against the baseline."""
    return mean_of(group.against(kind))
