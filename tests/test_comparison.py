"""Each row of a comparison is the estimate of a detector that is really built so."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from alphafpn import compare_anchors, estimate_alpha_for
from alphafpn.comparison import AnchorComparison
from alphafpn.estimate import read
from alphafpn.tiny import tiny_retinanet
from tests.anchor_sets import seeds
from tests.estimate.test_for_detector import (
    Halved,
    assert_same,
    counted,
    draw_dataset,
    small_detector,
    snapshot,
)
from tests.malformed import coco

KINDS = {
    "retinanet": {"sizes": (16, 32, 64, 128)},
    "faster": {"sizes": (16, 32, 64, 128), "min_size": (48, 64), "max_size": 90},
    "fcos": {"sizes": (16, 32, 64, 128)},
    "fixed": {"sizes": (17.5, 30.3, 64, 128), "fixed_size": (70, 60)},
    "unresized": {"sizes": (16, 32, 64, 128), "_skip_resize": True},
}


@settings(max_examples=5, deadline=None)
@given(seed=seeds)
@pytest.mark.parametrize("name", KINDS)
def test_rows_equal_detectors_that_are_built_so(name, seed):
    options = {"min_size": 64, "max_size": 100, **KINDS[name]}
    kind = name if name in ("faster", "fcos") else "retinanet"
    model = small_detector(kind, **options)
    dataset = draw_dataset(np.random.default_rng(seed))
    rows = compare_anchors(model, dataset).rows
    scales = [(row.anchor_scale, row.input_scale) for row in rows]
    assert scales == [(1, 1), (0.5, 1), (0.25, 1), (0.125, 1), (1, 2)]
    for row in rows:
        sizes = tuple(size * row.anchor_scale for size in options["sizes"])
        assert row.anchor_sizes == tuple((size,) for size in sizes)
        built, data = {**options, "sizes": sizes}, dataset
        if row.input_scale == 2 and name == "unresized":
            data = [((2 * h, 2 * w), 2 * boxes) for (h, w), boxes in dataset]
        elif row.input_scale == 2:
            for key in ("min_size", "max_size", "fixed_size"):
                if key in built:
                    built[key] = tuple((2 * np.atleast_1d(built[key])).tolist())
            built["max_size"] = built["max_size"][0]
        other = small_detector(kind, **built)
        assert row.estimate == estimate_alpha_for(other, data)
        if name in ("retinanet", "fixed"):
            by_hand = counted(other.eval(), data)
            if by_hand is not None:
                assert (row.estimate.counts, row.estimate.num_unmatched) == by_hand


def test_the_file_is_read_once_and_the_model_stays(tmp_path, monkeypatch):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(coco()))
    opened = []
    decode = read.decode
    monkeypatch.setattr(read, "decode", lambda *args: opened.append(args) or decode(*args))
    model = small_detector("faster", (16, 32, 64, 128))
    before = snapshot(model)
    found = compare_anchors(model, [path], category_ids=[1], clamp=(0.5, 1))
    assert len(opened) == 1
    with pytest.raises(FrozenInstanceError):
        found.rows = ()
    with pytest.raises(FrozenInstanceError):
        found.rows[0].input_scale = 2
    assert_same(snapshot(model), before)
    assert len(found.rows) == 5
    assert {row.estimate.clamp for row in compare_anchors(model, path).rows} == {(0.2, 2.0)}
    assert {row.estimate.clamp for row in found.rows} == {(0.5, 1.0)}


def test_rows_that_cannot_be_built_are_left_out():
    dataset = draw_dataset(np.random.default_rng(0))

    def scales(model):
        return [(r.anchor_scale, r.input_scale) for r in compare_anchors(model, dataset).rows]

    # A size of 1 rounds to nothing.
    assert scales(small_detector("fcos", (8, 16, 32, 64))) == [(1, 1), (0.5, 1), (0.25, 1), (1, 2)]
    # So does the shorter side of 1 / sqrt(2).
    model = small_detector(sizes=(8, 16, 32, 64))
    for ratio in (0.5, 2.0):
        model.anchor_generator = AnchorGenerator(((8,), (16,), (32,), (64,)), ((ratio,),) * 4)
        assert scales(model) == [(1, 1), (0.5, 1), (0.25, 1), (1, 2)]
    model = small_detector("fcos", (16, 32, 64, 128))
    model.transform = Undone(64, 100, [0.5] * 3, [0.5] * 3)
    assert scales(model) == [(1, 1), (0.5, 1), (0.25, 1), (0.125, 1)]
    # With one square for each position, sizes of 16 and 22 are alike as 2 and 2.75.
    model = small_detector(sizes=(16, 22, 64, 128))
    model.anchor_generator = AnchorGenerator(((16,), (22,), (64,), (128,)), ((1.0,),) * 4)
    assert scales(model) == [(1, 1), (0.5, 1), (0.25, 1), (1, 2)]


class Undone(GeneralizedRCNNTransform):
    """Makes every image equally large."""

    def resize(self, image, target=None):
        return torch.nn.functional.interpolate(image[None], size=(64, 64))[0], target


def test_a_transform_that_enlarges_with_the_image():
    model = small_detector(sizes=(16, 32, 64, 128))
    model.transform = Halved((40, 64), 100, [0.5] * 3, [0.5] * 3)
    dataset = [((120, 90), torch.tensor([[2.0, 4, 33, 20], [50, 30, 58, 44]]))]
    row = compare_anchors(model, dataset).rows[-1]
    doubled = [((2 * h, 2 * w), 2 * boxes) for (h, w), boxes in dataset]
    assert row.input_scale == 2
    assert row.estimate == estimate_alpha_for(model, doubled)


def test_the_papers_detectors():
    with torch.device("meta"):
        model = tiny_retinanet("resnet18", weights_backbone=None)
    found = compare_anchors(model, draw_dataset(np.random.default_rng(0)))
    assert found.rows[-1].input_scale == 2
    assert found.rows[1].anchor_sizes[0] == pytest.approx((4, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3)))


def test_hand_made_anchors_shrink_about_their_centres():
    model = small_detector()
    generator = model.anchor_generator
    generator.cell_anchors = [
        torch.tensor([[1.0, 2, 1 + 8 * 2**i, 2 + 16 * 2**i]]) for i in range(4)
    ]
    dataset = draw_dataset(np.random.default_rng(0))
    row = compare_anchors(model, dataset).rows[1]
    assert row.anchor_sizes == ()
    generator.cell_anchors = [
        torch.tensor([[1.0 + 2 * 2**i, 2 + 4 * 2**i, 1 + 6 * 2**i, 2 + 12 * 2**i]])
        for i in range(4)
    ]
    assert row.estimate == estimate_alpha_for(model, dataset)


def test_the_table():
    boxes = torch.tensor([[10.0, 10, 18, 18], [20, 20, 28, 28], [30, 10, 46, 26]])
    model = small_detector("faster", (32, 64, 128, 256), min_size=64, max_size=64)
    found = compare_anchors(model, [((64, 64), boxes)])
    lines = str(found).splitlines()
    assert lines[0].split() == ["anchors", "input", "IoU", ">=", "0.4", "IoU", ">=", "0.5", "alpha"]
    assert [line[:9].strip() for line in lines[1:6]] == [
        "own",
        "own x 1/2",
        "own x 1/4",
        "own x 1/8",
        "own",
    ]
    assert "own x 2" in lines[5]
    assert "1.000*" in lines[1] or "0.200*" in lines[1]
    assert lines[6] == "* set by the clamp, or 1 for want of objects"
    assert lines[7] == "best fit at this input: anchor sizes 8 16 32 64"
    row = found.to_list()[2]
    assert row["recall"] == {
        iou: found.rows[2].estimate.recall(float(iou)) for iou in row["recall"]
    }
    assert list(row["recall"]) == ["0.4", "0.5"]
    assert json.loads(json.dumps(found.to_list(), allow_nan=False)) == found.to_list()
    sizes = found.rows[2].anchor_sizes
    assert AnchorGenerator(sizes, ((1.0,),) * 4).sizes == sizes


def test_the_best_fit_is_the_one_that_reaches_half():
    boxes = torch.tensor([[10.0, 10, 18, 18], [20, 20, 28, 28], [30, 10, 46, 26]])
    rows = compare_anchors(small_detector("faster", (32, 64, 128, 256)), [((64, 64), boxes)]).rows

    def with_ious(row, *hundredths):
        histogram = np.bincount(hundredths, minlength=101).tolist()
        return replace(row, estimate=replace(row.estimate, iou_histogram=tuple(histogram)))

    # More boxes of the second one reach .4, more of the third one .5.
    fits = with_ious(rows[0], 10, 10, 10), with_ious(rows[1], 45, 45, 60)
    lines = str(AnchorComparison((*fits, with_ious(rows[2], 30, 55, 60)))).splitlines()
    assert lines[-1] == "best fit at this input: anchor sizes 8 16 32 64"
    assert str(AnchorComparison(fits[:1])).endswith("anchor sizes 32 64 128 256")
    assert "clamp" in str(AnchorComparison(fits[:1]))
    balanced = replace(fits[0].estimate, counts=(80, 40, 20, 10))
    assert "clamp" not in str(AnchorComparison((replace(fits[0], estimate=balanced),)))
    larger = with_ious(rows[4], 99, 99, 99)
    assert str(AnchorComparison((*fits, larger))).endswith("anchor sizes 16 32 64 128")


def test_fcos_has_ranges_and_no_iou():
    found = compare_anchors(
        small_detector("fcos", (16, 32, 64, 128)), draw_dataset(np.random.default_rng(0))
    )
    lines = str(found).splitlines()
    assert lines[0].startswith("ranges ")
    assert lines[1].split()[2:4] == ["-", "-"]
    assert lines[-1] == "FCOS matches by regression ranges: they are scaled here"
    assert [row["recall"] for row in found.to_list()] == [None] * 5
