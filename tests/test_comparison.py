"""Each row of a comparison is the estimate of a detector that is really adapted so."""

from __future__ import annotations

import copy
import json
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torchvision.models import get_model
from torchvision.models.detection.anchor_utils import AnchorGenerator

from alphafpn import (
    adapt_detector,
    compare_anchors,
    estimate_alpha_for,
    patch_detector,
)
from alphafpn.tiny import tiny_retinanet
from tests.anchor_sets import seeds
from tests.detectors import (
    make_faster_rcnn,
    make_fcos,
    make_retinanet,
    make_stages,
    small_detector,
)
from tests.estimate.test_for_detector import draw_dataset
from tests.malformed import coco
from tests.states import assert_unchanged, snapshot

KINDS = {
    "retinanet": {"sizes": (16, 32, 64, 128)},
    "faster": {"sizes": (16, 32, 64, 128), "min_size": (48, 64), "max_size": 90},
    "fcos": {"sizes": (16, 32, 64, 128)},
    "fixed": {"sizes": (17.5, 30.3, 64, 128), "fixed_size": (70, 60)},
    "unresized": {"sizes": (16, 32, 64, 128), "_skip_resize": True},
}


def stock(name, **options):
    with torch.device("meta"):
        return get_model(name, weights=None, weights_backbone=None, **options)


def resizing(kind="retinanet"):
    """A small detector with maps at strides 8 to 32, and from 4 for `faster`."""
    levels = 4 if kind == "faster" else 3
    backbone = make_stages(levels, out=32)
    options = {"min_size": 480, "max_size": 800}
    if kind == "fcos":
        return make_fcos(backbone, 4, **options)
    sizes = tuple((32 << i,) for i in range(levels + 1))
    generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    if kind == "faster":
        return make_faster_rcnn(backbone, rpn_anchor_generator=generator, **options)
    return make_retinanet(backbone, anchor_generator=generator, **options)


def small_objects(num_images=40, size=8.0, spread=0.5, seed=0):
    """Images of 480 x 640 with objects around `size` pixels."""
    rng = np.random.default_rng(seed)
    dataset = []
    for _ in range(num_images):
        number = rng.integers(0, 6)
        low = rng.uniform(0, 0.8, (number, 2)) * [640, 480]
        high = low + size * np.exp(rng.normal(0, spread, (number, 2)))
        boxes = torch.tensor(np.concatenate([low, high], 1), dtype=torch.float32)
        dataset.append(((480, 640), boxes))
    return dataset


@settings(max_examples=3, deadline=None)
@given(seed=seeds)
@pytest.mark.parametrize("name", KINDS)
def test_rows_equal_the_estimates_of_adapted_detectors(name, seed):
    kind = name if name in ("faster", "fcos") else "retinanet"
    model = small_detector(kind, **KINDS[name])
    dataset = draw_dataset(np.random.default_rng(seed))
    for row in compare_anchors(model, dataset).rows:
        adapted = adapt_detector(copy.deepcopy(model), row)
        estimate = estimate_alpha_for(adapted, dataset)
        for part in ("counts", "moments", "iou_histogram", "ratios", "level_names", "strides"):
            assert getattr(row.estimate, part) == getattr(estimate, part), part
        if name != "fcos":
            assert row.reached == estimate.recall(0.5)


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("retinanet", [(0, 1), (0, 1), (1, 1), (0, 2), (0, 2)]),
        ("fcos", [(0, 1), (1, 1), (0, 2), (1, 2)]),
        ("faster", [(0, 1), (0, 1), (0, 2), (0, 2)]),
    ],
)
def test_the_printed_call_adapts_to_the_best_row(kind, rows):
    model, dataset = resizing(kind), small_objects()
    found = compare_anchors(model, dataset)
    assert [(row.finer_level, row.input_scale) for row in found.rows] == rows
    first = found.rows[0]
    assert (first.anchor_scale, first.cost) == (1.0, 1.0)
    if kind == "fcos":
        assert {row.anchor_scale for row in found.rows} == {1.0}
    best = found.best
    assert best.input_scale == 1
    adapted = adapt_detector(copy.deepcopy(model), best)
    estimate = estimate_alpha_for(adapted, dataset)
    assert (best.estimate.counts, best.estimate.ratios) == (estimate.counts, estimate.ratios)
    assert json.loads(json.dumps(found.to_list(), allow_nan=False)) == found.to_list()
    last_line = str(found).splitlines()[-1]
    called = copy.deepcopy(model)
    eval(last_line, {"adapt_detector": adapt_detector, "model": called})
    assert estimate_alpha_for(called, dataset) == estimate
    for one, other in zip(called.modules(), adapted.modules(), strict=True):
        for key in ("sizes", "detections_per_img", "topk_candidates", "_pre_nms_top_n"):
            assert getattr(one, key, None) == getattr(other, key, None)


def test_costs_are_operations_over_those_of_the_detector_as_it_is():
    boxes = [((480, 640), torch.tensor([[10.0, 10, 18, 18]]))]
    for name, finer in (("retinanet_resnet50_fpn_v2", 2.93), ("fcos_resnet50_fpn", 2.75)):
        rows = compare_anchors(stock(name), boxes).rows
        costs = {(row.finer_level, row.input_scale): row.cost for row in rows}
        assert costs[True, 1] == pytest.approx(finer, abs=0.01)
        assert costs[False, 2] == pytest.approx(3.94, abs=0.07)
        assert costs[False, 1] == 1
        if name == "fcos_resnet50_fpn":
            expected = costs[True, 1] * costs[False, 2]
            assert costs[True, 2] == pytest.approx(expected, rel=0.05)
    # The second stage sees 1000 boxes on any input, about a tenth of all operations.
    rows = compare_anchors(stock("fasterrcnn_resnet50_fpn"), boxes).rows
    assert [row.cost for row in rows] == pytest.approx([1, 1, 3.70, 3.70], abs=0.01)


def test_the_scale_is_the_best_of_all_scales():
    model = resizing("faster")
    for dataset in (small_objects(seed=1), small_objects(12, 30.0, 0.2, seed=2)):
        row = compare_anchors(model, dataset).rows[1]

        def reached(scale, dataset=dataset):
            estimate = estimate_alpha_for(adapt_detector(copy.deepcopy(model), scale), dataset)
            return estimate.recall(0.5), estimate.recall(0.4)

        for scale in np.geomspace(1 / 16, 4, 60):
            assert reached(float(f"{scale:.3g}")) <= (row.reached, row.estimate.recall(0.4))
        assert float(f"{row.anchor_scale:.3g}") == row.anchor_scale
        # Nothing closer to 1 is as good: the next scale with three digits is worse, or it is 1.
        unit = 10.0 ** (np.floor(np.log10(row.anchor_scale)) - 2)
        closer = row.anchor_scale + np.copysign(unit, 1 - row.anchor_scale)
        assert row.anchor_scale == 1 or reached(closer) < reached(row.anchor_scale)


def test_fcos_counts_boxes_that_own_a_location():
    # A box between locations owns none: 2 x 2 pixels around (14, 14) with locations 8 apart.
    boxes = torch.tensor([[13.0, 13, 15, 15], [20.0, 20, 44, 44]])
    model = small_detector("fcos", (8, 16, 32, 64), min_size=64, max_size=64, size_divisible=32)
    found = compare_anchors(model, [((64, 64), boxes)])
    assert found.rows[0].reached == pytest.approx(0.5)
    assert found.rows[0].estimate.iou_histogram is None
    assert "own a location" in str(found)


def test_the_file_is_read_once_and_the_model_stays(tmp_path, monkeypatch):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(coco()))
    model = small_detector("faster", (16, 32, 64, 128))
    before = snapshot(model)
    found = compare_anchors(model, [path], category_ids=[1], clamp=(0.5, 1))
    with pytest.raises(FrozenInstanceError):
        found.rows = ()
    with pytest.raises(FrozenInstanceError):
        found.rows[0].input_scale = 2
    assert_unchanged(model, before)
    assert {row.estimate.clamp for row in compare_anchors(model, path).rows} == {(0.2, 2.0)}
    assert {row.estimate.clamp for row in found.rows} == {(0.5, 1.0)}


def test_detectors_that_do_not_resize_have_no_row_on_a_larger_input():
    with torch.device("meta"):
        model = tiny_retinanet("resnet18", weights_backbone=None)
    dataset = draw_dataset(np.random.default_rng(0))
    found = compare_anchors(model, dataset)
    assert [row.input_scale for row in found.rows] == [1, 1]
    found = compare_anchors(small_detector("retinanet", **KINDS["unresized"]), dataset)
    assert {row.input_scale for row in found.rows} == {1}


def test_levels_that_cannot_be_told_apart_are_an_error_as_it_is():
    with pytest.raises(ValueError, match="MobileNet"):
        compare_anchors(stock("fasterrcnn_mobilenet_v3_large_fpn"), small_objects(3))


def test_hand_made_anchors_are_scaled_about_their_centres():
    model = small_detector()
    generator = model.anchor_generator
    generator.cell_anchors = [
        torch.tensor([[1.0, 2, 1 + 8 * 2**i, 2 + 16 * 2**i]] * 3) for i in range(4)
    ]
    dataset = draw_dataset(np.random.default_rng(0))
    row = compare_anchors(model, dataset).rows[1]
    assert row.anchor_sizes == ()
    assert row.different_anchors == (1, 1, 1, 1)
    adapted = adapt_detector(copy.deepcopy(model), row)
    assert estimate_alpha_for(adapted, dataset).counts == row.estimate.counts


def test_factors_change_no_row():
    model, dataset = resizing(), small_objects(10)
    expected = compare_anchors(model, dataset)
    assert compare_anchors(patch_detector(model, 0.5), dataset) == expected
    assert model.backbone.fpn.alpha.tolist() == [0.5, 0.5]


def test_a_head_that_does_not_fit_its_anchors_is_named():
    model = stock("retinanet_resnet50_fpn")
    model.anchor_generator = AnchorGenerator(((8,), (16,), (32,), (64,), (128,)))
    with pytest.raises(ValueError, match="expected 9 anchors per cell, as the head has, found 3"):
        compare_anchors(model, small_objects(3))


def test_findings_on_crowded_images_and_where_all_fits():
    dense = [((480, 640), torch.tensor([[10.0 + i, 10, 18 + i, 18] for i in range(350)]))]
    found = compare_anchors(resizing(), dense).findings()
    assert found[0].endswith("max_objects=350)")
    assert any("300 detections per image" in text for text in found)
    assert any("torchmetrics 100" in text and "evaluate_tiny 200" in text for text in found)
    fits = [((480, 640), torch.tensor([[96.0, 96, 160, 160]])) for _ in range(50)]
    assert compare_anchors(resizing(), fits).findings() == []


def test_boxes_are_counted_by_size_and_the_bins_at_both_ends_take_the_rest():
    sides = [2, 4, 5, 6, 300, 400, 500]
    boxes = torch.tensor([[10.0, 10, 10 + side, 10 + side] for side in sides])
    found = compare_anchors(resizing("faster"), [((600, 600), boxes)])
    assert found.size_edges[:3] == pytest.approx((4, 5.657, 8), abs=1e-3)
    assert found.size_edges[-2:] == pytest.approx((256, 362.04), abs=1e-2)
    assert found.boxes_by_size[:2] == (3, 1)
    assert found.boxes_by_size[2:] == (*(0,) * (len(found.size_edges) - 4), 3)


def test_half_an_anchor_is_reached_by_it():
    model = small_detector("retinanet", **KINDS["unresized"])
    generator = AnchorGenerator(((16,), (32,), (64,), (128,)), ((1.0,),) * 4)
    model.anchor_generator, model.head.classification_head.num_anchors = generator, 1
    # Anchors lie around the points 0, 8, 16, ... of the finest level: IoU is one half.
    found = compare_anchors(model, [((64, 64), torch.tensor([[24.0, 24, 40, 32]]))])
    assert found.rows[0].estimate.iou_histogram[50] == 1
    assert found.rows[0].reached == sum(found.reached_by_size[0]) == 1
