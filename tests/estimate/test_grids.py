from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from alphafpn import AnchorLayout
from alphafpn.estimate.grids import recognise_grid
from tests.anchor_sets import cell_anchors, draw_layout, kinds, seeds


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
    for shift in (0.1, 1000.7, 32_000.3, -5000.7):
        anchors = layout.anchors()[0] + shift
        grid = recognise_grid(anchors)
        assert (grid.size, grid.stride) == ((30, 300), (4.0, 4.0))
        assert grid.anchors is anchors


def test_up_to_64_cell_anchors_are_looked_for():
    for count in (63, 64, 65):
        shapes = [(8 + i, 100 - i) for i in range(count)]
        layout = AnchorLayout([cell_anchors(shapes, [(0, 0)] * count)] * 2, [8, 8], [(3, 4)] * 2, 2)
        grid = recognise_grid(layout.anchors()[0])
        assert (grid is not None) == (count <= 64)


def test_a_stride_that_is_no_whole_number():
    cells = cell_anchors([(12, 6)], [(0, 0)])
    layout = AnchorLayout([cells] * 2, [(10.6, 4.25), 8], [(200, 300), (2, 2)], 2)
    grid = recognise_grid(layout.anchors()[0])
    assert grid.stride == pytest.approx((10.6, 4.25), rel=1e-6)
