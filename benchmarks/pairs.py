"""Times functions in turns, so that other work on the machine falls on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats  # type: ignore[import-untyped]


@dataclass
class Pairs:
    """Seconds of baseline and candidate, pair by pair."""

    baseline: list[float]
    candidate: list[float]

    @property
    def ratios(self) -> np.ndarray:
        """Candidate over baseline of each pair."""
        return np.asarray(self.candidate) / np.asarray(self.baseline)

    def interval(self) -> tuple[float, float]:
        """Distribution-free 95 % interval of the median ratio, from order statistics."""
        ordered = np.sort(self.ratios)
        rank = max(int(stats.binom.ppf(0.025, len(ordered), 0.5)) - 1, 0)
        return float(ordered[rank]), float(ordered[-1 - rank])

    def summary(self) -> dict[str, float]:
        """What the results file keeps."""
        low, high = self.interval()
        return {
            "ratio": float(np.median(self.ratios)),
            "low": low,
            "high": high,
            "pairs": len(self.baseline),
            **{f"baseline_{k}": v for k, v in spread(self.baseline).items()},
            **{f"candidate_{k}": v for k, v in spread(self.candidate).items()},
        }


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and 20/80 percentiles."""
    low, median, high = np.percentile(seconds, [20, 50, 80])
    return {"median_s": float(median), "p20_s": float(low), "p80_s": float(high)}


def timed(function: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of one call, with the device idle before and after."""
    idle = torch.cuda.synchronize if device == "cuda" else lambda: None
    idle()
    start = time.perf_counter()
    function()
    idle()
    return time.perf_counter() - start


def repeat(function: Callable[[], object], device: str) -> list[float]:
    """Times of one function, for about two seconds."""
    return in_turns([function], device=device, seconds=2, least=5, most=10_000, warm_up=3)[0]


def in_turns(
    functions: Sequence[Callable[[], object]],
    *,
    device: str = "cpu",
    seconds: float = 10.0,
    least: int = 8,
    most: int = 200,
    warm_up: int = 2,
) -> list[list[float]]:
    """Times of each function, round by round, for about `seconds`; the order changes each time."""
    for function in functions:
        for _ in range(warm_up):
            timed(function, device)
    times: list[list[float]] = [[] for _ in functions]
    random = np.random.default_rng(0)
    start = time.perf_counter()
    while len(times[0]) < most and (len(times[0]) < least or time.perf_counter() - start < seconds):
        for i in random.permutation(len(functions)):
            times[i].append(timed(functions[i], device))
    return times


def interleave(
    baseline: Callable[[], object], candidate: Callable[[], object], **options: Any
) -> Pairs:
    """Runs both in turns; `options` are those of `in_turns`."""
    return Pairs(*in_turns([baseline, candidate], **options))
