from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from alphafpn import AnchorLayout
from alphafpn.estimate import irregular, matcher
from alphafpn.estimate.irregular import SearchMatcher, pair_iou
from alphafpn.estimate.matcher import GridMatcher
from tests import oracle
from tests.anchor_sets import (
    FASTER,
    cell_anchors,
    draw,
    draw_boxes,
    draw_layout,
    kinds,
    legacy_layout,
    seeds,
)

CPU = torch.device("cpu")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
dtypes = st.sampled_from([torch.float32, torch.float32, torch.float64])


def grid_matcher(layout, dtype=torch.float32, device=CPU):
    return GridMatcher(layout.cell_anchors, [layout], dtype, device)


def assert_equal_to_brute_force(levels, boxes, found, tolerance=3e-6):
    """Levels of clear boxes, all ties, and every IoU."""
    level, iou = found
    assert level.dtype == torch.int64
    same_type = all(anchors.dtype == boxes.dtype for anchors in levels)
    for g, ious in enumerate(oracle.level_ious(levels, boxes)):
        first, second = sorted(ious, reverse=True)[:2]
        # Brute force in mixed types rounds areas, so its ties are not all real.
        if first - second > 1e-6 or (first == second and same_type):
            assert level[g] == oracle.best_level(ious), (g, boxes[g].tolist(), ious)
        assert iou[g] == pytest.approx(first, abs=tolerance)


def noise(levels):
    """How far the rounding of the anchors' own corners moves an IoU, in pixels of 4."""
    largest = max(float(anchors.abs().max()) for anchors in levels)
    return 3e-6 + 4 * torch.finfo(torch.float32).eps * largest


@settings(max_examples=150, deadline=None)
@given(seed=seeds, kind=kinds, anchor_type=dtypes, box_type=dtypes)
def test_grid_matcher_equals_brute_force(seed, kind, anchor_type, box_type):
    rng = np.random.default_rng(seed)
    layout = draw_layout(rng, kind, anchor_type)
    boxes = draw_boxes(rng, layout, 30, box_type)
    wide = torch.promote_types(anchor_type, box_type)
    levels = layout.anchors()
    found = grid_matcher(layout, wide).match(boxes)
    assert found[1].dtype == wide
    assert_equal_to_brute_force(levels, boxes, found, noise(levels))


def far_layout(columns):
    """A strip of cells 4 pixels apart, with torchvision's anchors of the smallest sizes."""
    cells = [
        torch.tensor([[-6.0, -3, 6, 3], [-4, -4, 4, 4], [-3, -6, 3, 6]]) * 2**i for i in (0, 1)
    ]
    return AnchorLayout(cells, [4, 8], [(8, columns), (4, columns // 2)], 2)


def test_boxes_halfway_between_far_cells():
    # At 20,000 pixels float32 resolves 0.002 pixels, and half that is lost when corners are added:
    # with the centre between two cells, the farther one is chosen. This matters if the two levels
    # are nearly balanced, so draw many boxes and keep the most balanced ones.
    rng = np.random.default_rng(0)
    layout = far_layout(5000)
    count = 400_000
    x = rng.integers(4800, 4990, count) * 4 + 2 + rng.integers(-1, 2, count) * 2.0**-10
    y = rng.integers(1, 7, count) * 4.0 + rng.uniform(0, 4, count)
    width, height = rng.uniform(8, 24, (2, count))
    boxes = np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], axis=1)
    boxes = torch.tensor(boxes, dtype=torch.float32)
    parts = zip(layout.cell_anchors, layout.strides, layout.grid_sizes, strict=True)
    first, second = (
        GridMatcher(
            [cells], [AnchorLayout([cells] * 2, [stride] * 2, [size] * 2, 2)], torch.float64, CPU
        ).match(boxes)[1]
        for cells, stride, size in parts
    )
    boxes = boxes[(first - second).abs() < 4e-4]
    assert len(boxes) > 100
    # Only the near part of the strip can overlap: the brute force needs no more.
    near = [anchors[anchors[:, 0] > 19_000] for anchors in layout.anchors()]
    assert sum(map(oracle.is_clear, oracle.level_ious(near, boxes))) > 100
    assert_equal_to_brute_force(near, boxes, grid_matcher(layout).match(boxes), 2e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["torchvision", "legacy", "scattered", "one shape"])
def test_a_box_is_matched_alike_alone_and_in_any_block(monkeypatch, device, kind):
    rng = np.random.default_rng(1)
    layout = draw_layout(rng, kind)
    boxes = torch.cat([draw_boxes(rng, layout, 200), torch.tensor([[1e6, 0, 1e6 + 9, 9]])])
    boxes, device = boxes.to(device), torch.device(device)

    def found(boxes):
        searched = SearchMatcher(layout.anchors(), torch.float32, device)
        return *grid_matcher(layout, device=device).match(boxes), *searched.match(boxes)

    expected = found(boxes)
    alone = map(torch.cat, zip(*(found(box[None]) for box in boxes), strict=True))
    assert all(map(torch.equal, alone, expected))
    for module, name, value in (
        (matcher, "CPU_BLOCK", 7), (matcher, "OTHER_BLOCK", 7), (matcher, "PAIRS", 50),
        (irregular, "PAIRS", 50), (irregular, "SEARCH_ROWS", 3),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    assert all(map(torch.equal, found(boxes), expected))


@settings(max_examples=25, deadline=None)
@given(seed=seeds, kind=kinds)
def test_layouts_in_one_matcher_equal_matchers_of_their_own(seed, kind):
    rng = np.random.default_rng(seed)
    first = draw_layout(rng, kind)
    layouts = [first]
    for _ in range(2):
        grids = [tuple(int(n) for n in rng.integers(1, 12, 2)) for _ in first.cell_anchors]
        strides = [(float(y), float(x)) for y, x in rng.integers(3, 40, (len(grids), 2))]
        layouts.append(AnchorLayout(first.cell_anchors, strides, grids, 2))
    boxes = torch.cat([draw_boxes(rng, layout, 20) for layout in layouts])
    which = torch.tensor(rng.integers(0, 3, len(boxes)))
    together = GridMatcher(first.cell_anchors, layouts, torch.float32, CPU)
    level, iou = together.match(boxes, which)
    for k, layout in enumerate(layouts):
        levels = layout.anchors()
        mine = which == k
        assert_equal_to_brute_force(levels, boxes[mine], (level[mine], iou[mine]), noise(levels))


def test_exact_ties_go_to_the_finest_level():
    # Both levels hold an anchor of the same IoU in every bit.
    cell = torch.tensor([[-8.0, -8, 8, 8]])
    wide, high = torch.tensor([[-16.0, -4, 16, 4]]), torch.tensor([[-4.0, -16, 4, 16]])
    box = torch.tensor([[-8.0, -8, 8, 8], [24, 24, 40, 40]])
    for cells in ([wide, high], [high, wide], [torch.cat([wide, 9 * cell]), high]):
        layout = AnchorLayout(cells, [32, 32], [(2, 2), (2, 2)], 2)
        level, iou = grid_matcher(layout).match(box)
        assert level.tolist() == [0, 0]
        assert iou[0] == pytest.approx(1 / 3)


def test_ties_between_other_shapes_equal_brute_force():
    # A square on its centre overlaps wide anchors as it overlaps high ones.
    wide, high = cell_anchors([(16, 8)], [(4, 4)]), cell_anchors([(8, 16)], [(4, 4)])
    layout = AnchorLayout([wide, high], [8, 16], [(16, 16), (8, 8)], 2)
    rng = np.random.default_rng(0)
    centre, side = rng.integers(0, 32, (900, 2)) * 4, rng.integers(2, 20, (900, 1))
    boxes = torch.tensor(np.concatenate([centre - side / 2, centre + side / 2], 1)).float()
    ious = oracle.level_ious(layout.anchors(), boxes)
    assert sum(row[0] == row[1] > 0 for row in ious) > 100
    level, _ = grid_matcher(layout).match(boxes)
    assert level.tolist() == [oracle.best_level(row) for row in ious]


@pytest.mark.parametrize("kind", ["torchvision", "legacy"])
def test_a_box_that_overlaps_nothing_has_no_level(kind):
    layout = draw_layout(np.random.default_rng(0), kind)
    far = torch.tensor([[5000.0, 0, 5010, 10], [0, -900, 9, -880], [8, 8, 8, 30], [7, 7, 7, 7]])
    for one in (grid_matcher(layout), SearchMatcher(layout.anchors(), torch.float32, CPU)):
        level, iou = one.match(far)
        assert level.tolist() == [len(layout.cell_anchors)] * 4
        assert iou.tolist() == [0.0] * 4


def test_boxes_that_touch_an_anchor_do_not_overlap_it():
    layout = AnchorLayout([torch.tensor([[0.0, 0, 8, 8]])] * 2, [64, 64], [(1, 1), (1, 1)], 2)
    boxes = torch.tensor([[8.0, 0, 16, 8], [0, 8, 8, 9], [-3, -3, 0, 0], [7.5, 7.5, 9, 9]])
    level, _ = grid_matcher(layout).match(boxes)
    assert level.tolist() == [2, 2, 2, 0]


def test_an_iou_of_one_is_one():
    for layout in (far_layout(50), legacy_layout(FASTER, (64, 64))):
        boxes = torch.cat([anchors[::7] for anchors in layout.anchors()])
        level, iou = grid_matcher(layout).match(boxes)
        assert iou.max() <= 1
        assert iou.min() > 1 - 1e-4
        expected = [oracle.best_level(ious) for ious in oracle.level_ious(layout.anchors(), boxes)]
        assert level.tolist() == expected


def test_anchors_without_area_overlap_nothing():
    layout = AnchorLayout(
        [torch.tensor([[0.0, 0, 0, 0], [-4, -4, 4, 4]]), torch.tensor([[-8.0, 2, 8, 2]])],
        [8, 8],
        [(4, 4), (2, 2)],
        2,
    )
    boxes = torch.tensor([[0.0, 0, 0, 0], [1, 1, 5, 6], [-9, 2, 9, 2], [8, 8, 8, 8]])
    for one in (grid_matcher(layout), SearchMatcher(layout.anchors(), torch.float32, CPU)):
        level, iou = one.match(boxes)
        assert level.tolist() == [2, 0, 2, 2]
        assert iou.tolist() == pytest.approx([0, 9 / 75, 0, 0], abs=1e-6)
    nothing = AnchorLayout([torch.zeros(1, 4)] * 2, [8, 16], [(4, 4), (2, 2)], 2)
    assert grid_matcher(nothing).match(boxes)[0].tolist() == [2] * 4


def test_no_more_pairs_are_evaluated_at_once_than_the_constant_says(monkeypatch):
    pairs = []

    def spy(boxes, anchors):
        iou = irregular.pair_iou(boxes, anchors)
        pairs.append(iou.numel())
        return iou

    monkeypatch.setattr(matcher, "pair_iou", spy)
    monkeypatch.setattr(matcher, "PAIRS", 100)
    layout, boxes = draw(0, "torchvision")
    # Each box lies halfway between two levels of the same cells, so all are matched again.
    layout = AnchorLayout([layout.cell_anchors[0]] * 2, [4, 4], [(20, 20)] * 2, 2)
    grid_matcher(layout).match(boxes)
    assert sum(pairs) == len(boxes) * 2 * 9 * len(layout.cell_anchors[0])
    assert max(pairs) <= 100


def test_distant_boxes_that_are_nearly_balanced_are_matched_as_brute_force_does():
    cells = [torch.tensor([[-4.0, -4, 4, 4]]), torch.tensor([[-8.0, -8, 8, 8]])]
    rng = np.random.default_rng(0)
    for size, corner in (((8, 500), (1900.0, 4.0)), ((500, 8), (4.0, 1900.0))):
        layout = AnchorLayout(cells, [4, 4], [size, size], 2)
        # As much IoU with a square of 8 as with one of 16 pixels, but for some millionths.
        side = 128**0.5 + rng.uniform(-1e-4, 1e-4, (500, 1))
        low = np.array(corner) + rng.uniform(0, 4, (500, 2))
        boxes = torch.tensor(np.concatenate([low, low + side], 1)).float()
        levels = layout.anchors()
        assert_equal_to_brute_force(levels, boxes, grid_matcher(layout).match(boxes), 1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_what_the_cpu_finds():
    rng = np.random.default_rng(3)
    for kind in ("torchvision", "legacy", "densified"):
        layout = draw_layout(rng, kind)
        boxes = draw_boxes(rng, layout, 20_000)
        level, iou = grid_matcher(layout).match(boxes)
        gpu = grid_matcher(layout, device=torch.device("cuda"))
        found = gpu.match(boxes.cuda())
        assert torch.equal(found[0].cpu(), level)
        assert torch.equal(found[1].cpu(), iou)


# Any anchors


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

    monkeypatch.setattr(irregular, "pair_iou", spy)
    levels = [torch.rand(1_000_000, 4), torch.rand(3, 4)]
    SearchMatcher(levels, torch.float32, CPU).match(torch.rand(70, 4))
    assert max(sizes) <= irregular.PAIRS
    assert sum(sizes) == 70 * 1_000_003


def test_other_devices_take_half_a_gibibyte_at_once():
    one = SearchMatcher([torch.rand(3, 4)], torch.float32, torch.device("meta"))
    # About eight temporaries of four bytes for each pair.
    assert one.pairs * 8 * 4 == 2**29
    assert one.rows == 512
