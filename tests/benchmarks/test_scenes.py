"""The experiments on drawn scenes and blood cells: what they draw, start from, run and conclude."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

pytest.importorskip("faster_coco_eval")

from alphafpn import estimate_alpha_for, patch_detector
from alphafpn.demo.detector import DEVIATION, MEAN, detector
from alphafpn.demo.scenes import FAR, SIDE, Family, draw
from benchmarks.batched import outputs
from benchmarks.paper import results
from benchmarks.scenes import __main__ as command
from benchmarks.scenes import analysis, data, experiment, report, starts
from benchmarks.scenes.experiment import Config
from benchmarks.scenes.plan import CONTROLS, PARTS, PILOTS

RATIOS = (0.4, 0.4, 0.4)


@pytest.fixture
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "TRAIN", 6)
    monkeypatch.setattr(data, "VAL", 4)
    experiment._data.cache_clear()
    yield
    experiment._data.cache_clear()


@pytest.fixture
def small() -> torch.nn.Module:
    torch.manual_seed(0)
    return detector(data.DRAWN_SIZES, (1.6,))


def images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


# --- drawing ---


def test_near_and_far_show_the_same_images():
    near, far = (draw(Family(RATIOS, far), 12, 3) for far in (False, True))
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(near, far, strict=True))
    with_objects = [bool(len(scene.boxes)) for scene in far]
    assert any(with_objects)
    assert not all(with_objects)
    for a, b in zip(near, far, strict=True):
        assert len(b.boxes) == 0 or torch.equal(a.boxes, b.boxes)


def test_the_landmark_decides_and_is_far_from_all_that_is_tiny():
    for scene in draw(Family(RATIOS, far=True), 40, 5):
        pixels = scene.pixels.float()
        red, blue = pixels[0] - pixels[2] > 60, pixels[2] - pixels[0] > 60
        assert bool(red.any()) != bool(blue.any())
        if blue.any():
            assert len(scene.boxes) == 0
        rows, columns = (red | blue).nonzero().float().unbind(1)
        centre = torch.stack([columns.mean(), rows.mean()]) + 0.5
        sides = scene.boxes[:, 2:] - scene.boxes[:, :2]
        tiny = scene.boxes[sides.prod(1).sqrt() < 20]
        distance = ((tiny[:, :2] + tiny[:, 2:]) / 2 - centre).norm(dim=1)
        assert (distance > FAR - 2).all()


@pytest.mark.parametrize("ratio", [0.2, 0.8])
def test_counts_follow_the_ratios(small, ratio):
    scenes = draw(Family((ratio,) * 3, far=False), 400, 7)
    estimate = estimate_alpha_for(small, [((SIDE, SIDE), s.boxes) for s in scenes], clamp=None)
    assert estimate.ratios[:2] == pytest.approx((ratio, ratio), rel=0.25)


def test_the_same_seed_draws_the_same():
    first, second = (draw(Family(RATIOS, far=False), 2, 9) for _ in range(2))
    other = draw(Family(RATIOS, far=False), 2, 10)
    assert torch.equal(first[1].pixels, second[1].pixels)
    assert not torch.equal(first[1].pixels, other[1].pixels)


# --- data sets ---


@pytest.mark.parametrize("name", ["", "near", "near .2/.2", "middle .2/.2/.2", "cells x"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="no data set is named"):
        data.load(name, 0)


def test_cells_need_the_folder_of_the_real_data(monkeypatch):
    monkeypatch.delenv("ALPHAFPN_DATA", raising=False)
    with pytest.raises(ValueError, match="ALPHAFPN_DATA"):
        data.load("cells /10", 0)


def test_mirrored_images_have_mirrored_boxes(few_scenes):
    found = data.load("near .4/.4/.4", 0)
    assert found.images.shape == (12, 3, SIDE, SIDE)
    assert torch.equal(found.images[6], found.images[0].flip(-1))
    box, mirrored = found.boxes[0][0], found.boxes[6][0]
    assert mirrored.tolist() == pytest.approx(
        [SIDE - float(box[2]), float(box[1]), SIDE - float(box[0]), float(box[3])]
    )


def test_cells_are_scaled(monkeypatch):
    folder = os.environ.get("ALPHAFPN_DATA")
    if not folder:
        pytest.skip("ALPHAFPN_DATA is not set")
    fifth, tenth = (data.load(f"cells /{n} one class", 0) for n in (5, 10))
    assert fifth.images.shape[-2:] == (96, 128)
    assert tenth.images.shape[-2:] == (64, 64)
    sides = [
        torch.cat(found.boxes)[:, 2:] - torch.cat(found.boxes)[:, :2] for found in (fifth, tenth)
    ]
    assert float(sides[0].median() / sides[1].median()) == pytest.approx(2, rel=0.01)
    assert {int(n) for scene in data.load("cells /10", 0).train for n in scene.labels} == {1, 2, 3}


# --- starts ---


def test_first_function_only_is_the_function_of_the_factors(small):
    factors = [0.2, 0.5, 0.7]
    patched = patch_detector(copy.deepcopy(small), factors)
    starts.prepare(small, [1.0] * 3, factors, None)
    assert small.backbone.fpn.alpha.tolist() == [1.0] * 3
    for mine, theirs in zip(outputs(small, images()), outputs(patched, images()), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_rates_only_is_the_function_of_the_stock_pyramid(small):
    stock = copy.deepcopy(small)
    starts.prepare(small, [0.2, 0.5, 0.7], [1.0] * 3, None)
    assert small.backbone.fpn.alpha.tolist() == pytest.approx([0.2, 0.5, 0.7])
    for mine, theirs in zip(outputs(small, images()), outputs(stock, images()), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_laterals_of_equal_rms(small):
    with torch.no_grad():
        small.backbone.fpn.inner_blocks[2][0].weight.mul_(7)
    before = {name: value.clone() for name, value in small.named_buffers()}
    starts.prepare(small, [1.0] * 3, None, images())
    sizes = [starts._rms(lateral) for lateral in starts._laterals(small, images())]
    assert sizes == pytest.approx([sizes[0]] * 4, rel=1e-4)
    assert all(torch.equal(value, before[n]) for n, value in small.named_buffers() if n in before)


def test_forward_shares(small):
    starts.prepare(small, [0.0] * 3, None, None)
    assert starts.forward_shares(small, images()) == [0.0] * 3
    patch_detector(small, [0.5, 1.0, 0.0])
    laterals = starts._laterals(small, images())
    above = 0.5 * torch.nn.functional.interpolate(
        laterals[1] + torch.nn.functional.interpolate(laterals[2], size=laterals[1].shape[-2:]),
        size=laterals[0].shape[-2:],
    )
    expected = float(above.square().mean().sqrt() / (laterals[0] + above).square().mean().sqrt())
    shares = starts.forward_shares(small, images())
    assert shares[0] == pytest.approx(expected, rel=1e-5)
    assert shares[2] == 0.0


def test_kinds_of_factors():
    cell = torch.tensor([[0.0, 0, 8, 8], [0, 0, 16, 16]])
    model = detector(data.CELL_SIZES, (0.5, 1.0, 2.0))
    estimate = estimate_alpha_for(model, [((64, 64), cell)])
    assert starts.factors("0.5", estimate) == [0.5] * 3
    assert starts.factors("S-alpha", estimate) == list(estimate)
    assert starts.factors("half-way", estimate) == [(1 + f) / 2 for f in estimate]
    assert starts.factors("learnable S-alpha", estimate).init == list(estimate)
    assert all(0 < f < float("inf") for f in starts.factors("S-alpha unclamped", estimate))


def test_pretrained_weights_are_frozen_as_planned(small, monkeypatch, tmp_path):
    monkeypatch.setattr(starts, "_SCENES", 4)
    monkeypatch.setattr(starts, "_STEPS", 1)
    weights = starts.pretrained(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    starts.take_pretrained(small, weights)
    body = small.backbone.body
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in body.modules())
    trained = {n.partition(".")[0] for n, p in body.named_parameters() if p.requires_grad}
    assert trained == {"c3", "c4", "c5"}
    torch.testing.assert_close(body.c4.conv1.weight, weights["c4.conv1.weight"])


def test_what_stays_of_imagenets_backbone_may_be_computed_once(small):
    pytest.importorskip("efficientnet_lite_pytorch")
    starts.take_imagenet(small)
    body = small.backbone.body
    maps = body.maps(images())
    assert maps.shape == (2, 24, SIDE // 4, SIDE // 4)
    assert not maps.requires_grad
    for mine, theirs in zip(outputs(small, maps), outputs(small, images()), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in body.modules())
    trained = {n.split(".")[1] for n, p in body.named_parameters() if p.requires_grad}
    assert trained == {f"block{i}" for i in range(3, 16)}
    # Its weights know pixels from -1 to 1.
    pixels = body.still[0]((images() - MEAN) / DEVIATION)
    torch.testing.assert_close(pixels, 2 * images() - 1)


# --- runs ---


def test_plans_are_distinct_and_pair_all_with_the_baseline():
    every = [config for part in PARTS.values() for config in part(0)]
    assert len({config.key() for config in every}) == len(every)
    assert all(config.seed not in range(20) for config in PILOTS)
    main = list(PARTS["main"](0))
    for alpha, start, laterals in CONTROLS:
        assert any((c.alpha, c.start, c.laterals) == (alpha, start, laterals) for c in main)
    assert any((c.alpha, c.start, c.laterals) == ("1", "", "") for c in main)


def test_a_run_repeats_to_the_last_digit_and_is_not_repeated(few_scenes, tmp_path, monkeypatch):
    config = Config("far .4/.4/.4", 0, "S-alpha", steps=3)
    first, second = (experiment.run(config, tmp_path) for _ in range(2))
    for record in (first, second):
        del record["seconds"]
    assert first == second
    assert len(first["shares"]) == 2
    assert first["diverged_at"] is None
    file = tmp_path / "results.jsonl"
    command.work([config, config], file, tmp_path)
    monkeypatch.setattr(command, "run", None)
    command.work([config], file, tmp_path)
    assert len(file.read_text().splitlines()) == 1
    assert not list(tmp_path.glob("*.lock"))


def test_a_run_that_diverges_is_on_record(few_scenes, tmp_path):
    record = experiment.run(
        Config("near .4/.4/.4", 0, optimizer="sgd", rate=1e30, steps=30), tmp_path
    )
    assert record["figures"] is None
    assert record["diverged_at"] is not None
    json.dumps(record, allow_nan=False)


def _hold(path: Path, ready: object, done: object) -> None:
    with command._claim(path) as mine:
        assert mine
        ready.set()
        done.wait(60)


def test_one_process_does_a_run(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "run.lock", ready, done))
    other.start()
    assert ready.wait(60)
    with command._claim(tmp_path / "run.lock") as mine:
        assert not mine
    done.set()
    other.join(60)
    with command._claim(tmp_path / "run.lock") as mine:
        assert mine


# --- what records say ---


def record(data: str, seed: int, alpha: str, figure: float | None, start: str = "") -> dict:
    config = Config(data, seed, alpha, start)
    figures = None if figure is None else {"AP50_tiny": figure, "AP50_all": figure}
    share = {"forward": [0.9, 0.8, 0.7], "gradient": None}
    return {
        "key": config.key(),
        "config": vars(config),
        "figures": figures,
        "s_alpha": [0.2, 0.2, 0.2],
        "shares": [share, share],
    }


def family(data: str, best: float) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        record(data, seed, f"{alpha:g}", 0.6 - 0.1 * abs(alpha - best) + 0.001 * rng.normal())
        for seed in range(4)
        for alpha in (0.0, 0.5, 1.0)
    ]


def test_peaks_regrets_and_differences():
    (group,) = analysis.groups(family("near .2/.2/.2", 0.5))
    assert group.peak == 0.5
    assert group.regret("0.5") == pytest.approx(0, abs=0.5)
    assert group.regret("1") == pytest.approx(5, abs=0.5)
    assert np.mean(group.against("0.5")) == pytest.approx(5, abs=0.5)


def test_runs_at_another_rate_are_another_regime():
    slow, fast = family("near .2/.2/.2", 0.0), family("near .2/.2/.2", 1.0)
    for entry in fast:
        entry["config"]["rate"] = 0.03
    found = analysis.groups([*slow, *fast])
    assert [group.peak for group in found] == [0.0, 1.0]
    assert len({group.regime for group in found}) == 2


def test_a_run_that_diverged_counts_as_nothing_found():
    records = [*family("near .2/.2/.2", 0.5), record("near .2/.2/.2", 0, "S-alpha", None)]
    (group,) = analysis.groups(records)
    assert group.values("S-alpha") == {0: 0.0}


def test_peaks_that_follow_are_told_from_peaks_that_do_not():
    bests = {"near .2/.2/.2": 0.0, "near .4/.4/.4": 0.5, "near .8/.8/.8": 1.0}
    found = analysis.groups([r for name, best in bests.items() for r in family(name, best)])
    assert analysis.follow(found, [0.2, 0.4, 0.8]).value == pytest.approx(1)
    assert analysis.follow(found, [0.8, 0.4, 0.2]).value == pytest.approx(-1)
    assert np.isnan(analysis.follow(found[:1] * 3, [0.2, 0.4, 0.8]).value)


def test_holm_is_the_textbook_procedure():
    rng = np.random.default_rng(3)
    values = [rng.normal(shift, 1, 6) for shift in (0, 0.8, 2, 3)]
    raw = [stats.ttest_1samp(part, 0).pvalue for part in values]
    order = sorted(range(4), key=raw.__getitem__)
    expected, largest = [0.0] * 4, 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1, (4 - rank) * raw[index]))
        expected[index] = largest
    assert analysis.holm(values) == pytest.approx(expected)


def test_report_writes_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    (tmp_path / "images").mkdir()
    bests = {"near .2/.2/.2": 0.0, "far .4/.4/.4": 1.0, "near .8/.8/.8": 0.5}
    records = [r for name, best in bests.items() for r in family(name, best)]
    for name in bests:
        records += [record(name, s, "S-alpha", 0.5 + 0.01 * s) for s in range(4)]
    page.write_text("nothing")
    with pytest.raises(ValueError, match="marks"):
        report.write(records, page)
    page.write_text("before\n<!-- scenes: begin -->\nold\n<!-- scenes: end -->\nafter\n")
    report.write(records, page)
    text = page.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| near .2/.2/.2 |" in text
    assert "| S-alpha, geometric mean of its factors | " in text
    assert "drift, seeds from 3 on alone" not in text  # one such seed says nothing
    # Peaks at 0, .5 and 1 with a slope of 10 points: .5 gains 5, 5 and -5.
    (line,) = (line for line in text.splitlines() if line.startswith("| alpha = 0.5 over alpha"))
    assert line.count("**+5.0** (+5.0 to +5.0); 2 above, 0 below, of 2") == 1
    assert line.count("**-5.0** (-5.0 to -5.0); 0 above, 1 below, of 1") == 1
    names = {path.name for path in (tmp_path / "images").iterdir()}
    assert {"scenes-curves.svg", "scenes-drift.svg", "scenes-rules.svg"} <= names


def test_records_kept_are_of_planned_runs():
    planned = {c.key() for part in PARTS.values() for seed in range(20) for c in part(seed)}
    kept = results.read([command.HERE / "results.jsonl"])
    assert kept
    assert {entry["key"] for entry in kept} <= planned
