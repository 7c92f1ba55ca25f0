from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from contextlib import nullcontext
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from alphafpn import AnchorLayout, estimate_alpha
from tests.anchor_sets import (
    FASTER,
    RETINA,
    cell_anchors,
    draw_layout,
    kinds,
    legacy_layout,
    seeds,
)

CELL = torch.tensor([[-8.0, -8, 8, 8]])


@settings(max_examples=50, deadline=None)
@given(seed=seeds, kind=kinds)
def test_anchors_are_cells_moved_by_strides(seed, kind):
    layout = draw_layout(np.random.default_rng(seed), kind)
    for cells, stride, size, anchors in zip(
        layout.cell_anchors, layout.strides, layout.grid_sizes, layout.anchors(), strict=True
    ):
        stride_y, stride_x = (torch.tensor(s) for s in stride)
        literal = [
            cell + torch.stack([x * stride_x, y * stride_y] * 2)
            for y in range(size[0])
            for x in range(size[1])
            for cell in cells
        ]
        assert torch.equal(anchors, torch.stack(literal))


def test_parts_of_a_layout_in_other_types():
    cells = [CELL.long(), CELL.double()]
    layout = AnchorLayout(
        cells,
        [(torch.tensor(8), np.int64(8)), np.float32(16)],
        [torch.Size([4, 6]), np.array([2, 3])],
        np.int64(2),
        ["a", "b"],
    )
    assert layout.strides == ((8.0, 8.0), (16.0, 16.0))
    assert layout.grid_sizes == ((4, 6), (2, 3))
    assert (layout.num_fused_levels, layout.names) == (2, ("a", "b"))
    assert type(layout.num_fused_levels) is int
    assert [anchors.dtype for anchors in layout.anchors()] == [torch.float32, torch.float64]
    assert layout.anchors()[1][-1].tolist() == [24.0, 8, 40, 24]
    cells[1] = 9 * CELL
    assert torch.equal(layout.cell_anchors[1].float(), CELL)


def test_a_layout_survives_pickle_deepcopy_and_to():
    layout = legacy_layout(FASTER, (64, 96))
    for other in (pickle.loads(pickle.dumps(layout)), copy.deepcopy(layout), layout.to("cpu")):
        assert all(map(torch.equal, layout.anchors(), other.anchors()))
        assert other.num_fused_levels == layout.num_fused_levels
        assert isinstance(other.cell_anchors, tuple)
        assert layout != other
    assert {anchors.device.type for anchors in layout.to("meta").anchors()} == {"meta"}
    assert {anchors.device.type for anchors in layout.anchors()} == {"cpu"}
    assert layout in {layout}
    with pytest.raises(dataclasses.FrozenInstanceError):
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
        ({"strides": [8]}, ValueError, "strides: expected one entry for each of 2 levels"),
        ({"names": ["a"]}, ValueError, "names: expected one entry for each of 2 levels .* found 1"),
        ({"num_fused_levels": 3}, ValueError, "num_fused_levels: expected 2 to 2, .* found 3"),
        ({"num_fused_levels": True}, TypeError, "num_fused_levels: expected an int, found True"),
        ({"num_fused_levels": 1}, ValueError, "found 1"),
        ({"num_fused_levels": 2.0}, TypeError, "num_fused_levels: expected an int, found 2.0"),
        ({"strides": [8, 0]}, ValueError, r"strides\[1\]: expected positive"),
        ({"strides": [8, math.inf]}, ValueError, r"strides\[1\]: expected positive"),
        ({"strides": [8, (8, math.nan)]}, ValueError, r"strides\[1\]: expected positive"),
        ({"strides": ["ab", 8]}, TypeError, r"strides\[0\]: expected a number or \(y, x\), .*'ab'"),
        ({"strides": [8, (1, 2, 3)]}, TypeError, r"strides\[1\]"),
        ({"grid_sizes": [(4, 4), (0, 4)]}, ValueError, r"grid_sizes\[1\]: .* at least 1"),
        ({"grid_sizes": [(4, 4), (2.5, 4)]}, TypeError, r"grid_sizes\[1\]: .* whole"),
        ({"grid_sizes": [(4, 4), 4]}, TypeError, r"grid_sizes\[1\]"),
        ({"cell_anchors": [CELL, CELL[:0]]}, ValueError, r"cell_anchors\[1\]: .* at least one"),
        ({"cell_anchors": [CELL, CELL[:, :3]]}, ValueError, r"cell_anchors\[1\]: expected shape"),
        ({"cell_anchors": [CELL, -CELL]}, ValueError, r"cell_anchors\[1\]\[0\]: expected finite"),
        ({"cell_anchors": [CELL, [[0, 0, 1, 1]]]}, TypeError, r"cell_anchors\[1\]: .* a tensor"),
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


def test_from_tensors():
    layout = legacy_layout(RETINA, (64, 96))
    again = AnchorLayout.from_tensors(layout.anchors())
    assert all(map(torch.equal, again.anchors(), layout.anchors()))
    assert again.num_fused_levels == 4
    assert AnchorLayout.from_tensors(layout.anchors(), 3).num_fused_levels == 3
    assert again.level_names[:4] == ("level 0", "level 1", "level 2", "level 3")
    with pytest.raises(ValueError, match=r"levels\[1\]: expected anchors on a regular grid"):
        AnchorLayout.from_tensors([layout.anchors()[0], torch.rand(99, 4).cumsum(1)], 2)
    with pytest.raises(TypeError, match=r"levels\[0\]: expected a tensor"):
        AnchorLayout.from_tensors([[1, 2], [3, 4]])
    with pytest.raises(ValueError, match="one tensor per image, not per level"):
        AnchorLayout.from_tensors([torch.cat(layout.anchors())[:7]])


# Grids in plain tensors


def recognised(anchors):
    return AnchorLayout.from_tensors([anchors, anchors], 2)


@settings(max_examples=100, deadline=None)
@given(seed=seeds, kind=kinds)
def test_recognised_grids_give_the_same_anchors(seed, kind):
    layout = draw_layout(np.random.default_rng(seed), kind)
    for cells, size, stride, anchors in zip(
        layout.cell_anchors, layout.grid_sizes, layout.strides, layout.anchors(), strict=True
    ):
        whole = all(step.is_integer() for step in stride)
        try:
            found = recognised(anchors)
        except ValueError:
            # Only strides that are no whole numbers may be lost to rounding.
            assert not whole
            continue
        assert torch.equal(found.anchors()[0], anchors)
        if whole and math.prod(size) > 1 and kind != "densified":
            assert found.grid_sizes[0] == size
            assert len(found.cell_anchors[0]) == len(cells)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (1, 9), (9, 1), (3, 4)])
@pytest.mark.parametrize("num_cells", [1, 2, 9])
def test_grids_of_single_rows_columns_and_positions(size, num_cells):
    shapes = [(8 + i, 20 - i) for i in range(num_cells)]
    layout = AnchorLayout(
        [cell_anchors(shapes, [(0, 0)] * num_cells)] * 2, [(12, 10)] * 2, [size] * 2, 2
    )
    found = recognised(layout.anchors()[0])
    assert found.grid_sizes[0] == size
    assert len(found.cell_anchors[0]) == num_cells
    assert found.strides[0] == (12.0 if size[0] > 1 else 1.0, 10.0 if size[1] > 1 else 1.0)


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
        assert torch.equal(recognised(anchors).anchors()[0], anchors)


def test_what_is_no_grid():
    cells = cell_anchors([(16, 8), (8, 16)], [(0, 0)] * 2)
    layout = AnchorLayout([cells] * 2, [8, 8], [(9, 50)] * 2, 2)
    anchors = layout.anchors()[0]
    assert recognised(anchors).grid_sizes[0] == (9, 50)
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
    }
    for tensor in irregular.values():
        with pytest.raises(ValueError, match=r"levels\[0\]: expected anchors on a regular grid"):
            recognised(tensor)


def test_up_to_64_cell_anchors_are_looked_for():
    for count in (63, 64, 65):
        shapes = [(8 + i, 100 - i) for i in range(count)]
        layout = AnchorLayout([cell_anchors(shapes, [(0, 0)] * count)] * 2, [8, 8], [(3, 4)] * 2, 2)
        if count <= 64:
            assert len(recognised(layout.anchors()[0]).cell_anchors[0]) == count
        else:
            with pytest.raises(ValueError, match="regular grid"):
                recognised(layout.anchors()[0])


# Levels that cannot be told apart


@pytest.mark.parametrize(
    ("levels", "names"),
    [([CELL, CELL], (1, 0)), ([CELL, 2 * CELL, torch.cat([2 * CELL, 2 * CELL])], (2, 1))],
)
def test_identical_levels_are_named(levels, names):
    layout = AnchorLayout(levels, [8] * len(levels), [(4, 4)] * len(levels), 2)
    for anchors in (layout, layout.anchors(), [a.flip(0) for a in layout.anchors()]):
        with pytest.raises(ValueError, match="level {} also lie on level {},".format(*names)):
            estimate_alpha(anchors, torch.zeros(0, 4), num_fused_levels=2)


def test_levels_within_a_finer_one_are_refused_and_others_are_not():
    def layout(cells, strides, grids):
        return AnchorLayout(cells, strides, grids, 2)

    both = torch.cat([2 * CELL, CELL])
    refused = {
        "coarser grid": layout([CELL, CELL], [8, 16], [(4, 4), (2, 2)]),
        "offset": layout([CELL, CELL + 8], [8, 16], [(4, 4), (1, 2)]),
        "one of several cells": layout([both, CELL], [8, 16], [(4, 4), (2, 2)]),
        "single position": layout([CELL, CELL + 16], [8, 99], [(4, 4), (1, 1)]),
        "third level": layout([CELL, 4 * CELL, CELL], [8, 16, 32], [(4, 4), (2, 2), (1, 1)]),
    }
    kept = {
        "other size": layout([CELL, 1.01 * CELL], [8, 16], [(4, 4), (2, 2)]),
        "off the grid": layout([CELL, CELL + 4], [8, 16], [(4, 4), (2, 2)]),
        "beyond the grid": layout([CELL, CELL], [8, 16], [(4, 4), (3, 3)]),
        "before the grid": layout([CELL, CELL - 8], [8, 16], [(4, 4), (2, 2)]),
        "other stride": layout([CELL, CELL], [8, 12], [(4, 4), (2, 2)]),
        "other stride, first and third alike": layout([CELL, CELL], [8, 12], [(6, 6), (3, 3)]),
        "first row alike": layout([CELL, CELL], [8, (8, 12)], [(6, 6), (3, 3)]),
        "finer one": layout([CELL, CELL], [16, 8], [(2, 2), (4, 4)]),
        "one of two cells": layout([CELL, both], [8, 16], [(4, 4), (2, 2)]),
    }
    for name, one in {**refused, **kept}.items():
        literal = one.anchors()
        rows = [{tuple(row) for row in a.tolist()} for a in literal]
        within = any(coarse <= fine for fine, coarse in combinations(rows, 2))
        assert within == (name in refused), name
        for anchors in (one, literal, [a.flip(0) for a in literal]):
            with pytest.raises(ValueError, match="also lie on") if within else nullcontext():
                estimate_alpha(anchors, torch.zeros(0, 4), num_fused_levels=2)


def test_irregular_anchors_are_compared_row_by_row():
    fine = AnchorLayout([CELL] * 2, [8, 8], [(12, 12)] * 2, 2).anchors()[0]
    fine = fine[torch.randperm(len(fine), generator=torch.Generator().manual_seed(0))]
    other = fine[:1] + 1
    for coarse in (fine, fine[:1], fine[5:90:2], torch.cat([fine[3:9], fine[:7]])):
        with pytest.raises(ValueError, match="level 1 also lie on level 0"):
            estimate_alpha([fine, coarse], torch.zeros(0, 4), num_fused_levels=2)
    for coarse in (other, torch.cat([fine, other]), torch.cat([fine[:1], other])):
        estimate_alpha([fine, coarse], torch.zeros(0, 4), num_fused_levels=2)


def test_layouts_with_equal_cells_are_each_told_apart():
    cell = torch.tensor([[-8.0, -8.0, 8.0, 8.0]])
    apart = AnchorLayout([cell, cell], [8, 12], [(8, 8), (4, 4)], 2)
    nested = AnchorLayout([cell, cell], [8, 16], [(8, 8), (4, 4)], 2)
    boxes = [torch.tensor([[1.0, 1, 9, 9]])] * 2
    assert estimate_alpha([apart, apart], boxes).num_boxes == 2
    with pytest.raises(ValueError, match=r"^anchors\[1\]: expected levels that can be told apart"):
        estimate_alpha([apart, nested], boxes)
