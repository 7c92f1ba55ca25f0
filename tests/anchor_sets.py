"""Anchors and boxes of many kinds, drawn from a seed."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from alphafpn import AnchorLayout

# Width and height of the paper's anchors, strides 4 to 64.
FASTER = [
    [(12.465, 6.232), (8.31, 10.388), (6.232, 12.465)],
    [(17.188, 9.375), (10.938, 14.062), (9.375, 18.75)],
    [(26.666, 13.913), (16.231, 20.869), (12.753, 25.506)],
    [(42.511, 20.783), (26.451, 34.009), (21.728, 43.456)],
    [(85.895, 43.42), (52.859, 68.905), (42.476, 84.952)],
]
RETINA = [
    [(12, 6), (8, 8), (6, 12)],
    [(22, 12), (16, 16), (12, 24)],
    [(46, 24), (32, 32), (22, 44)],
    [(90, 44), (64, 64), (46, 92)],
    [(182, 92), (128, 128), (90, 180)],
]
STRIDES = [4, 8, 16, 32, 64]
KINDS = ["torchvision", "one shape", "legacy", "octaves", "scattered", "densified", "many shapes"]


def cell_anchors(shapes: list, centres: list, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(
        [
            [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
            for (w, h), (x, y) in zip(shapes, centres, strict=True)
        ],
        dtype=dtype,
    )


def legacy_layout(
    table: list, size: tuple[int, int], octaves: tuple[float, ...] = (1.0,)
) -> AnchorLayout:
    """The paper's anchors: centred on the cells, of sizes that are no whole numbers."""
    cells = []
    for stride, shapes in zip(STRIDES, table, strict=True):
        scaled = [(w * o, h * o) for o in octaves for w, h in shapes]
        cells.append(cell_anchors(scaled, [(stride / 2, stride / 2)] * len(scaled)))
    return AnchorLayout(cells, STRIDES, [(size[0] // s, size[1] // s) for s in STRIDES], 4)


def draw_cells(rng: np.random.Generator, kind: str, level: int, stride: float) -> tuple:
    s = stride
    if kind == "torchvision":
        shapes = [(2 * round(s * r), 2 * round(s / r)) for r in (0.7, 1, 1.4)]
    elif kind == "one shape":
        shapes = [(2 * round(s), 2 * round(s))]
    elif kind == "legacy":
        return FASTER[level], [(s / 2, s / 2)] * 3
    elif kind == "octaves":
        shapes = [(w * 2**o, h * 2**o) for w, h in RETINA[level] for o in (0, 1 / 3, 2 / 3)]
        return shapes, [(s / 2, s / 2)] * 9
    elif kind == "scattered":
        count = rng.integers(1, 5)
        shapes = [tuple(p) for p in rng.uniform(0.5, 4, (count, 2)) * s]
        return shapes, [tuple(p) for p in rng.uniform(-2, 2, (count, 2)) * s]
    elif kind == "densified":
        return [(2 * s, 2 * s)] * 4, [(0, 0), (s / 2, 0), (0, s / 2), (s / 2, s / 2)]
    else:
        shapes = [(s * a, s * b) for a in (1, 2, 3) for b in (1, 2, 3)]
    return shapes, [(0, 0)] * len(shapes)


def draw_layout(
    rng: np.random.Generator, kind: str, dtype: torch.dtype = torch.float32
) -> AnchorLayout:
    """Two to five levels on grids of one to a few dozen positions."""
    num_levels = int(rng.integers(2, 6))
    strides = STRIDES[:num_levels]
    choice = rng.random()
    if choice < 0.3:
        strides = np.sort(rng.integers(3, 40, num_levels)).tolist()
    elif choice < 0.45:
        strides = np.sort(rng.uniform(3, 40, num_levels)).astype(np.float32).tolist()
    parts = [draw_cells(rng, kind, i, s) for i, s in enumerate(strides)]
    cells = [cell_anchors(*part, dtype) for part in parts]
    rows, columns = rng.integers(1, rng.choice([2, 6, 25]), 2) * strides[0]
    grids = [(max(1, int(rows // s)), max(1, int(columns // s))) for s in strides]
    return AnchorLayout(cells, strides, grids, 2)


def draw_boxes(
    rng: np.random.Generator,
    layout: AnchorLayout,
    count: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Boxes in, across and outside the image; some on whole pixels, on cells, or without area."""
    (rows, columns), (stride_y, stride_x) = layout.grid_sizes[0], layout.strides[0]
    extent = np.array([columns * stride_x, rows * stride_y])
    sides = np.exp(1.2 * rng.normal(size=(count, 2))) * rng.choice([3, 10, 40])
    centres = rng.uniform(-0.2, 1.2, (count, 2)) * extent
    if rng.random() < 0.3:
        centres = np.round(centres / stride_x * 2) * stride_x / 2
    if rng.random() < 0.3:
        sides = 2 * np.round(sides)
    boxes = np.concatenate([centres - sides / 2, centres + sides / 2], axis=1)
    if rng.random() < 0.3:
        boxes = np.round(boxes)
    if rng.random() < 0.1:
        boxes[:, 2] = boxes[:, 0]
    return torch.tensor(boxes, dtype=dtype)


def draw(seed: int, kind: str, count: int = 60) -> tuple[AnchorLayout, Tensor]:
    """A layout, and boxes about it."""
    rng = np.random.default_rng(seed)
    layout = draw_layout(rng, kind)
    return layout, draw_boxes(rng, layout, count)


seeds = st.integers(0, 2**32 - 1)
kinds = st.sampled_from(KINDS)
