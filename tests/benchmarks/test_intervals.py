"""Detectable differences against simulation, intervals by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("scipy")

from benchmarks.intervals import mean_of, paired, rank_correlation, resampled


def test_detectable_differences_are_found_in_four_of_five_experiments():
    rng = np.random.default_rng(0)
    count, truth = 4, 2.0
    detectable = mean_of([0.0, 1.0, 2.0, 3.0]).detectable
    spread = np.std([0.0, 1.0, 2.0, 3.0], ddof=1) * truth / detectable
    found = [mean_of((truth + spread * rng.standard_normal(count)).tolist()) for _ in range(4000)]
    assert np.mean([mean.mean - mean.half > 0 for mean in found]) == pytest.approx(0.8, abs=0.02)


def test_intervals_by_hand():
    # Differences 1, 2 and 3 (a seed that one side lacks does not count): 2 +- 4.303 * 1 / sqrt(3).
    differences = paired({0: 11.0, 1: 22.0, 2: 33.0, 3: 9.0}, {2: 30.0, 1: 20.0, 0: 10.0})
    assert differences == [1.0, 2.0, 3.0]
    mean = mean_of(differences)
    assert (mean.count, mean.mean) == (3, 2.0)
    assert mean.half == pytest.approx(4.3027 / math.sqrt(3), abs=1e-3)
    assert (mean.low, mean.high) == (mean.mean - mean.half, mean.mean + mean.half)
    assert [str(mean), str(mean_of([1.0])), str(mean_of([]))] == ["+2.0 ± 2.5", "+1.0", ""]


def test_rank_correlation_and_its_interval():
    assert rank_correlation([1, 2, 3], [10, 30, 20]) == pytest.approx(0.5)
    assert math.isnan(rank_correlation([1, 1], [1, 2]))
    values = [0.0, 1.0]
    assert resampled(lambda chosen: sum(values[i] for i in chosen) / 2, 2) == (0.0, 1.0)
    assert math.isnan(resampled(lambda _: math.nan, 2)[0])
