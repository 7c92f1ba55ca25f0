"""Whether levels can be told apart: refuses a level whose anchors also lie on a finer one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alphafpn.estimate.anchors.grids import Cell, GridLevel
from alphafpn.estimate.anchors.layout import AnchorLayout


def check_distinct(layout: AnchorLayout, where: str) -> None:
    """Raises ValueError if all anchors of a level also lie on a finer one."""
    levels = layout._levels
    for coarse in range(1, len(levels)):
        for fine in range(coarse):
            if all(_lies_on(cell, levels[coarse], levels[fine]) for cell in levels[coarse].cells):
                names = layout.level_names
                raise ValueError(_message(where, names[fine], names[coarse]))


def check_distinct_tensors(levels: Sequence[Tensor], where: str) -> None:
    """Raises ValueError if all of a level's anchors [N_l, 4] are also those of a finer one."""
    for coarse in range(1, len(levels)):
        for fine in range(coarse):
            if _contains(levels[fine], levels[coarse]):
                raise ValueError(_message(where, str(fine), str(coarse)))


def _contains(fine: Tensor, coarse: Tensor) -> bool:
    """Whether every row of `coarse` is a row of `fine`."""
    # Two rows settle nearly every case without sorting either tensor.
    for row in coarse[:: max(1, len(coarse) - 1)][:2]:
        if not (fine == row).all(1).any():
            return False
    fine, coarse = fine.unique(dim=0), coarse.unique(dim=0)
    return len(torch.cat([fine, coarse]).unique(dim=0)) == len(fine)


def _message(where: str, fine: str, coarse: str) -> str:
    """Says why such levels are refused."""
    fine, coarse = fine.removeprefix("level "), coarse.removeprefix("level ")
    return (
        f"{where}: all anchors of level {coarse} also lie on level {fine}, so no box can be given "
        "to one of them by its best IoU. (torchvision's AnchorGenerator returns one tensor per "
        "image, not per level: see AnchorLayout.from_detector. Its MobileNet detectors have such "
        "levels by design; patch them with factors of your choice.)"
    )


def _lies_on(cell: Cell, coarse: GridLevel, fine: GridLevel) -> bool:
    """Whether all copies of `cell` on the grid `coarse` are anchors of `fine`."""
    return any(
        all(
            abs((cell[d + 2] - cell[d]) - (other[d + 2] - other[d])) < 1e-4
            and _steps_fit(cell[d] - other[d], coarse, fine, 1 - d)
            for d in (0, 1)
        )
        for other in fine.cells
    )


def _steps_fit(offset: float, coarse: GridLevel, fine: GridLevel, d: int) -> bool:
    for k in {0, 1, coarse.size[d] - 1} - ({1} if coarse.size[d] == 1 else set()):
        position = (offset + k * coarse.stride[d]) / fine.stride[d]
        index = round(position)
        if abs(position - index) > 1e-4 or not 0 <= index < fine.size[d]:
            return False
    return True
