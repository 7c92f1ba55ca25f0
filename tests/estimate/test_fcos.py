from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOS

from alphafpn import estimate_alpha_for
from alphafpn.estimate import fcos as module
from alphafpn.estimate.fcos import RangeMatcher, owned_boxes
from tests import oracle
from tests.anchor_sets import seeds
from tests.detectors import small_detector

CPU = torch.device("cpu")


@settings(max_examples=50, deadline=None)
@given(seed=seeds, sizes=st.lists(st.integers(1, 200), min_size=2, max_size=6, unique=True))
@example(seed=0, sizes=[8, 16, 32, 64, 128])
@example(seed=0, sizes=[8, 32])  # a gap between 64 and 128
@example(seed=0, sizes=[8, 12])  # an overlap
def test_fcos_levels_are_those_of_its_ranges(seed, sizes):
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 100, (200, 2))
    boxes = np.concatenate([low, low + np.exp(rng.uniform(0, 7, (200, 2)))], 1)
    boxes = torch.tensor(boxes, dtype=torch.float32)
    level, iou = RangeMatcher(sorted(sizes), CPU).match(boxes)
    assert level.tolist() == oracle.fcos_levels(sorted(sizes), boxes)
    assert not iou.any()


def test_ranges_follow_the_width_of_an_anchor():
    model = small_detector("fcos", min_size=256, max_size=256)
    model.anchor_generator = AnchorGenerator(((8,), (16,), (32,), (64,)), ((4.0,),) * 4)
    sides = torch.linspace(2.5, 250, 90)[:, None]
    boxes = torch.cat([torch.zeros(90, 2), sides, sides / 2], 1)
    counts = estimate_alpha_for(model, [((256, 256), boxes)]).counts
    # Anchors of 8 pixels and a ratio of 4 are 4 wide and 16 high.
    levels = oracle.fcos_levels([4, 8, 16, 32], boxes)
    assert counts == tuple(levels.count(i) for i in range(4))
    assert sum(n > 0 for n in counts) > 1


class Head:
    """In place of FCOS's head: the loss is which box each location belongs to."""

    def compute_loss(self, targets, head_outputs, anchors, matched):
        return matched


def own_owners(anchors, boxes, radius):
    """What torchvision's loss assigns to each location."""
    fcos = FCOS.__new__(FCOS)
    torch.nn.Module.__init__(fcos)
    fcos.head, fcos.center_sampling_radius = Head(), radius
    numbers = [len(level) for level in anchors]
    (matched,) = fcos.compute_loss([{"boxes": boxes}], {}, [torch.cat(anchors)], numbers)
    return matched.tolist()


def test_fcos_levels_are_those_that_its_own_loss_gives():
    # Each box lies with its centre on an anchor point of every level; the loss then gives this
    # point to the box on exactly one level.
    sizes = [8, 16, 32, 64, 128]
    centres = torch.tensor([[512.0, 512, 512, 512]])
    anchors = [centres + torch.tensor([[-s / 2, -s / 2, s / 2, s / 2]]) for s in sizes]
    rng = np.random.default_rng(0)
    half = torch.tensor(np.exp(rng.uniform(0, 6.2, (300, 2))), dtype=torch.float32)
    boxes = torch.cat([512 - half, 512 + half], 1)
    level, _ = RangeMatcher(sizes, CPU).match(boxes)
    for box, mine in zip(boxes, level.tolist(), strict=True):
        matched = own_owners(anchors, box[None], 1.5)
        assert [i for i, owner in enumerate(matched) if owner >= 0] == [mine]


def scene(rng, number, largest, whole):
    """Whole numbers put boxes on locations and borders; large ones make areas tie in float32."""
    low = rng.uniform(-10, 60, (number, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.5, largest, (number, 2))], 1)
    return torch.tensor(boxes.round() if whole else boxes, dtype=torch.float32)


def place(cell, stride, grid):
    """Anchors [N, 4] with the one cell, on a grid."""
    y, x = torch.meshgrid(
        *(torch.arange(n) * s for n, s in zip(grid, stride, strict=True)), indexing="ij"
    )
    return torch.stack([x, y, x, y], -1).view(-1, 4) + cell


scenes = {
    "seed": seeds,
    "largest": st.sampled_from([20.0, 100.0, 12000.0]),
    "whole": st.booleans(),
    "sizes": st.lists(st.integers(1, 40), min_size=1, max_size=4),
    "stride": st.integers(1, 16),
    "radius": st.sampled_from([0.3, 1.5, 1.5 / 0.37, 6.0]),
}


@settings(max_examples=40, deadline=None)
@given(**scenes, number=st.sampled_from([1, 3, 12]))
@example(seed=0, largest=20.0, whole=True, sizes=[4, 8], stride=4, radius=1.5, number=12)
@example(seed=0, largest=12000.0, whole=True, sizes=[2000], stride=16, radius=6.0, number=12)
def test_the_literal_owners_are_those_of_fcos_own_loss(
    seed, largest, whole, sizes, stride, radius, number
):
    boxes = scene(np.random.default_rng(seed), number, largest, whole)
    anchors = [
        place((torch.tensor([-size, -size, size, size]) / 2).round(), (step, step + 1), (grid, 4))
        for size, step, grid in zip(sizes, (stride, 2 * stride, 40, 64), (5, 3, 2, 1), strict=False)
    ]
    assert oracle.fcos_owners(anchors, boxes, radius) == own_owners(anchors, boxes, radius)


@settings(max_examples=40, deadline=None)
@given(**scenes, numbers=st.lists(st.sampled_from([0, 1, 3, 12]), max_size=5), block=seeds)
@example(
    seed=0, largest=100.0, whole=True, sizes=[4, 8], stride=4, radius=1.5, numbers=[9] * 5, block=0
)
@example(
    seed=0, largest=12000.0, whole=True, sizes=[999], stride=16, radius=6.0, numbers=[12], block=9
)
def test_owned_boxes_are_those_of_the_literal_owners(
    seed, largest, whole, sizes, stride, radius, numbers, block
):
    """Images on two kinds of grid, in blocks of any size."""
    rng = np.random.default_rng(seed)
    images = [scene(rng, number, largest, whole) for number in numbers]
    kinds = [int(rng.integers(2)) for _ in images]
    cells = [(torch.tensor([[-size, -size, size, size]]) / 2).round() for size in sizes]
    strides = [[(s, s + kind) for s in (stride, 2 * stride, 40, 64)] for kind in (0, 1)]
    grids = [[(n, n + kind) for n in (5, 3, 2, 1)] for kind in (1, 0)]
    expected = []
    for boxes, kind in zip(images, kinds, strict=True):
        levels = zip(cells, strides[kind], grids[kind], strict=False)
        owners = oracle.fcos_owners([place(*level) for level in levels], boxes, radius)
        expected += [index in owners for index in range(len(boxes))]
    index = torch.arange(len(images)).repeat_interleave(torch.tensor(numbers, dtype=torch.int64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", 1 + block % 20)
        found = owned_boxes(
            torch.cat([*images, torch.zeros(0, 4)]),
            index,
            torch.tensor(kinds, dtype=torch.int64)[index],
            cells,
            torch.tensor(strides, dtype=torch.float64)[:, : len(cells)],
            torch.tensor(grids)[:, : len(cells)],
            radius,
        )
    assert found.tolist() == expected


def test_the_size_of_an_anchor_is_its_width_as_in_fcos_own_loss():
    cell, stride, grid = torch.tensor([[-4.0, -12.0, 4.0, 12.0]]), (20, 20), (5, 5)
    for away in (3.5, 4.5, 5.5, 9.5):
        # Around a point that is so far from a location; only this one may be in reach.
        box = torch.tensor([[40 + away - 10, 30, 40 + away + 10, 50]])
        zero = torch.zeros(1, dtype=torch.int64)
        found = owned_boxes(
            box, zero, zero, [cell], torch.tensor([[stride]]), torch.tensor([[grid]]), 0.5
        )
        owners = own_owners([place(cell, stride, grid)], box, 0.5)
        assert found.tolist() == [0 in owners] == [away < 4]


def test_a_box_on_the_border_of_two_ranges_is_the_coarser_levels():
    # Every anchor point but the exact centre is farther from some side than half the longer side.
    boxes = torch.tensor([[0.0, 0, 128, 10], [0, 0, 127.9, 10]])
    assert RangeMatcher([8, 16], CPU).match(boxes)[0].tolist() == [1, 0]


def owned(boxes, sizes, radius):
    """On levels with locations every 10, 20, ... pixels."""
    steps = [10 * 2**i for i in range(len(sizes))]
    return owned_boxes(
        torch.tensor(boxes),
        torch.zeros(len(boxes), dtype=torch.int64),
        torch.zeros(len(boxes), dtype=torch.int64),
        [torch.tensor([[-size, -size, size, size]]) / 2 for size in sizes],
        torch.tensor([[(step, step) for step in steps]]),
        torch.tensor([[(200 // step, 200 // step) for step in steps]]),
        radius,
    ).tolist()


def test_the_smaller_of_two_boxes_owns_the_only_location():
    wide, tall = [-5.0, 100, 25, 120], [0.0, 70, 20, 150]
    assert owned([wide, tall], [8], 0.5) == [True, False]
    assert owned([tall, wide], [8], 0.5) == [False, True]
    left, right = [100.0, -5, 120, 25], [70.0, 0, 150, 20]
    assert owned([right, left], [8], 0.5) == [False, True]


def test_no_level_has_the_border_of_its_range():
    # The only location in reach is the centre, 64 pixels from the sides: 8 * 8 and 4 * 16.
    for half, expected in ((63.9, True), (64, False), (64.1, True)):
        assert owned([[100.0 - half, 90, 100 + half, 110]], [8, 16], 0.3) == [expected]
        assert owned([[90.0, 100 - half, 110, 100 + half]], [8, 16], 0.3) == [expected]
