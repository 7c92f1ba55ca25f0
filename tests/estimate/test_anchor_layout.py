from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from alphafpn import AnchorLayout
from tests.anchor_sets import FASTER, RETINA, draw_layout, kinds, legacy_layout, seeds

CELL = torch.tensor([[-8.0, -8, 8, 8]])


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
        ({"strides": [8, math.inf]}, ValueError, r"strides\[1\]: positive"),
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


def test_cell_anchors_become_floats_and_a_tuple_of_its_own():
    cells = [CELL.int(), 2 * CELL]
    layout = AnchorLayout(cells, [8, 16], [(2, 3)] * 2, 2)
    cells[1] = 9 * CELL
    assert isinstance(layout.cell_anchors, tuple)
    assert torch.equal(torch.cat(list(layout.cell_anchors)), torch.cat([CELL, 2 * CELL]))
    assert all(anchors.dtype == torch.float32 for anchors in layout.anchors())


def test_a_layout_is_immutable_and_equal_to_itself_alone():
    layout, other = (AnchorLayout([CELL] * 2, [8, 16], [(2, 3)] * 2, 2) for _ in range(2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.num_fused_levels = 3
    assert layout in {layout}
    assert "GridLevel" not in repr(layout)
    assert layout != other


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
