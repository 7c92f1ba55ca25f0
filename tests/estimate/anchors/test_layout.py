from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from alphafpn import AnchorLayout
from alphafpn.estimate.anchors.layout import check_boxes, recognise_grid
from tests.anchor_sets import FASTER, RETINA, cell_anchors, draw_layout, kinds, legacy_layout, seeds

CELL = torch.tensor([[-8.0, -8, 8, 8]])


# The layout itself


@settings(max_examples=50, deadline=None)
@given(seed=seeds, kind=kinds)
def test_anchors_are_cells_moved_by_strides(seed, kind):
    layout = draw_layout(np.random.default_rng(seed), kind)
    for level, cells, anchors in zip(
        layout._levels, layout.cell_anchors, layout.anchors(), strict=True
    ):
        stride_y, stride_x = (torch.tensor(s) for s in level.stride)
        literal = [
            cell + torch.stack([x * stride_x, y * stride_y] * 2)
            for y in range(level.size[0])
            for x in range(level.size[1])
            for cell in cells
        ]
        assert torch.equal(anchors, torch.stack(literal))


def test_parts_of_a_layout_in_other_types():
    layout = AnchorLayout(
        [CELL.long(), CELL.double()],
        [(torch.tensor(8), np.int64(8)), np.float32(16)],
        [torch.Size([4, 6]), np.array([2, 3])],
        2,
    )
    assert [anchors.dtype for anchors in layout.anchors()] == [torch.float32, torch.float64]
    assert layout.anchors()[1][-1].tolist() == [24.0, 8, 40, 24]


def test_a_layout_survives_pickle_deepcopy_and_to():
    layout = legacy_layout(FASTER, (64, 96))
    rounded = AnchorLayout.from_tensors([a + 1000.07 for a in layout.anchors()])
    assert rounded._levels[0].anchors is not None
    for one in (layout, rounded):
        for other in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one), one.to("cpu")):
            assert all(map(torch.equal, one.anchors(), other.anchors()))
            assert other.num_fused_levels == one.num_fused_levels
    meta = rounded.to("meta")
    assert {anchors.device.type for anchors in meta.anchors()} == {"meta"}
    assert {anchors.device.type for anchors in rounded.anchors()} == {"cpu"}
    with pytest.raises(AttributeError):
        layout.strides = [4, 8]


@pytest.mark.parametrize(
    ("strides", "names", "expected"),
    [
        ([4, 8, 16], None, ("P2", "P3", "P4")),
        ([8, 16, 31], None, ("P3", "P4", "P5")),
        ([8, 16, (30, 33)], "abc", ("P3", "P4", "P5")),
        ([8, 16, 16], "abc", ("a", "b", "c")),
        ([8, 16, 64], "abc", ("a", "b", "c")),
        ([7, 14, 28], "abc", ("a", "b", "c")),
        ([7, 14, 28], None, ("level 0", "level 1", "level 2")),
    ],
)
def test_level_names(strides, names, expected):
    layout = AnchorLayout([CELL] * 3, strides, [(1, 2)] * 3, 2, names)
    assert layout.level_names == expected


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"strides": [8]}, ValueError, "'strides': 1"),
        ({"num_fused_levels": 3}, ValueError, r"num_fused_levels: .*\(2\) expected, found 3"),
        ({"num_fused_levels": 1}, ValueError, "found 1"),
        ({"num_fused_levels": 2.0}, TypeError, "num_fused_levels: an int expected, found 2.0"),
        ({"strides": [8, 0]}, ValueError, r"strides\[1\]: positive"),
        ({"strides": [8, (8, math.nan)]}, ValueError, r"strides\[1\]: positive"),
        ({"strides": ["ab", 8]}, TypeError, r"strides\[0\]: a number or \(y, x\) .*'ab'"),
        ({"strides": [8, (1, 2, 3)]}, TypeError, r"strides\[1\]"),
        ({"grid_sizes": [(4, 4), (0, 4)]}, ValueError, r"grid_sizes\[1\]: .* at least 1"),
        ({"grid_sizes": [(4, 4), (2.5, 4)]}, TypeError, r"grid_sizes\[1\]: .* whole"),
        ({"grid_sizes": [(4, 4), 4]}, TypeError, r"grid_sizes\[1\]"),
        ({"cell_anchors": [CELL, CELL[:0]]}, ValueError, r"cell_anchors\[1\]: at least one"),
        ({"cell_anchors": [CELL, CELL[:, :3]]}, ValueError, r"cell_anchors\[1\]: shape"),
        ({"cell_anchors": [CELL, -CELL]}, ValueError, r"cell_anchors\[1\]\[0\]: finite"),
        ({"cell_anchors": [CELL, [[0, 0, 1, 1]]]}, TypeError, r"cell_anchors\[1\]: a tensor"),
    ],
)
def test_layouts_that_are_refused(change, error, message):
    parts = {
        "cell_anchors": [CELL, 2 * CELL],
        "strides": [8, 16],
        "grid_sizes": [(4, 4), (2, 2)],
        "num_fused_levels": 2,
    }
    AnchorLayout(**parts)
    with pytest.raises(error, match=message):
        AnchorLayout(**{**parts, **change})


# Boxes


@pytest.mark.parametrize("shape", [(0,), (1, 0), (0, 4), (0, 0)])
def test_no_boxes_in_every_shape(shape):
    assert check_boxes(torch.zeros(shape), "here").shape == (0, 4)


@pytest.mark.parametrize(
    ("boxes", "error", "message"),
    [
        ([[0, 0, 1, 1]], TypeError, "here: a tensor .* found list"),
        (torch.zeros(2, 4, dtype=torch.bool), TypeError, "here: real numbers"),
        (torch.zeros(2, 4, dtype=torch.complex64), TypeError, "here: real numbers"),
        (torch.zeros(4), ValueError, r"here: shape \[N, 4\] expected, found \[4\]"),
        (torch.zeros(0, 5), ValueError, r"found \[0, 5\]"),
        (torch.zeros(5, 0), ValueError, r"found \[5, 0\]"),
        (torch.zeros(1, 2, 4), ValueError, r"found \[1, 2, 4\]"),
        (torch.tensor([[0.0, 0, 1, 1], [0, 0, math.nan, 1]]), ValueError, r"here\[1\]: .*nan"),
        (torch.tensor([[0.0, 0, 1, math.inf]]), ValueError, r"here\[0\]: .*inf"),
        (torch.tensor([[-math.inf, 0, 1, 1]]), ValueError, r"here\[0\]: .*inf"),
        (torch.tensor([[math.inf, 0, math.inf, 1]]), ValueError, r"here\[0\]: .*inf"),
        (torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]]), ValueError, r"here\[1\]: finite x1 <= x2"),
        (torch.tensor([[-3e38, 0, 3e38, 1]]), ValueError, r"here\[0\]: .* finite area"),
        (torch.tensor([[0, 0, 1e20, 1e20]]), ValueError, r"here\[0\]: .* finite area"),
    ],
)
def test_boxes_that_are_refused(boxes, error, message):
    with pytest.raises(error, match=message):
        check_boxes(boxes, "here")


def test_boxes_in_other_types():
    for dtype in (torch.uint8, torch.int64, torch.float16, torch.bfloat16):
        boxes = check_boxes(torch.tensor([[1, 2, 1, 4]], dtype=dtype), "here")
        assert boxes.dtype == torch.float32
        assert boxes.tolist() == [[1, 2, 1, 4]]
    wanting = torch.tensor([[0.0, 0, 1e20, 1]], requires_grad=True)
    assert not check_boxes(wanting, "here").requires_grad


# Recognising a grid


@settings(max_examples=100, deadline=None)
@given(seed=seeds, kind=kinds)
def test_recognised_grids_are_the_layouts_own(seed, kind):
    layout = draw_layout(np.random.default_rng(seed), kind)
    for level, anchors in zip(layout._levels, layout.anchors(), strict=True):
        grid = recognise_grid(anchors)
        assert grid is not None
        assert math.prod(grid.size) * len(grid.cells) == len(anchors)
        if math.prod(level.size) > 1 and kind != "densified":
            assert (grid.size, len(grid.cells)) == (level.size, len(level.cells))
        again = AnchorLayout([torch.tensor(grid.cells)] * 2, [grid.stride] * 2, [grid.size] * 2, 2)
        worst = (again.anchors()[0] - anchors).abs().max()
        assert worst == 0 or (grid.anchors is anchors and worst < 1e-2)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (1, 9), (9, 1), (3, 4)])
@pytest.mark.parametrize("num_cells", [1, 2, 9])
def test_grids_of_single_rows_columns_and_positions(size, num_cells):
    shapes = [(8 + i, 20 - i) for i in range(num_cells)]
    layout = AnchorLayout(
        [cell_anchors(shapes, [(0, 0)] * num_cells)] * 2, [(12, 10)] * 2, [size] * 2, 2
    )
    grid = recognise_grid(layout.anchors()[0])
    assert (grid.size, len(grid.cells), grid.anchors) == (size, num_cells, None)
    expected = [12.0 if size[0] > 1 else 1.0, 10.0 if size[1] > 1 else 1.0]
    assert list(grid.stride) == expected


@pytest.mark.parametrize(
    "centres",
    [
        [(0, 0), (4, 0)],  # evenly spaced with the next position's
        [(0, 0), (3, 0)],
        [(0, 0), (0, 4)],
        [(0, 0), (0, 3)],
        [(0, 0), (0, 0)],
        [(0, 0), (3, 0), (0, 5), (3, 5)],
        [(2, 1), (-3, 4), (2, -6)],
    ],
)
def test_cell_anchors_that_are_translations_of_each_other(centres):
    cells = cell_anchors([(16, 16)] * len(centres), centres)
    for size in ((5, 7), (1, 7), (5, 1), (1, 1)):
        layout = AnchorLayout([cells] * 2, [8, 8], [size] * 2, 2)
        anchors = layout.anchors()[0]
        grid = recognise_grid(anchors)
        assert grid is not None
        again = AnchorLayout([torch.tensor(grid.cells)] * 2, [grid.stride] * 2, [grid.size] * 2, 2)
        assert torch.equal(again.anchors()[0], anchors)


def test_what_is_no_grid():
    cells = cell_anchors([(16, 8), (8, 16)], [(0, 0)] * 2)
    layout = AnchorLayout([cells] * 2, [8, 8], [(9, 50)] * 2, 2)
    anchors = layout.anchors()[0]
    assert recognise_grid(anchors) is not None
    generator = torch.Generator().manual_seed(0)
    moved, resized, duplicated = anchors.clone(), anchors.clone(), anchors.clone()
    moved[123] += 1e-2
    resized[-1, 3] += 1e-2
    duplicated[500] = duplicated[498]
    irregular = {
        "shuffled": anchors[torch.randperm(len(anchors), generator=generator)],
        "moved": moved,
        "resized": resized,
        "duplicated": duplicated,
        "clipped": anchors.clamp(min=0),
        "one lacking": anchors[:-1],
        "one row lacking an end": torch.cat([anchors[:98], anchors[100:]]),
        "reversed": anchors.flip(0),
        "columns first": anchors.view(9, 50, 2, 4).transpose(0, 1).reshape(-1, 4)[2:],
        "random": torch.rand(1000, 4, generator=generator).cumsum(1),
        "none": anchors[:0],
    }
    for name, tensor in irregular.items():
        assert recognise_grid(tensor) is None, name


def test_rounding_noise_is_still_a_grid():
    cells = cell_anchors([(12.465, 6.232), (8.31, 10.388)], [(2, 2)] * 2)
    layout = AnchorLayout([cells] * 2, [4, 4], [(30, 300)] * 2, 2)
    for shift in (0.1, 1000.7, 32_000.3):
        anchors = layout.anchors()[0] + shift
        grid = recognise_grid(anchors)
        assert (grid.size, grid.stride) == ((30, 300), (4.0, 4.0))
        assert grid.anchors is anchors


def test_a_stride_that_is_no_whole_number():
    cells = cell_anchors([(12, 6)], [(0, 0)])
    layout = AnchorLayout([cells] * 2, [(10.6, 4.25), 8], [(200, 300), (2, 2)], 2)
    grid = recognise_grid(layout.anchors()[0])
    assert grid.stride == pytest.approx((10.6, 4.25), rel=1e-6)


def test_from_tensors():
    layout = legacy_layout(RETINA, (64, 96))
    again = AnchorLayout.from_tensors(layout.anchors())
    assert all(map(torch.equal, again.anchors(), layout.anchors()))
    assert again.num_fused_levels == 4
    assert AnchorLayout.from_tensors(layout.anchors(), 3).num_fused_levels == 3
    assert again.level_names[:4] == ("level 0", "level 1", "level 2", "level 3")
    with pytest.raises(ValueError, match="level 1 are no regular grid"):
        AnchorLayout.from_tensors([layout.anchors()[0], torch.rand(99, 4).cumsum(1)], 2)
    with pytest.raises(TypeError, match="anchors of level 0: a tensor"):
        AnchorLayout.from_tensors([[1, 2], [3, 4]])
    with pytest.raises(ValueError, match="one tensor per image, not per level"):
        AnchorLayout.from_tensors([torch.cat(layout.anchors())[:7]])
