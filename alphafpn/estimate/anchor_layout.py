"""What anchors lie where on an image: `AnchorLayout`, from a detector or from plain tensors."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from alphafpn.estimate.checks import check_boxes, check_num_fused_levels
from alphafpn.estimate.grids import GridLevel, as_tuples, on_grid, recognise_grid
from alphafpn.estimate.probe import DetectorProbe
from alphafpn.estimate.resize import Size


@dataclass(frozen=True, eq=False)
class AnchorLayout:
    """Cell anchors, repeated over the grid of each pyramid level. Finest level first.

    Args:
        cell_anchors: Per level, anchors [A, 4] (xyxy, pixels) of the grid position at the origin.
        strides: Per level, the distance between grid positions in pixels: a number or (y, x).
        grid_sizes: Per level, (rows, columns).
        num_fused_levels: K, how many of the levels the pyramid fuses; the others are extra levels.
        names: Of the feature maps, where they have any.

    Raises:
        TypeError: If a part has the wrong type.
        ValueError: If the parts do not fit together; the message names the level.

    Examples:
        >>> import torch
        >>> cell = torch.tensor([[-8.0, -8.0, 8.0, 8.0]])
        >>> layout = AnchorLayout([cell, 2 * cell], [8, 16], [(4, 6), (2, 3)], 2)
        >>> [tuple(level.shape) for level in layout.anchors()]
        [(24, 4), (6, 4)]
    """

    cell_anchors: Sequence[Tensor]
    strides: Sequence[float | tuple[float, float]]
    grid_sizes: Sequence[Size]
    num_fused_levels: int
    names: Sequence[str] | None = None
    _levels: tuple[GridLevel, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        lengths = {
            name: len(getattr(self, name)) for name in ("cell_anchors", "strides", "grid_sizes")
        }
        if len(set(lengths.values())) != 1:
            raise ValueError(f"one entry per level expected in each part, found {lengths}")
        check_num_fused_levels(self.num_fused_levels, len(self.cell_anchors))
        all_cells, levels = [], []
        for i, (cells, stride, size) in enumerate(
            zip(self.cell_anchors, self.strides, self.grid_sizes, strict=True)
        ):
            cells = check_boxes(cells, f"cell_anchors[{i}]")
            if len(cells) == 0:
                raise ValueError(f"cell_anchors[{i}]: at least one anchor expected, found none")
            all_cells.append(cells)
            pair, grid = _stride(stride, i), _whole_pair(size, f"grid_sizes[{i}]: (rows, columns)")
            levels.append(GridLevel(as_tuples(cells), pair, grid, cells.dtype))
        object.__setattr__(self, "cell_anchors", tuple(all_cells))
        object.__setattr__(self, "_levels", tuple(levels))

    @classmethod
    def from_detector(cls, model: nn.Module, image_size: Size) -> AnchorLayout:
        """Reads the layout that a torchvision detector has on one image, alone in its batch.

        No feature is computed: sizes come from a copy of the backbone on the meta device.

        Args:
            model: A torchvision RetinaNet, FCOS, Faster, Mask or Keypoint R-CNN, or the like.
            image_size: (height, width) of the image as given to the detector, in pixels. Of several
                `min_size` the last one counts, as in evaluation.

        Raises:
            TypeError: If `model` has no feature pyramid with anchors on it.
            ValueError: If the resized image would have no pixels.
        """
        size = _whole_pair(image_size, "image_size: (height, width)")
        view = DetectorProbe(model)
        return cls(*view.anchor_grids(view.resize.frame(size)[1]))

    @classmethod
    def from_tensors(
        cls, levels: Sequence[Tensor], num_fused_levels: int | None = None
    ) -> AnchorLayout:
        """Recognises the grid in plain tensors of anchors.

        Args:
            levels: Anchors [N_l, 4] (xyxy, pixels) per level, in torchvision's order: grid row by
                row, and within a position the cell anchors.
            num_fused_levels: K; by default all levels but one.

        Raises:
            ValueError: If a level is no regular grid; the message names it.
        """
        levels = [check_boxes(level, f"anchors of level {i}") for i, level in enumerate(levels)]
        grids = [recognise_grid(level) for level in levels]
        irregular = [i for i, grid in enumerate(grids) if grid is None]
        if irregular:
            raise ValueError(f"anchors of level {irregular[0]} are no regular grid")
        return cls._from_grids(
            [grid for grid in grids if grid is not None], levels, num_fused_levels
        )

    @classmethod
    def _from_grids(
        cls, grids: Sequence[GridLevel], levels: Sequence[Tensor], num_fused_levels: int | None
    ) -> AnchorLayout:
        layout = cls(
            [level.new_tensor(grid.cells) for grid, level in zip(grids, levels, strict=True)],
            [grid.stride for grid in grids],
            [grid.size for grid in grids],
            len(levels) - 1 if num_fused_levels is None else num_fused_levels,
        )
        object.__setattr__(layout, "_levels", tuple(grids))
        return layout

    @property
    def level_names(self) -> tuple[str, ...]:
        """Names the levels: P2, P3, ... where strides double, else as the feature maps."""
        logs = [round(math.log2(max(level.stride))) for level in self._levels]
        exact = max(self._levels[0].stride) == 2.0 ** logs[0]
        if exact and logs == list(range(logs[0], logs[0] + len(logs))):
            return tuple(f"P{k}" for k in logs)
        return tuple(self.names or (f"level {i}" for i in range(len(logs))))

    def anchors(self) -> list[Tensor]:
        """Lists anchors [N_l, 4] (xyxy, pixels) per level; their `cat` is torchvision's."""
        return [
            on_grid(cells, level.stride, level.size).view(-1, 4)
            if level.anchors is None
            else level.anchors
            for cells, level in zip(self.cell_anchors, self._levels, strict=True)
        ]

    def to(self, device: torch.device | str) -> AnchorLayout:
        """Returns the same layout with its tensors on `device`."""
        moved = copy.copy(self)
        cells = [cell.to(device) for cell in self.cell_anchors]
        object.__setattr__(moved, "cell_anchors", cells)
        object.__setattr__(moved, "_levels", tuple(level.to(device) for level in self._levels))
        return moved


def _stride(stride: Any, level: int) -> tuple[float, float]:
    """Returns `stride` as positive (y, x)."""
    try:
        y, x = stride if isinstance(stride, Sequence) else (stride, stride)
        pair = float(y), float(x)
    except (TypeError, ValueError):
        raise TypeError(
            f"strides[{level}]: a number or (y, x) expected, found {stride!r}"
        ) from None
    if not all(0 < s < math.inf for s in pair):
        raise ValueError(f"strides[{level}]: positive pixels expected, found {stride}")
    return pair


def _whole_pair(values: Any, what: str) -> tuple[int, int]:
    """Returns `values` as two ints from 1; `what` begins the error message."""
    try:
        first, second = (operator.index(n) for n in values)
    except (TypeError, ValueError):
        raise TypeError(f"{what} in whole numbers expected, found {values!r}") from None
    if min(first, second) < 1:
        raise ValueError(f"{what} of at least 1 expected, found {values}")
    return first, second


def largest(layouts: Sequence[AnchorLayout]) -> AnchorLayout:
    """Returns the layout of the largest image. Small ones may have levels of a single position."""
    return max(layouts, key=lambda layout: math.prod(layout._levels[0].size))


def describe(layouts: Sequence[AnchorLayout], num_levels: int) -> dict[str, Any]:
    """Returns what an estimate says of its anchors; without `layouts` they are irregular."""
    if not layouts:
        return {"level_names": tuple(f"level {i}" for i in range(num_levels))}
    strides = [[max(level.stride) for level in layout._levels] for layout in layouts]
    cells = {tuple(len(level.cells) for level in layout._levels) for layout in layouts}
    return {
        "level_names": largest(layouts).level_names,
        "strides": tuple(map(max, zip(*strides, strict=True))),
        "anchors_per_cell": cells.pop() if len(cells) == 1 else (),
    }
