from __future__ import annotations

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torchvision.models.detection.fcos import FCOS

from alphafpn.estimate.fcos import RangeMatcher
from tests import oracle
from tests.anchor_sets import seeds

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


def test_fcos_levels_are_those_that_its_own_loss_gives():
    # Each box lies with its centre on an anchor point of every level; the loss then gives this
    # point to the box on exactly one level.
    class Head:
        def compute_loss(self, targets, head_outputs, anchors, matched):
            return matched

    sizes = [8, 16, 32, 64, 128]
    centres = torch.tensor([[512.0, 512, 512, 512]])
    anchors = [centres + torch.tensor([[-s / 2, -s / 2, s / 2, s / 2]]) for s in sizes]
    fcos = FCOS.__new__(FCOS)
    torch.nn.Module.__init__(fcos)
    fcos.head, fcos.center_sampling_radius = Head(), 1.5
    rng = np.random.default_rng(0)
    half = torch.tensor(np.exp(rng.uniform(0, 6.2, (300, 2))), dtype=torch.float32)
    boxes = torch.cat([512 - half, 512 + half], 1)
    level, _ = RangeMatcher(sizes, CPU).match(boxes)
    for box, mine in zip(boxes, level.tolist(), strict=True):
        (matched,) = fcos.compute_loss([{"boxes": box[None]}], {}, [torch.cat(anchors)], [1] * 5)
        assert (matched >= 0).nonzero().flatten().tolist() == [mine]


def test_a_box_on_the_border_of_two_ranges_is_the_coarser_levels():
    # Every anchor point but the exact centre is farther from some side than half the longer side.
    boxes = torch.tensor([[0.0, 0, 128, 10], [0, 0, 127.9, 10]])
    assert RangeMatcher([8, 16], CPU).match(boxes)[0].tolist() == [1, 0]
