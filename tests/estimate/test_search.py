from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from torchvision.ops import box_iou

from alphafpn.estimate import search
from alphafpn.estimate.search import SearchMatcher, pair_iou
from tests import oracle
from tests.anchor_sets import draw_boxes, draw_layout, kinds, seeds

CPU = torch.device("cpu")


@settings(max_examples=25, deadline=None)
@given(seed=seeds, kind=kinds)
def test_search_matcher_equals_brute_force(seed, kind):
    rng = np.random.default_rng(seed)
    layout = draw_layout(rng, kind)
    levels = [torch.tensor(rng.normal(a, 0.5), dtype=torch.float32) for a in layout.anchors()]
    levels = [torch.cat([a[:, :2], a[:, :2] + (a[:, 2:] - a[:, :2]).abs()], 1) for a in levels]
    boxes = draw_boxes(rng, layout, 70)
    found = SearchMatcher(levels, torch.float32, CPU).match(boxes)
    for g, ious in enumerate(oracle.level_ious(levels, boxes)):
        assert found[0][g] == oracle.best_level(ious)
        assert found[1][g] == torch.tensor(ious).max()


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_pair_iou_equals_box_iou_in_every_bit(seed):
    rng = np.random.default_rng(seed)
    corners = rng.normal(0, 30, (2, 25, 2))
    for types in ((torch.float32,) * 2, (torch.float64,) * 2, (torch.float32, torch.float64)):
        boxes, anchors = (
            torch.tensor(np.concatenate([c, c + rng.exponential(20, c.shape)], 1), dtype=t)
            for c, t in zip(corners, types, strict=True)
        )
        found = pair_iou(boxes[:, :, None].unbind(1), anchors.unbind(1))
        assert torch.equal(found, box_iou(boxes, anchors))


def test_the_search_holds_few_pairs_at_once(monkeypatch):
    # Many anchors and many boxes: no more pairs are evaluated at once than the constant says.
    sizes = []

    def spy(boxes, anchors):
        sizes.append(boxes[0].numel() * anchors[0].numel())
        return torch.zeros(boxes[0].shape[0], anchors[0].shape[-1])

    monkeypatch.setattr(search, "pair_iou", spy)
    levels = [torch.rand(1_000_000, 4), torch.rand(3, 4)]
    SearchMatcher(levels, torch.float32, CPU).match(torch.rand(70, 4))
    assert max(sizes) <= search.PAIRS
    assert sum(sizes) == 70 * 1_000_003


def test_other_devices_take_half_a_gibibyte_at_once():
    matcher = SearchMatcher([torch.rand(3, 4)], torch.float32, torch.device("meta"))
    # About eight temporaries of four bytes for each pair.
    assert matcher.pairs * 8 * 4 == 2**29
    assert matcher.rows == 512
