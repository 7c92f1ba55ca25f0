"""Means, intervals and corrections, against figures by hand and against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("scipy")

from benchmarks.intervals import holm, mean_of, paired, rank_correlation


def test_a_mean_has_students_interval():
    # 4.303 is the quantile for two degrees of freedom.
    found = mean_of([1.0, 2.0, 3.0])
    assert (found.count, found.mean) == (3, 2.0)
    assert found.half == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
    assert found.text(1, "+") == "+2.0 ± 2.5"
    assert (mean_of([2.0]).text(1), mean_of([]).text(1)) == ("2.0", "")


def test_detectable_differences_are_found_in_four_of_five_experiments():
    rng = np.random.default_rng(0)
    count, truth = 4, 2.0
    detectable = mean_of([0.0, 1.0, 2.0, 3.0]).detectable
    spread = np.std([0.0, 1.0, 2.0, 3.0], ddof=1) * truth / detectable
    found = [mean_of((truth + spread * rng.standard_normal(count)).tolist()) for _ in range(4000)]
    assert np.mean([mean.mean - mean.half > 0 for mean in found]) == pytest.approx(0.8, abs=0.02)


def test_differences_are_those_of_common_seeds():
    assert paired({0: 1.0, 1: 5.0, 3: 7.0}, {1: 2.0, 2: 9.0, 3: 3.0}) == [3.0, 4.0]


def test_holms_correction_by_hand():
    alone = [holm([values])[0] for values in ([1.0, 1.1, 0.9], [1.0, 2.0, 1.2], [-1.0, 1.0, 0.1])]
    corrected = holm([[1.0, 1.1, 0.9], [1.0, 2.0, 1.2], [-1.0, 1.0, 0.1], [3.0]])
    assert corrected[0] == pytest.approx(4 * alone[0])
    assert corrected[1] == pytest.approx(3 * alone[1])
    assert corrected[2:] == [1.0, 1.0]


def test_rank_correlation_is_of_orders():
    assert rank_correlation([1, 2, 3], [10, 20, 1000]) == pytest.approx(1)
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
