"""The scale that is found, and the images and boxes that a row counts."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator

from alphafpn import compare_anchors
from tests.detectors import small_detector
from tests.test_comparison import KINDS, resizing, small_objects


def one_anchor(*sides):
    """A detector that does not resize, with one hand-made anchor per cell on each of four levels.

    Its anchors are not rounded, so every scale gives another anchor.
    """
    model = small_detector(**KINDS["unresized"])
    generator = AnchorGenerator(((16,), (32,), (64,), (128,)), ((1.0,),) * 4)
    cells = [torch.tensor([[-side / 2, -side / 2, side / 2, side / 2]]) for side in sides]
    generator.cell_anchors = cells
    model.anchor_generator, model.head.classification_head.num_anchors = generator, 1
    return model


def best_scale(model, *boxes, image=1024):
    comparison = compare_anchors(model, [((image, image), torch.tensor([b])) for b in boxes])
    assert comparison.rows[1].input_scale == 1
    return comparison.rows[1].anchor_scale


def square(side, centre=512.0):
    return [centre - side / 2, centre - side / 2, centre + side / 2, centre + side / 2]


@pytest.mark.parametrize(
    ("side", "scale"),
    [
        # Anchors of 1600 pixels or more. The share of a smaller box in its anchor is its IoU.
        (70.75, 1 / 16),  # above .5 with 1/16, and not with .0626
        (68.0, 0.0671),  # needs anchors below 1/16 for .5, so .4 decides: 68 / 107.4 squared
        (200.0, 0.176),
        (1150.0, 1.0),  # .52 as it is
    ],
)
def test_the_smallest_scales(side, scale):
    model = one_anchor(1600.0, 3200.0, 6400.0, 12800.0)
    assert best_scale(model, square(side, 2048.0), image=4096) == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize(
    ("side", "scale"),
    [(282.5, 4.0), (300.0, 3.8), (80.0, 1.14), (160.0, 2.27), (205.3, 2.91), (450.0, 1.0)],
)
def test_the_largest_scales(side, scale):
    model = one_anchor(20.0, 30.0, 40.0, 50.0)
    assert best_scale(model, square(side)) == scale


def test_boxes_that_no_anchor_reaches_leave_the_scale():
    # Sizes of 16 and 22 are equal at small scales, which no box may choose.
    model = small_detector(sizes=(16, 22, 64, 128))
    model.anchor_generator = AnchorGenerator(((16,), (22,), (64,), (128,)), ((1.0,),) * 4)
    model.head.classification_head.num_anchors = 1
    assert best_scale(model, [10.0, 10, 12, 310], image=320) == 1


def test_an_anchor_that_just_reaches_a_box_keeps_the_scale():
    # Half of the anchor of 16 pixels around the point (32, 32); smaller anchors reach it too.
    model = one_anchor(16.0, 32.0, 64.0, 128.0)
    assert best_scale(model, [24.0, 24, 40, 32], image=64) == 1


MANY = [((64, 64), torch.tensor([[10.0, 10, 30, 34]]).repeat(500, 1))] * 100


def test_all_boxes_of_fcos_compete():
    found = compare_anchors(small_detector("fcos", **KINDS["fcos"]), MANY)
    assert sum(found.boxes_by_size) == 50_000
    assert found.rows[0].reached == 1 / 500  # one box in each image owns the locations


def test_very_many_boxes_are_sampled_by_size_and_rows_count_all():
    found = compare_anchors(small_detector(**KINDS["unresized"]), MANY)
    assert 20_000 <= sum(found.boxes_by_size) <= 40_000
    assert {row.estimate.num_boxes for row in found.rows} == {50_000}


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_the_boxes_by_size_are_those_of_the_rows(kind):
    found = compare_anchors(resizing(kind), small_objects(10, size=20.0))
    total = sum(found.boxes_by_size)
    for row, reached in zip(found.rows, found.reached_by_size, strict=True):
        assert sum(reached) / total == pytest.approx(row.reached)


def test_the_size_of_a_box_is_the_root_of_its_area():
    box = torch.tensor([[20.0, 300, 24, 325]])  # 4 x 25 pixels
    found = compare_anchors(resizing("faster"), [((480, 640), box)])
    (size,) = (low for low, n in zip(found.size_edges, found.boxes_by_size, strict=False) if n)
    assert size == 8  # the bin from 8 to 11.3


def test_the_cost_is_that_of_the_image_of_median_size(capsys):
    box = torch.tensor([[10.0, 10, 18, 18]])
    sizes = [(480, 480), (480, 660), (480, 1000), (480, 540), (480, 800)]

    def costs(*sizes):
        rows = compare_anchors(resizing("fcos"), [(size, box) for size in sizes]).rows
        return [row.cost for row in rows]

    alone = [costs(size) for size in sizes]
    assert len({tuple(each) for each in alone}) == len(sizes)
    assert costs(*sizes) == alone[1]
    assert costs(*sizes[:2]) == alone[0]  # the smaller of the two in the middle
    assert capsys.readouterr().out == ""
