from __future__ import annotations

import functools
import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision import tv_tensors
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.transforms.v2.functional import convert_bounding_box_format

from alphafpn import AnchorLayout, estimate_alpha
from alphafpn.estimate import matcher, s_alpha
from alphafpn.estimate.alpha_estimate import SIZE_UNIT
from alphafpn.estimate.irregular import SearchMatcher
from alphafpn.estimate.matcher import GridMatcher
from tests import oracle
from tests.anchor_sets import (
    FASTER,
    RETINA,
    STRIDES,
    draw,
    draw_boxes,
    draw_layout,
    kinds,
    legacy_layout,
    seeds,
)

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
CELL = torch.tensor([[-8.0, -8, 8, 8]])


def clear_only(levels, images):
    """The boxes whose two best levels differ enough, so that no rounding decides."""
    return [
        boxes[
            torch.tensor(
                [oracle.is_clear(row) for row in oracle.level_ious(anchors, boxes)], dtype=bool
            )
        ]
        for anchors, boxes in zip(levels, images, strict=True)
    ]


def estimate_distinct(anchors, boxes, **kwargs):
    """`estimate_alpha`, unless the levels happen to be such as it has to refuse."""
    try:
        return estimate_alpha(anchors, boxes, **kwargs)
    except ValueError as error:
        assume("also lie on" not in str(error))
        raise


def split(boxes, rng):
    """Cut into images, some of them without boxes."""
    cuts = np.sort(rng.integers(0, len(boxes) + 1, 7)).tolist()
    return [boxes[a:b] for a, b in zip([0, *cuts], [*cuts, len(boxes)], strict=True)]


def assert_equals_algorithm_1(estimate, levels, images):
    counts, unmatched, per_image = oracle.counts(levels, images)
    assert list(estimate.counts) == counts
    assert estimate.num_unmatched == unmatched
    assert estimate.num_images == len(images)
    assert estimate.num_boxes == sum(map(len, images)) == sum(counts) + unmatched
    assert estimate.moments == tuple(
        tuple(sum(row[i] * row[j] for row in per_image) for j in range(len(counts)))
        for i in range(len(counts))
    )
    k = estimate.num_fused_levels
    if all(counts[: k - 1]):
        assert estimate.ratios == pytest.approx(oracle.ratios(counts, k))


# Algorithm 1


@settings(max_examples=60, deadline=None)
@given(seed=seeds, kind=kinds)
def test_counts_are_those_of_algorithm_1(seed, kind):
    rng = np.random.default_rng(seed)
    layout = draw_layout(rng, kind)
    images = split(draw_boxes(rng, layout, 60), rng)
    levels = [layout.anchors()] * len(images)
    images = clear_only(levels, images)
    estimate = estimate_distinct(layout, images)
    assert_equals_algorithm_1(estimate, levels, images)
    # Plain tensors: the same grid is found in them, or they are searched.
    plain = estimate_alpha(levels[0], images, num_fused_levels=2)
    assert plain.counts == estimate.counts
    assert plain.iou_histogram == estimate.iou_histogram
    assert estimate_alpha(layout.to("cpu"), iter(images)) == estimate


@settings(max_examples=40, deadline=None)
@given(seed=seeds, kind=kinds, others=st.lists(kinds, max_size=2))
def test_anchors_of_their_own_for_each_image(seed, kind, others):
    rng = np.random.default_rng(seed)
    num_levels = 3
    layouts = []
    for name in (kind, *others):
        while len((layout := draw_layout(rng, name)).cell_anchors) != num_levels:
            pass
        layouts.append(layout)
        # Another size of image with the same cell anchors.
        grids = [tuple(int(n) for n in rng.integers(1, 9, 2)) for _ in range(num_levels)]
        layouts.append(AnchorLayout(layout.cell_anchors, layout.strides, grids, 2))
    irregular = [torch.rand(50, 4).cumsum(1) * 30 for _ in range(num_levels)]
    kinds_of_anchors = [*layouts, layouts[0].anchors(), irregular]
    which = rng.integers(0, len(kinds_of_anchors), 12)
    which[0] = 0
    anchors = [kinds_of_anchors[i] for i in which]
    images = [draw_boxes(rng, layouts[0], int(rng.integers(0, 9))) for _ in which]
    levels = [a.anchors() if isinstance(a, AnchorLayout) else a for a in anchors]
    images = clear_only(levels, images)
    estimate = estimate_distinct(anchors, images, num_fused_levels=2)
    assert_equals_algorithm_1(estimate, levels, images)


def test_ids_of_lazily_made_anchors_are_not_taken_for_others():
    # Tensors that live for one image only may get the id of the one before.
    class Lazy(list):
        def __iter__(self):
            return (factory() for factory in super().__iter__())

    small, large = CELL / 2, 3 * CELL

    class Levels(list):
        def __init__(self, cell):
            super().__init__()
            self.cell = cell

        def __iter__(self):
            return iter([self.cell.clone(), 2 * self.cell])

    images = [torch.tensor([[-6.0, -6, 6, 6]])] * 40
    anchors = Lazy([functools.partial(Levels, (small, large)[i % 2]) for i in range(40)])
    estimate = estimate_alpha(anchors, images, num_fused_levels=2)
    assert estimate.counts == (20, 20)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, kind=kinds, block=st.integers(1, 40))
def test_blocks_orders_and_shards_give_the_same_estimate(seed, kind, block):
    rng = np.random.default_rng(seed)
    layout = draw_layout(rng, kind)
    images = split(draw_boxes(rng, layout, 60), rng)
    images.append(torch.tensor([[0.0, 0, 9, 9], [3e5, 0, 3e5 + 8, 8]]))
    whole = estimate_distinct(layout, images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s_alpha, "BLOCK", block)
        patch.setattr(matcher, "CPU_BLOCK", max(1, block // 3))
        assert estimate_alpha(layout, images) == whole
        assert estimate_alpha([layout] * len(images), images) == whole
    order = rng.permutation(len(images))
    assert estimate_alpha(layout, [images[i] for i in order]) == whole
    cut = int(rng.integers(0, len(images) + 1))
    shards = [estimate_alpha(layout, part) for part in (images[:cut], images[cut:])]
    assert shards[0].merge(shards[1]) == shards[1].merge(shards[0]) == whole


NONE = torch.zeros(0, 4)


@pytest.mark.parametrize(
    ("images", "num_images"),
    [([], 0), ([NONE], 1), (NONE, 1), (torch.tensor([]), 1), ([NONE, NONE[:, 0], NONE.T[:1]], 3)],
)
def test_boxes_without_images_and_images_without_boxes(images, num_images):
    layout = legacy_layout(FASTER, (64, 96))
    for anchors in (layout, layout.anchors(), [torch.rand(99, 4).cumsum(1) + i for i in range(5)]):
        estimate = estimate_alpha(anchors, images)
        assert estimate.counts == (0,) * 5
        assert estimate.alpha == (1.0,) * 3
        assert (estimate.num_images, estimate.num_boxes) == (num_images, 0)


def test_box_types_are_mixed_without_loss():
    layout = legacy_layout(FASTER, (64, 96))
    boxes = draw_boxes(np.random.default_rng(0), layout, 50)
    whole = boxes.round()
    expected = estimate_alpha(layout, [whole, boxes])
    for other in (whole.int(), whole.half(), whole.double()):
        assert estimate_alpha(layout, [other, boxes]).counts == expected.counts
    wanting = [whole.clone().requires_grad_(), boxes.clone().requires_grad_()]
    assert estimate_alpha(layout, wanting) == expected
    assert estimate_alpha(layout, wanting[1]).counts == estimate_alpha(layout, boxes).counts
    assert all(tensor.grad_fn is None for tensor in wanting)


def test_float64_is_computed_in_float64():
    # Two levels whose IoU with the box differs by 1e-9: float32 would call it a tie.
    layout = AnchorLayout(
        [torch.tensor([[0.0, 0, 4, 9]]), torch.tensor([[0.0, 0, 9, 4]])], [64, 64], [(1, 1)] * 2, 2
    )
    box = torch.tensor([[0.0, 0, 9 - 1e-8, 9]], dtype=torch.float64)
    for anchors in (layout, [a.double() for a in layout.anchors()], layout.anchors()):
        assert estimate_alpha(anchors, box, num_fused_levels=2).counts == (1, 0)
        flipped = box[:, [1, 0, 3, 2]]
        assert estimate_alpha(anchors, flipped, num_fused_levels=2).counts == (0, 1)


def test_torchvisions_anchors_split_by_level():
    generator = AnchorGenerator(tuple((8 * 2**i,) for i in range(3)), ((0.5, 1.0, 2.0),) * 3)
    maps = [torch.zeros(2, 1, 64 // s, 96 // s) for s in (4, 8, 16)]
    per_image = generator(ImageList(torch.zeros(2, 3, 64, 96), [(64, 96), (50, 70)]), maps)
    levels = [list(a.split([m.shape[2] * m.shape[3] * 3 for m in maps])) for a in per_image]
    images = [
        draw_boxes(np.random.default_rng(i), AnchorLayout.from_tensors(levels[0]), 30)
        for i in range(2)
    ]
    estimate = estimate_alpha(levels, images)
    assert_equals_algorithm_1(estimate, levels, images)
    assert estimate.level_names == ("P2", "P3", "P4")
    assert estimate.anchors_per_cell == (3, 3, 3)
    # As they come, one tensor per image: taken for levels, and noticed.
    with pytest.raises(ValueError, match="one tensor per image, not per level"):
        estimate_alpha(per_image, images)


def test_the_searched_and_the_fast_path_agree():
    rng = np.random.default_rng(0)
    layout = legacy_layout(RETINA, (64, 96))
    images = split(draw_boxes(rng, layout, 200), rng)
    shuffled = [a[torch.randperm(len(a))] for a in layout.anchors()]
    fast, searched = estimate_alpha(layout, images), estimate_alpha(shuffled, images)
    assert (fast.counts, fast.moments) == (searched.counts, searched.moments)
    assert searched.level_names == tuple(f"level {i}" for i in range(5))
    assert (searched.strides, searched.anchors_per_cell) == ((), ())
    assert np.abs(np.subtract(fast.reached, searched.reached)).sum() <= 2


@pytest.mark.parametrize("device", DEVICES)
def test_devices_may_be_mixed_as_long_as_boxes_agree(device):
    layout = legacy_layout(FASTER, (64, 96))
    boxes = draw_boxes(np.random.default_rng(0), layout, 50)
    expected = estimate_alpha(layout, boxes)
    assert estimate_alpha(layout.to(device), boxes.to(device)) == expected
    assert estimate_alpha(layout, [boxes.to(device)]) == expected
    shuffled = [a.flip(0).to(device) for a in layout.anchors()]
    assert estimate_alpha(shuffled, boxes).counts == expected.counts


def test_bounding_boxes_in_other_formats_are_converted():
    layout = legacy_layout(FASTER, (64, 96))
    boxes = draw_boxes(np.random.default_rng(0), layout, 50).clamp(min=0)
    expected = estimate_alpha(layout, boxes)
    for name in ("XYXY", "XYWH", "CXCYWH"):
        given = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(64, 96))
        given = convert_bounding_box_format(given, new_format=tv_tensors.BoundingBoxFormat[name])
        for boxes_of in (given, [given]):
            estimate = estimate_alpha(layout, boxes_of)
            assert (estimate.counts, estimate.num_boxes) == (expected.counts, 50)


def test_a_device_without_float64_counts_on_the_cpu(monkeypatch):
    # No such device is at hand: boxes on "meta" stand for it, and the copy is what counts.
    moved = []

    def cpu(self):
        moved.append(len(self))
        return torch.zeros(len(self), 4)

    class OnMps(torch.Tensor):
        device = torch.device("mps")

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    boxes = torch.ones(5, 4).as_subclass(OnMps)
    assert estimate_alpha(LAYOUT, [boxes, boxes]).num_boxes == 10
    assert moved == [10]


# What an estimate describes


def test_size_and_iou_are_averaged():
    layout = AnchorLayout([CELL, 2 * CELL], [8, 16], [(8, 8), (4, 4)], 2)
    boxes = torch.tensor([[0.0, 0, 16, 16], [0, 0, 4, 9], [16, 16, 48, 47], [900, 0, 910, 10]])
    estimate = estimate_alpha(layout, [boxes[:1], boxes[1:]])
    assert estimate.counts == (2, 1)
    assert estimate.mean_size == pytest.approx((16 + 6 + math.sqrt(992) + 10) / 4, abs=1e-3)
    assert estimate.reached == (1, 1)
    assert sum(estimate.iou_histogram) == 4
    assert [i for i, n in enumerate(estimate.iou_histogram) if n] == [0, 14, 96, 100]
    assert [estimate.recall(q) for q in (0, 0.01, 0.14, 0.15, 0.96, 0.97, 1)] == [
        1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25,
    ]  # fmt: skip


def test_sizes_add_up_without_rounding():
    # 9,000 sizes of up to 60,000 units make more than float32 counts to.
    sides = torch.arange(1.0, 60.0, 59 / 9000)
    boxes = torch.stack([torch.zeros_like(sides)] * 2 + [sides] * 2, dim=1)
    expected = [round(side / SIZE_UNIT) for side in sides.tolist()]
    assert sum(expected) > 2**27
    assert estimate_alpha(LAYOUT, boxes).size_sum == sum(expected)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, kind=kinds)
def test_recall_and_the_share_reached_equal_brute_force(seed, kind):
    layout, boxes = draw(seed, kind)
    ious = oracle.level_ious(layout.anchors(), boxes)
    estimate = estimate_distinct(layout, boxes)
    best = np.array([max(row) for row in ious])
    for iou in (0.0, 0.1, 0.3, 0.5, 0.77, 1.0):
        low, high = ((best >= iou + d).mean() for d in (1e-5, -1e-5))
        assert low <= estimate.recall(iou) <= high
    low, high = ((best >= 0.5 + d).sum() for d in (1e-5, -1e-5))
    assert low <= sum(estimate.reached) <= high
    assert all(n <= count for n, count in zip(estimate.reached, estimate.counts, strict=True))
    sides = (boxes[:, 2:] - boxes[:, :2]).double().prod(1).sqrt().mean()
    assert estimate.mean_size == pytest.approx(float(sides), abs=1e-3)


def test_names_and_strides_are_those_of_the_largest_image():
    def layout(height, width):
        grids = [(-(-height // s), -(-width // s)) for s in (4, 8, 16)]
        strides = [(height // h, width // w) for h, w in grids]
        return AnchorLayout([CELL, 2 * CELL, 4 * CELL], strides, grids, 3, ["a", "b", "c"])

    small, odd, large = layout(8, 8), layout(64, 90), layout(128, 128)
    assert small.level_names == ("a", "b", "c")
    boxes = [torch.tensor([[0.0, 0, 5, 5]])]
    for layouts in ([small, odd, large], [large, small, odd]):
        estimate = estimate_alpha(layouts, boxes * 3)
        assert estimate.level_names == ("P2", "P3", "P4")
        assert estimate.strides == (4.0, 8.0, 16.0)
        assert estimate.anchors_per_cell == (1, 1, 1)


def test_the_number_of_fused_levels():
    layout = legacy_layout(FASTER, (64, 96))
    boxes = torch.cat([*layout.anchors()[:4], layout.anchors()[4][:2]])
    a, b, c, d, e = estimate_alpha(layout, boxes).counts
    assert estimate_alpha(layout, boxes).ratios == (b / a, c / b, (d + e) / c)
    assert estimate_alpha(layout.anchors(), boxes).ratios == (b / a, c / b, (d + e) / c)
    assert estimate_alpha(layout, boxes, num_fused_levels=3).ratios == (b / a, (c + d + e) / b)
    assert estimate_alpha(layout, boxes, num_fused_levels=5).ratios == (b / a, c / b, d / c, e / d)
    two = AnchorLayout(layout.cell_anchors[:2], STRIDES[:2], layout.grid_sizes[:2], 2)
    for anchors in (two, two.anchors(), [a.flip(0) for a in two.anchors()]):
        assert len(estimate_alpha(anchors, boxes, num_fused_levels=2)) == 1
    for wrong, error in ((1, ValueError), (6, ValueError), (3.0, TypeError), ("3", TypeError)):
        with pytest.raises(error, match="num_fused_levels"):
            estimate_alpha(layout, boxes, num_fused_levels=wrong)
    with pytest.raises(ValueError, match="num_fused_levels"):
        estimate_alpha(two.anchors(), boxes)


# The paper's anchors on synthetic ground truth, counted by another program


@functools.cache
def golden_boxes():
    """As the paper's training reads them: clipped, and without sides of up to one pixel."""
    data = json.loads(gzip.decompress((FIXTURES / "golden" / "gt_a.json.gz").read_bytes()))
    images = {image["id"]: [] for image in data["images"]}
    for box in data["annotations"]:
        if box.get("ignore") or box.get("uncertain") or box.get("iscrowd"):
            continue
        x, y, w, h = box["bbox"]
        images[box["image_id"]].append([x, y, x + w, y + h])
    boxes = [torch.tensor(image).reshape(-1, 4) for image in images.values()]
    limit = torch.tensor([640.0, 512, 640, 512])
    boxes = [torch.minimum(image.clamp(min=0), limit) for image in boxes]
    return [image[((image[:, 2:] - image[:, :2]) > 1).all(1)] for image in boxes]


def torchvision_layout(sizes, ratios):
    generator = AnchorGenerator(sizes, (ratios,) * 5)
    grids = [(512 // s, 640 // s) for s in STRIDES]
    return AnchorLayout(generator.cell_anchors, STRIDES, grids, 4)


OCTAVES = tuple(2 ** (i / 3) for i in range(3))
GOLDEN = {
    "a/retinanet/legacy": lambda: legacy_layout(RETINA, (512, 640), OCTAVES),
    "a/fasterrcnn/legacy": lambda: legacy_layout(FASTER, (512, 640)),
    "a/retinanet/torchvision": lambda: torchvision_layout(
        tuple(tuple(s * o for o in OCTAVES) for s in (8, 16, 32, 64, 128)), (0.5, 1.0, 2.0)
    ),
    "a/fasterrcnn/torchvision": lambda: torchvision_layout(
        ((8.31,), (12.5,), (18.55,), (30.23,), (60.41,)), (0.5, 1.3, 2.0)
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_counts(name):
    expected = json.loads((FIXTURES / "salpha.json").read_text())[name]
    estimate = estimate_alpha(GOLDEN[name](), golden_boxes())
    assert list(estimate.counts) == expected["per_gt_counts"]
    assert [round(a, 3) for a in reversed(estimate.alpha)] == expected["alpha_45_34_23"]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_boxes_equal_brute_force(name):
    layout, images = GOLDEN[name](), golden_boxes()[:30]
    levels = layout.anchors()
    one = GridMatcher(layout.cell_anchors, [layout], torch.float32, torch.device("cpu"))
    for boxes in images:
        ious = oracle.level_ious(levels, boxes)
        found = one.match(boxes)[0].tolist()
        for row, level in zip(ious, found, strict=True):
            assert level == oracle.best_level(row) or not oracle.is_clear(row)


# Mistakes


LAYOUT = AnchorLayout([CELL, 2 * CELL], [8, 16], [(4, 4), (2, 2)], 2)
BOX = torch.tensor([[0.0, 0, 8, 8]])
NAN = torch.tensor([[0.0, 0, 8, 8], [0, 0, math.nan, 8]])
THREE_LEVELS = [CELL, 2 * CELL, 4 * CELL]


@pytest.mark.parametrize(
    ("anchors", "boxes", "error", "message"),
    [
        (LAYOUT, None, TypeError, "gt_boxes: .* found NoneType"),
        (LAYOUT, "boxes", TypeError, "gt_boxes: .* found str"),
        (LAYOUT, {"boxes": BOX}, TypeError, "gt_boxes: .* found dict"),
        (LAYOUT, [BOX, [[0, 0, 8, 8]]], TypeError, r"gt_boxes\[1\]: .* tensor .* found list"),
        (LAYOUT, [BOX, BOX[0]], ValueError, r"gt_boxes\[1\]: expected shape .* found \[4\]"),
        (LAYOUT, BOX[:, :3], ValueError, r"gt_boxes: expected shape .* found \[1, 3\]"),
        (LAYOUT, NAN, ValueError, r"gt_boxes\[1\]: expected finite .*nan"),
        (LAYOUT, [BOX, BOX, NAN], ValueError, r"gt_boxes\[2\]\[1\]: expected finite .*nan"),
        (LAYOUT, [BOX, BOX.to("meta")], ValueError, "gt_boxes: .* one device, found .*'meta'"),
        (None, BOX, TypeError, "anchors: .* found NoneType"),
        ([], BOX, TypeError, r"anchors: .* found list \[\]"),
        (torch.zeros(9, 4), BOX, TypeError, "anchors: .* found Tensor"),
        ({"0": CELL}, BOX, TypeError, "anchors: .* found dict"),
        (nn.Linear(1, 1), BOX, TypeError, "found Linear; estimate_alpha_for takes a detector"),
        (LAYOUT, "train.json", TypeError, "gt_boxes: .* found str; .* see estimate_alpha_for"),
        ([LAYOUT, LAYOUT], BOX, ValueError, "anchors: expected 1, one per image, found 2"),
        ([LAYOUT], [BOX, BOX], ValueError, "anchors: expected 2, one per image, found 1"),
        ([LAYOUT, "P2"], [BOX, BOX], TypeError, r"anchors\[1\]: .* found str"),
        ([LAYOUT, CELL], [BOX, BOX], TypeError, r"anchors\[1\]: .* found Tensor"),
        ([LAYOUT, [CELL, None]], [BOX] * 2, TypeError, r"anchors\[1\]\[1\]: expected a tensor"),
        ([LAYOUT, THREE_LEVELS], [BOX] * 2, ValueError, r"anchors\[1\]: expected 2 levels"),
        ([CELL, CELL[:0]], BOX, ValueError, r"anchors\[1\]: expected at least one anchor"),
        ([CELL, NAN], BOX, ValueError, r"anchors\[1\]\[1\]: expected finite"),
        ([CELL], BOX, ValueError, "one tensor per image, not per level"),
    ],
)
def test_mistakes_are_named(anchors, boxes, error, message):
    with pytest.raises(error, match=message):
        estimate_alpha(anchors, boxes, num_fused_levels=2)


def test_a_mistake_is_named_wherever_it_is(monkeypatch):
    monkeypatch.setattr(s_alpha, "BLOCK", 3)
    images = [BOX.repeat(n, 1) for n in (2, 0, 5, 1, 4)]
    other = AnchorLayout([CELL, 3 * CELL], [8, 16], [(4, 4), (2, 2)], 2)
    for i, row in ((0, 0), (2, 4), (4, 3)):
        broken = [boxes.clone() for boxes in images]
        broken[i][row, 2] = math.inf
        for anchors in (LAYOUT, [LAYOUT, other] * 2 + [LAYOUT]):
            with pytest.raises(ValueError, match=rf"gt_boxes\[{i}\]\[{row}\]: expected finite"):
                estimate_alpha(anchors, broken)
    with pytest.raises(ValueError, match=r"^gt_boxes\[8\]: expected finite"):
        estimate_alpha(LAYOUT, torch.cat([images[0], images[2], NAN]))


# Size


def test_blocks_bound_the_memory(monkeypatch):
    # Nothing longer than a block is matched, and lists of boxes are joined a block at a time.
    lengths = []
    real = GridMatcher.match

    def spy(self, boxes, layout=None):
        lengths.append(len(boxes))
        return real(self, boxes, layout)

    monkeypatch.setattr(GridMatcher, "match", spy)
    monkeypatch.setattr(s_alpha, "BLOCK", 1000)
    boxes = torch.tensor([[0.0, 0, 9, 9]]).repeat(4500, 1)
    estimate_alpha(LAYOUT, boxes)
    assert lengths == [1000] * 4 + [500]
    lengths.clear()
    estimate_alpha(LAYOUT, [*boxes[:1500].split(7), boxes[1500:]])
    assert max(lengths) <= 1000
    assert sum(lengths) == 4500
    assert len(lengths) <= 6


def test_irregular_anchors_are_searched_and_regular_ones_never(monkeypatch):
    searched = []
    real = SearchMatcher.match
    monkeypatch.setattr(SearchMatcher, "match", lambda *args: searched.append(1) or real(*args))
    layout = legacy_layout(FASTER, (64, 96))
    estimate_alpha(layout.anchors(), BOX)
    assert not searched
    rough = [a + torch.rand(len(a), 1) for a in layout.anchors()]
    estimate_alpha(rough, BOX)
    # A grid but for rounding: the anchors are taken as they are.
    estimate_alpha([a + 1000.7 for a in layout.anchors()], BOX)
    # Different shapes, all of them: one position of a grid with thousands of cell anchors if one
    # looks at it so, but searching is faster.
    random = [torch.rand(3000, 4).cumsum(1) for _ in range(5)]
    estimate_alpha(random, BOX)
    assert len(searched) == 3


@pytest.mark.parametrize("device", DEVICES)
def test_a_default_device_or_type_changes_nothing(device):
    layout = legacy_layout(FASTER, (64, 96))
    images = split(draw_boxes(np.random.default_rng(0), layout, 50), np.random.default_rng(0))
    anchors = [layout, AnchorLayout(layout.cell_anchors, STRIDES, [(1, 2)] * 5, 4)] * 4
    expected = estimate_alpha(anchors, images)
    with torch.device("meta"):
        assert estimate_alpha(anchors, images) == expected
    torch.set_default_dtype(torch.float64)
    try:
        assert estimate_alpha(anchors, images) == expected
    finally:
        torch.set_default_dtype(torch.float32)
