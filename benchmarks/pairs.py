"""Times functions in turns, so that other work on the machine falls on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
import torch


@dataclass
class Pairs:
    """Seconds of baseline and candidate, pair by pair."""

    baseline: list[float]
    candidate: list[float]

    @property
    def ratios(self) -> np.ndarray:
        """Candidate over baseline of each pair."""
        return np.asarray(self.candidate) / np.asarray(self.baseline)

    def interval(self, confidence_level: float = 0.95) -> tuple[float, float]:
        """Distribution-free interval of the median ratio, from order statistics."""
        ordered = np.sort(self.ratios)
        n = len(ordered)
        tail = (1 - confidence_level) / 2
        below = 0.0
        rank = -1
        while below <= tail and rank < n // 2:
            rank += 1
            below += comb(n, rank) / 2**n
        rank = max(rank - 1, 0) if below > tail else rank
        return float(ordered[rank]), float(ordered[n - 1 - rank])

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
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Waits for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def repeat(function: Callable[[], object], device: str, seconds: float = 2.0) -> list[float]:
    """Times of one function, after three calls that do not count."""
    for _ in range(3):
        timed(function, device)
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        times.append(timed(function, device))
    return times


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
