"""Detectable differences against simulation, Holm's correction by hand."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("scipy")

from benchmarks.intervals import holm, mean_of


def test_detectable_differences_are_found_in_four_of_five_experiments():
    rng = np.random.default_rng(0)
    count, truth = 4, 2.0
    detectable = mean_of([0.0, 1.0, 2.0, 3.0]).detectable
    spread = np.std([0.0, 1.0, 2.0, 3.0], ddof=1) * truth / detectable
    found = [mean_of((truth + spread * rng.standard_normal(count)).tolist()) for _ in range(4000)]
    assert np.mean([mean.mean - mean.half > 0 for mean in found]) == pytest.approx(0.8, abs=0.02)


def test_holms_correction_by_hand():
    alone = [holm([values])[0] for values in ([1.0, 1.1, 0.9], [1.0, 2.0, 1.2], [-1.0, 1.0, 0.1])]
    corrected = holm([[1.0, 1.1, 0.9], [1.0, 2.0, 1.2], [-1.0, 1.0, 0.1], [3.0]])
    assert corrected[0] == pytest.approx(4 * alone[0])
    assert corrected[1] == pytest.approx(3 * alone[1])
    assert corrected[2:] == [1.0, 1.0]
