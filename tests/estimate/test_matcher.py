from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from alphafpn import AnchorLayout
from alphafpn.estimate import matcher as grid
from alphafpn.estimate import search
from alphafpn.estimate.grids import recognise_grid
from alphafpn.estimate.matcher import GridMatcher
from alphafpn.estimate.search import SearchMatcher
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


def grid_matcher(layout, dtype=torch.float32):
    return GridMatcher([layout._levels], dtype, CPU)


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


@settings(max_examples=50, deadline=None)
@given(seed=seeds, kind=kinds, shift=st.sampled_from([1.0, 777.25, 19_000.3]))
def test_rounded_anchors_on_a_grid_are_matched_by_their_own_corners(seed, kind, shift):
    rng = np.random.default_rng(seed)
    layout = draw_layout(rng, kind)
    levels = [anchors + shift for anchors in layout.anchors()]
    grids = [recognise_grid(anchors) for anchors in levels]
    if None in grids:
        return
    boxes = draw_boxes(rng, layout, 30) + shift
    found = GridMatcher([grids], torch.float32, CPU).match(boxes)
    assert_equal_to_brute_force(levels, boxes, found, noise(levels))


def far_layout(columns):
    """A strip of cells 4 pixels apart, with torchvision's anchors of the smallest sizes."""
    cells = [
        torch.tensor([[-6.0, -3, 6, 3], [-4, -4, 4, 4], [-3, -6, 3, 6]]) * 2**i for i in (0, 1)
    ]
    return AnchorLayout(cells, [4, 8], [(8, columns), (4, columns // 2)], 2)


def test_boxes_halfway_between_far_cells():
    # At 20,000 pixels float32 resolves 0.002 pixels, and half that is lost when corners are added:
    # with the centre between two cells, the farther one is chosen. This matters where the two
    # levels are nearly balanced, so draw many boxes and keep the most balanced ones.
    rng = np.random.default_rng(0)
    layout = far_layout(5000)
    count = 400_000
    x = rng.integers(4800, 4990, count) * 4 + 2 + rng.integers(-1, 2, count) * 2.0**-10
    y = rng.integers(1, 7, count) * 4.0 + rng.uniform(0, 4, count)
    width, height = rng.uniform(8, 24, (2, count))
    boxes = np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], axis=1)
    boxes = torch.tensor(boxes, dtype=torch.float32)
    exact = grid_matcher(layout, torch.float64)
    exact.tolerance = 2e-4
    one_layout, level = torch.zeros(2, count, dtype=torch.int64)
    boxes = boxes[exact._match_fast(boxes, one_layout, level, torch.empty(count).double())]
    assert len(boxes) > 100
    # Only the near part of the strip can overlap: the brute force needs no more.
    near = [anchors[anchors[:, 0] > 19_000] for anchors in layout.anchors()]
    assert sum(map(oracle.is_clear, oracle.level_ious(near, boxes))) > 100
    assert_equal_to_brute_force(near, boxes, grid_matcher(layout).match(boxes), 2e-3)


def test_stored_anchors_are_looked_up_by_position_and_cell():
    # Noise that no arithmetic of cells and strides gives again.
    noise = torch.Generator().manual_seed(0)
    layout = legacy_layout(FASTER, (192, 256))
    levels = [
        anchors + torch.randint(-4, 5, anchors.shape, generator=noise) * 2.0**-20
        for anchors in layout.anchors()
    ]
    levels = [torch.cat([a[:3], b[3:]]) for a, b in zip(layout.anchors(), levels, strict=True)]
    grids = [recognise_grid(anchors) for anchors in levels]
    assert all(grid.anchors is anchors for grid, anchors in zip(grids, levels, strict=True))
    assert [len(grid.cells) for grid in grids] == [3] * 5
    # Also on the last positions, where a neighbour's anchors would not stand in.
    boxes = torch.cat(
        [draw_boxes(np.random.default_rng(0), layout, 300), *(anchors[-6:] for anchors in levels)]
    )
    matcher = GridMatcher([grids], torch.float32, CPU)
    matcher.tolerance = math.inf
    level, iou = matcher.match(boxes)
    expected = SearchMatcher(levels, torch.float32, CPU).match(boxes)
    assert torch.equal(level, expected[0])
    assert torch.equal(iou, expected[1])


def test_large_boxes_over_far_rounded_anchors():
    # All anchors inside a box have its best IoU but for the rounding of their corners, 0.001 pixels
    # here; the two levels differ by less.
    cells = [
        cell_anchors([(10.3, 10.3)], [(0.0, 0.0)]),
        cell_anchors([(10.3001, 10.3)], [(0.0, 0.0)]),
    ]
    layout = AnchorLayout(cells, [4, 8], [(8, 4000), (4, 2000)], 2)
    rng = np.random.default_rng(0)
    x, y = rng.uniform(15_000, 15_700, 100), rng.uniform(0, 8, 100)
    width, height = rng.uniform(12, 90, 100), rng.uniform(12, 30, 100)
    boxes = torch.tensor(np.stack([x, y, x + width, y + height], axis=1), dtype=torch.float32)
    levels = layout.anchors()
    assert not all(oracle.is_clear(ious) for ious in oracle.level_ious(levels, boxes))
    found, _ = grid_matcher(layout).match(boxes)
    expected = [oracle.best_level(ious) for ious in oracle.level_ious(levels, boxes)]
    assert found.tolist() == expected


@settings(max_examples=30, deadline=None)
@given(seed=seeds, kind=kinds)
def test_the_error_bound_holds(seed, kind):
    # What the fast pass alone finds, against exact arithmetic: the lead of its level is negative
    # by no more than the bound, wherever it is wrong.
    layout, boxes = draw(seed, kind)
    matcher = grid_matcher(layout)
    per_box = (boxes[:, :2] + boxes[:, 2:]).abs().amax(1) / 2 * matcher.tolerance_per_pixel
    bound = matcher.tolerance + per_box
    matcher.tolerance = matcher.tolerance_per_pixel = -1.0
    matcher._match_again = None  # not reached
    level, _ = matcher.match(boxes)
    ious = torch.stack(
        [box_iou(boxes.double(), a.double()).nan_to_num(nan=0.0).amax(1) for a in layout.anchors()]
    )
    value = ious / (1 + ious)
    lost = value.amax(0) - value.gather(0, level.clamp(max=len(value) - 1)[None])[0]
    assert (lost <= bound).all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_box_is_matched_alike_alone_and_in_any_block(monkeypatch, device):
    rng = np.random.default_rng(1)
    for kind in ("torchvision", "legacy", "scattered"):
        layout = draw_layout(rng, kind)
        boxes = torch.cat([draw_boxes(rng, layout, 300), torch.tensor([[1e6, 0, 1e6 + 9, 9]])])
        matcher = GridMatcher([layout._levels], torch.float32, torch.device(device))
        boxes = boxes.to(device)
        level, iou = matcher.match(boxes)
        alone = [matcher.match(box[None]) for box in boxes]
        assert torch.equal(torch.cat([one[0] for one in alone]), level)
        assert torch.equal(torch.cat([one[1] for one in alone]), iou)
        monkeypatch.setattr(grid, "CPU_BLOCK", 7)
        blocks = matcher.match(boxes)
        assert torch.equal(blocks[0], level)
        assert torch.equal(blocks[1], iou)


def test_small_blocks_of_pairs_change_nothing(monkeypatch):
    rng = np.random.default_rng(2)
    for kind in ("one shape", "legacy", "scattered"):
        layout = draw_layout(rng, kind)
        boxes = draw_boxes(rng, layout, 200)
        found = grid_matcher(layout).match(boxes)
        searched = SearchMatcher(layout.anchors(), torch.float32, CPU).match(boxes)
        with monkeypatch.context() as patch:
            for module in (grid, search):
                patch.setattr(module, "PAIRS", 50)
                patch.setattr(module, "SEARCH_ROWS", 3)
            again = grid_matcher(layout).match(boxes)
            searched_again = SearchMatcher(layout.anchors(), torch.float32, CPU).match(boxes)
        for a, b in ((found, again), (searched, searched_again)):
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])


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
    together = GridMatcher([layout._levels for layout in layouts], torch.float32, CPU)
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
    rng = np.random.default_rng(0)
    layout = draw_layout(rng, kind)
    far = torch.tensor([[5000.0, 0, 5010, 10], [0, -900, 9, -880], [8, 8, 8, 30], [7, 7, 7, 7]])
    for matcher in (grid_matcher(layout), SearchMatcher(layout.anchors(), torch.float32, CPU)):
        level, iou = matcher.match(far)
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
    for matcher in (grid_matcher(layout), SearchMatcher(layout.anchors(), torch.float32, CPU)):
        level, iou = matcher.match(boxes)
        assert level.tolist() == [2, 0, 2, 2]
        assert iou.tolist() == pytest.approx([0, 9 / 75, 0, 0], abs=1e-6)


def pairs_of(monkeypatch, matcher, boxes):
    """How many box-anchor pairs the second look evaluates, call by call."""
    pairs = []
    real = grid.pair_iou

    def spy(boxes, anchors):
        iou = real(boxes, anchors)
        pairs.append(iou.numel())
        return iou

    with monkeypatch.context() as patch:
        patch.setattr(grid, "pair_iou", spy)
        matcher.match(boxes)
    return pairs


def test_the_second_look_holds_few_pairs_at_once(monkeypatch):
    layout = legacy_layout(FASTER, (512, 640))
    matcher = grid_matcher(layout)
    matcher.tolerance = matcher.anchor_noise = math.inf
    # Boxes as large as the image: all anchors lie in them.
    boxes = torch.tensor([[0.0, 0, 639.7, 511.9]]).repeat(20, 1)
    pairs = pairs_of(monkeypatch, matcher, boxes)
    assert max(pairs) <= grid.PAIRS
    assert sum(pairs) > sum(len(anchors) for anchors in layout.anchors())


def test_the_second_look_takes_neighbours_of_boxes_in_doubt(monkeypatch):
    layout = AnchorLayout(
        [torch.tensor([[-4.0, -4, 4, 4]]), torch.tensor([[-8.0, -8, 8, 8]] * 2)],
        [8, 16],
        [(20, 20), (10, 10)],
        2,
    )
    half = 32**0.5  # of the side that is between 8 and 16
    clear, doubtful = [28.0, 28, 36, 36], [32 - half, 32 - half, 32 + half, 32 + half]
    matcher = grid_matcher(layout)
    assert pairs_of(monkeypatch, matcher, torch.tensor([clear] * 5)) == []
    # Nine positions with one and with two anchors.
    assert pairs_of(monkeypatch, matcher, torch.tensor([clear, doubtful, doubtful])) == [18, 36]
    # Blocks of boxes, and where one box has too many, of positions.
    matcher.tolerance = math.inf
    for limit, count, expected in (
        (90, 20, [90, 90] + [90] * 4),
        (10, 1, [9, 10, 8]),
        (1, 2, [1] * 18 + [2] * 18),
    ):
        monkeypatch.setattr(grid, "PAIRS", limit)
        assert pairs_of(monkeypatch, matcher, torch.tensor([clear] * count)) == expected


def test_only_rival_levels_are_searched_for_anchors_within_the_rounding(monkeypatch):
    # Strides that are no whole numbers: anchors have rounding of their own.
    layout = AnchorLayout(
        [torch.tensor([[-4.0, -4, 4, 4]]), torch.tensor([[-8.0, -8, 8, 8]])],
        [8.1, 16.2],
        [(20, 20), (10, 10)],
        2,
    )
    matcher = grid_matcher(layout)
    matcher.tolerance = math.inf
    clear, rival = torch.tensor([[28.0, 28, 36, 36]]), torch.tensor([[0.0, 0, 128**0.5, 128**0.5]])
    far = clear - 1000
    assert pairs_of(monkeypatch, matcher, torch.cat([clear, far])) == [18, 18]
    matcher.anchor_noise = 0.2
    wide = pairs_of(monkeypatch, matcher, rival)
    assert wide[:2] == [9, 9]
    # |11.3 - 8| / 16.2 and |16 - 11.3| / 32.4 are less than one step: two on each side.
    assert wide[2:] == [25, 25]
    # Of different sizes, in blocks: those of similar size together, each with windows of its own.
    monkeypatch.setattr(grid, "SEARCH_ROWS", 2)
    matcher.anchor_noise = 1.0
    boxes = [[0, y, side, y + side] for y, side in ((60.0, 30), (0, 9), (5, 41), (50, 8))]
    # (41 - 8) / 16.2 is up to three steps, (41 - 16) / 32.4 one.
    wide = pairs_of(monkeypatch, matcher, torch.tensor(boxes))[2:]
    assert wide == [2 * 25, 2 * 81, 2 * 25, 2 * 25]


def test_blocks_bound_the_memory_whatever_the_number_of_cores(monkeypatch):
    matcher = grid_matcher(far_layout(50))
    blocks = []

    def record(boxes, layout, level, iou):
        blocks.append(len(boxes))
        return level[:0]

    monkeypatch.setattr(matcher, "_match_fast", record)
    boxes = torch.zeros(1, 4).expand(3_000_000, 4)
    for threads in (1, 4, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        blocks.clear()
        matcher.match(boxes)
        assert sum(blocks) == len(boxes)
        # Temporaries of 10 MB for each thread, in caches of their own, and 80 MB in all.
        assert max(blocks) * grid._Workspace.ROWS * 4 < 10_000_000 * min(threads, 8)


def test_memory_is_kept_from_call_to_call():
    matcher = grid_matcher(far_layout(50))
    boxes = torch.rand(40, 4).cumsum(1)
    matcher.match(boxes)
    memory = matcher._memory
    matcher.match(boxes)
    matcher.match(boxes[:7])
    assert matcher._memory is memory
    matcher.match(torch.cat([boxes, boxes]))
    assert matcher._memory.shape == (grid._Workspace.ROWS, 80)


@pytest.mark.parametrize(("size", "corner"), [((8, 500), (900.0, 4.0)), ((500, 8), (4.0, 700.0))])
def test_doubt_grows_with_the_distance_from_the_origin(size, corner):
    cells = [torch.tensor([[-4.0, -4, 4, 4]]), torch.tensor([[-8.0, -8, 8, 8]])]
    layout = AnchorLayout(cells, [4, 4], [size, size], 2)
    boxes = torch.tensor([[*corner, corner[0] + 9, corner[1] + 10]])
    ((first, second),) = oracle.level_ious(layout.anchors(), boxes)
    # Levels are compared by I / (A + a).
    lead = first / (1 + first) - second / (1 + second)
    matcher = grid_matcher(layout)
    matcher.tolerance = 0.0
    for share, doubtful in ((0.99, []), (1.01, [0])):
        matcher.tolerance_per_pixel = share * lead / (max(corner) + (4.5 if corner[0] > 4 else 5))
        level, layout_of_box = torch.zeros(2, 1, dtype=torch.int64)
        found = matcher._match_fast(boxes, layout_of_box, level, torch.empty(1))
        assert found.tolist() == doubtful


def test_the_bound_on_the_error_by_hand():
    eps = torch.finfo(torch.float32).eps
    # Exact in all arithmetic. Farthest corner 16, shortest side 8: an index is off by 32 eps and
    # a corner by 16 eps; 4 * 48 eps / 8 on both axes, and for the code of two levels 16 * 2 eps.
    cells = [torch.tensor([[-16.0, -4, 16, 4]]), torch.tensor([[-16.0, -16, 16, 16], [0, 0, 0, 0]])]
    matcher = grid_matcher(AnchorLayout(cells, [8, 16], [(10, 20), (5, 10)], 2))
    assert matcher.exact
    assert matcher.tolerance == pytest.approx(48 * eps + 32 * eps)
    assert matcher.tolerance_per_pixel == pytest.approx(2 * 4 * 2 * eps / 8)
    assert matcher.anchor_noise == 0
    # The last column is at 90 - 4.5, so no corner is beyond 90 + 8, and an anchor is off by twice
    # the rounding of that; the centre of a cell by the decimals to which centres are compared.
    cells = [torch.tensor([[-4.0, -8, 4, 8]]), torch.tensor([[-4.0, -6, 4, 6]])]
    layout = AnchorLayout(cells, [4.5, 9], [(10, 20), (5, 10)], 2)
    matcher = grid_matcher(layout)
    index, corner, anchor = 16 * eps + 1e-4, 8 * eps + 98 * eps, 2 * 98 * eps
    assert not matcher.exact
    expected = 2 * (4 * (index + corner) + 6 * anchor) / 8 + 32 * eps
    assert matcher.tolerance == pytest.approx(expected)
    assert matcher.anchor_noise == pytest.approx(2 * 4 * 6 * anchor / 8)
    # Stored anchors keep the rounding of whatever made them: four times as much.
    stored = [
        level._replace(anchors=anchors)
        for level, anchors in zip(layout._levels, layout.anchors(), strict=True)
    ]
    matcher = GridMatcher([stored], torch.float32, CPU)
    expected = 2 * (4 * (index + corner) + 6 * 4 * anchor) / 8 + 32 * eps
    assert matcher.tolerance == pytest.approx(expected)
    assert matcher.anchor_noise == pytest.approx(2 * 4 * 6 * 4 * anchor / 8)
    # Sides of less than a pixel count, sides of nothing do not; without any, any bound will do.
    cells = [torch.tensor([[4.0, 4, 4.5, 4]]), torch.tensor([[4.0, 4, 4, 4]])]
    for some, shortest in ((cells, 0.5), (cells[1:] * 2, 1)):
        matcher = grid_matcher(AnchorLayout(some, [4, 8], [(4, 4), (2, 2)], 2))
        reach = 4.5 if shortest == 0.5 else 4
        assert matcher.tolerance == pytest.approx(24 * eps * reach / shortest + 32 * eps)


def test_which_anchors_all_arithmetic_keeps_exact():
    def exact(cell, stride, size):
        layout = AnchorLayout([torch.tensor([cell])] * 2, [8, stride], [(2, 2), size], 2)
        return grid_matcher(layout).exact

    assert exact([-4.125, -4, 4.125, 4], 16, (3, 3))
    assert not exact([-4.0625, -4, 4.0625, 4], 16, (3, 3))
    assert not exact([-4.0, -4, 4, 4], 16.5, (3, 3))
    assert exact([-4.0, -4, 4, 4], 16, (1, 65_535))
    assert not exact([-16.0, -4, 4, 4], 16, (1, 65_535))


def test_centres_that_only_rounding_parts_are_one():
    def groups(*shifts):
        cells = [(-4.0 + x, -4.0 + y, 4.0 + x, 4.0 + y) for x, y in shifts]
        return [len(shapes[0][1]) for _, shapes in grid._by_centre(cells)]

    assert groups((0, 0), (2e-5, 0), (0, 2e-5)) == [3]
    assert groups((0, 0), (2e-4, 0), (0, 2e-4)) == [1, 1, 1]
    assert groups((1, 0), (0, 0), (1, 0)) == [1, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_what_the_cpu_finds():
    rng = np.random.default_rng(3)
    for kind in ("torchvision", "legacy", "densified"):
        layout = draw_layout(rng, kind)
        boxes = draw_boxes(rng, layout, 20_000)
        level, iou = grid_matcher(layout).match(boxes)
        gpu = GridMatcher([layout._levels], torch.float32, torch.device("cuda"))
        found = gpu.match(boxes.cuda())
        assert torch.equal(found[0].cpu(), level)
        assert torch.equal(found[1].cpu(), iou)
