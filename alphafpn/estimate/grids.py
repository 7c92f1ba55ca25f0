"""`GridLevel`: a level's anchors as cell anchors on a grid; and the search for it in tensors."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

Cell = tuple[float, float, float, float]

# Cell anchors that are looked for in plain tensors.
MAX_CELLS = 64


class GridLevel(NamedTuple):
    """Anchors of one level: `cells` repeated at `stride` over `size` positions; (y, x) order.

    `anchors` are the anchors themselves, [size[0] * size[1] * len(cells), 4] in (row, column, cell)
    order, where they are not exactly `cell + index * stride` in arithmetic of `dtype`.
    """

    cells: tuple[Cell, ...]
    stride: tuple[float, float]
    size: tuple[int, int]
    dtype: torch.dtype = torch.float32
    anchors: Tensor | None = None

    def to(self, device: torch.device | str) -> GridLevel:
        """Returns the same level with stored anchors on `device`."""
        return self if self.anchors is None else self._replace(anchors=self.anchors.to(device))


def recognise_grid(anchors: Tensor) -> GridLevel | None:
    """Finds the grid that anchors [N, 4] lie on, or None where they are no regular grid.

    Expects torchvision's order: row by row, and within a position the cell anchors.
    """
    if len(anchors) == 0:
        return None
    low, high = torch.stack(anchors.aminmax()).tolist()
    slack = 4 * torch.finfo(anchors.dtype).eps * max(-low, high)
    # The next position starts with a copy of the first anchor, beside it or below. Irregular
    # anchors of one size have many copies, and to look at one costs a pass over all anchors.
    moved = anchors[1 : MAX_CELLS + 1] - anchors[0]
    copies = ((moved[:, :2] - moved[:, 2:]).abs() <= slack).all(1)
    copies &= (moved[:, :2].abs() <= slack).any(1)
    candidates = [int(i) + 1 for i in copies.nonzero()]
    if len(anchors) <= MAX_CELLS:
        candidates.append(len(anchors))
    grids = (_grid_of(anchors, num_cells, slack) for num_cells in candidates)
    return next((grid for grid in grids if grid is not None), None)


def _grid_of(anchors: Tensor, num_cells: int, slack: float) -> GridLevel | None:
    """Finds the grid with `num_cells` anchors at each position, if there is one within `slack`."""
    if len(anchors) % num_cells:
        return None
    tops = anchors[::num_cells, 1]
    below = ((tops - tops[0]).abs() > slack).nonzero()
    columns = int(below[0]) if len(below) else len(tops)
    if len(tops) % columns:
        return None
    grid = anchors.view(-1, columns, num_cells, 4)
    size = len(grid), columns
    cells = grid[0, 0]
    strides = []
    for d, last in enumerate((grid[-1, 0, 0, 1], grid[0, -1, 0, 0])):
        steps = size[d] - 1
        step = float(last - cells[0, 1 - d]) / steps if steps else 1.0
        # Anchors are often sums of whole strides, so a step that may be whole is.
        whole = round(step)
        if whole and math.isclose(step * steps, whole * steps, rel_tol=0, abs_tol=slack):
            step = float(whole)
        if step <= 0:
            return None
        strides.append(step)
    stride = strides[0], strides[1]
    worst = float((on_grid(cells, stride, size) - grid).abs().max())
    if worst > slack:
        return None
    stored = anchors if worst > 0 else None
    return GridLevel(as_tuples(cells), stride, size, anchors.dtype, stored)


def on_grid(cells: Tensor, stride: tuple[float, float], size: tuple[int, int]) -> Tensor:
    """Repeats cell anchors [A, 4] over a grid, in their dtype: anchors [rows, columns, A, 4]."""
    y, x = (
        torch.arange(n, dtype=cells.dtype, device=cells.device) * s
        for n, s in zip(size, stride, strict=True)
    )
    shift_y, shift_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([shift_x, shift_y, shift_x, shift_y], dim=-1)[:, :, None] + cells


def as_tuples(cells: Tensor) -> tuple[Cell, ...]:
    """Returns boxes [N, 4] as what a `GridLevel` holds."""
    return tuple((x1, y1, x2, y2) for x1, y1, x2, y2 in cells.tolist())
