"""Whether levels can be told apart: refuses a level whose anchors also lie on a finer one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from alphafpn.estimate.anchor_layout import AnchorLayout
from alphafpn.estimate.grids import Cell, GridLevel


def check_distinct(anchors: AnchorLayout | Sequence[Tensor], where: str) -> None:
    """Raises ValueError if all anchors of a level also lie on a finer one."""
    if isinstance(anchors, AnchorLayout):
        levels: Sequence[Any] = anchors._levels
        names = [name.removeprefix("level ") for name in anchors.level_names]
        contains: Callable[[Any, Any], bool] = _grid_contains
    else:
        levels, names, contains = anchors, [str(i) for i in range(len(anchors))], _contains
    for coarse, fine in ((c, f) for c in range(len(levels)) for f in range(c)):
        if contains(levels[fine], levels[coarse]):
            raise ValueError(
                f"{where}: all anchors of level {names[coarse]} also lie on level {names[fine]}, "
                "so no box can be given to one of them by its best IoU. (torchvision's "
                "AnchorGenerator returns one tensor per image, not per level: see "
                "AnchorLayout.from_detector. Its MobileNet detectors have such levels by design; "
                "patch them with factors of your choice.)"
            )


def _contains(fine: Tensor, coarse: Tensor) -> bool:
    """Whether every row of `coarse` is a row of `fine`."""
    # One row settles nearly every case without sorting either tensor.
    if not (fine == coarse[0]).all(1).any():
        return False
    fine, coarse = fine.unique(dim=0), coarse.unique(dim=0)
    return len(torch.cat([fine, coarse]).unique(dim=0)) == len(fine)


def _grid_contains(fine: GridLevel, coarse: GridLevel) -> bool:
    """Whether every anchor of `coarse` is an anchor of `fine`."""
    return all(_lies_on(cell, coarse, fine) for cell in coarse.cells)


def _lies_on(cell: Cell, coarse: GridLevel, fine: GridLevel) -> bool:
    """Whether all copies of `cell` on the grid `coarse` are anchors of `fine`."""
    return any(
        all(
            math.isclose(cell[d] - other[d], cell[2 + d] - other[2 + d], rel_tol=0, abs_tol=1e-4)
            and _steps_fit(cell[d] - other[d], coarse, fine, 1 - d)
            for d in (0, 1)
        )
        for other in fine.cells
    )


def _steps_fit(offset: float, coarse: GridLevel, fine: GridLevel, d: int) -> bool:
    """Whether positions of `coarse` along axis `d`, moved by `offset`, are positions of `fine`."""
    last = coarse.size[d] - 1
    for k in {0, min(1, last), last}:
        position = (offset + k * coarse.stride[d]) / fine.stride[d]
        index = round(position)
        near = math.isclose(position, index, rel_tol=0, abs_tol=1e-4)
        if not near or not 0 <= index < fine.size[d]:
            return False
    return True
