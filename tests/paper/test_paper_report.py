"""Intervals and power against simulation; the page against the records."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("scipy")

from benchmarks.paper.pairs import mean_of, settings
from benchmarks.paper.report import report, table, title

FIGURES = ("AP50_tiny", "AP25_tiny", "AP75_tiny", "AP50_tiny1", "AP50_tiny2", "AP50_tiny3")


def record(alpha, seed, ap, **changes):
    config = {
        "alpha": alpha, "start": "", "seed": seed, "detector": "retinanet", "backbone": "b",
        "size": [64, 96], "crop": 0, "tile": None, "steps": 5, "batch": 2, "channels": 8,
        "scale_match": "none", "init": "", "optimizer": "sgd", "lr": 0.01, "warmup": 1, "clip": 0.0,
        "precision": "32-true", **changes,
    }  # fmt: skip
    return {
        "key": f"{sorted(config.items())}",
        "config": config,
        "alpha": [0.4, 0.3, 0.2] if alpha == "s-alpha" else [float(alpha)] * 3,
        "s_alpha": {"samples": {"ratios": [0.4, 0.3, 0.1]}} if alpha == "s-alpha" else {},
        "figures": dict.fromkeys(FIGURES, ap) | {"MR50_tiny": 1 - ap},
        "diverged_at": None,
        "counts": {"train_images": 1, "train_boxes": 2, "val_images": 3, "val_boxes": 4},
        "device": "none",
        "versions": {"torch": "0", "torchvision": "0"},
    }


@pytest.fixture
def records():
    rng = np.random.default_rng(0)
    luck = rng.normal(0, 0.02, 6)
    gain = {"1": 0.0, "0.5": 0.03, "s-alpha": 0.01, "0.75": 0.01}
    return [
        record(alpha, seed, 0.3 + luck[seed] + add + rng.normal(0, 0.001))
        for seed in range(6)
        for alpha, add in gain.items()
    ]


@pytest.mark.parametrize("count", [3, 8])
def test_intervals_hold_the_truth_in_19_of_20_and_power_is_80_percent(count):
    rng = np.random.default_rng(count)
    hits = []
    for _ in range(1500):
        main = mean_of(rng.normal(1.0, 2.0, count))
        hits.append(abs(main.mean - 1.0) <= main.half)
    assert np.mean(hits) == pytest.approx(0.95, abs=0.02)
    # With the true spread, an effect of the detectable size is found four times in five.
    spread = rng.normal(0, 1.0, count)
    known = mean_of((spread - spread.mean()) / spread.std(ddof=1)).detectable
    found = []
    for _ in range(1500):
        main = mean_of(rng.normal(known, 1.0, count))
        found.append(abs(main.mean) > main.half)
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)


def test_pairs_cancel_the_luck_of_a_seed(records):
    (setting,) = settings(records)
    base, chosen, half, _ = setting.variants
    assert (base.alpha, chosen.alpha, half.alpha) == ("1", "s-alpha", "0.5")
    paired = mean_of(list(half.against(base, "AP50_tiny").values()))
    assert paired.mean == pytest.approx(3, abs=0.2)
    assert paired.half < mean_of(half.values("AP50_tiny")).half / 5


def test_only_seeds_that_both_have_are_compared(records):
    (setting,) = settings(
        [r for r in records if (r["config"]["alpha"], r["config"]["seed"]) != ("1", 2)]
    )
    base, chosen, *_ = setting.variants
    assert sorted(chosen.against(base, "AP50_tiny")) == [0, 1, 3, 4, 5]
    assert "| 5 |" in table(setting)
    assert "| 6 |" in table(setting)


def test_one_seed_has_no_interval(records):
    (setting,) = settings([r for r in records if r["config"]["seed"] == 0])
    assert math.isnan(mean_of(setting.variants[0].values("AP50_tiny")).half)
    assert "±" not in table(setting)


def test_runs_that_diverged_are_named_and_not_averaged(records):
    records[1]["diverged_at"] = 3
    (setting,) = settings(records)
    assert "5 (1 diverged)" in table(setting)


def test_settings_with_different_optimizers_have_titles_of_their_own(records):
    found = settings([*records, record("1", 0, 0.2, optimizer="adamw")])
    assert len({title(setting) for setting in found}) == len(found) == 2


def test_the_page_keeps_what_people_wrote(records, tmp_path):
    page = tmp_path / "experiments.md"
    page.write_text("# Title\n\n<!-- results: begin -->\nold\n<!-- results: end -->\n\nThe end.\n")
    others = [record("1", 0, 0.2, steps=9), record("s-alpha", 0, 0.3, start="1")]
    report([*records, *others], page)
    text = page.read_text()
    assert text.startswith("# Title\n")
    assert text.endswith("The end.\n")
    assert "old" not in text
    assert "best constant in the mean over seeds, is 0.5" in text
    assert len(list((tmp_path / "images").glob("*.svg"))) == 2
    # Both ways to start have the same factors, which are told of once.
    assert "S-alpha, starting as baseline (1)" in text
    assert text.count("S-alpha before the clamp") == 1
    report([*records, *others], page)
    assert page.read_text() == text
