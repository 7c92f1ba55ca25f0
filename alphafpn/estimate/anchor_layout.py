"""`AnchorLayout`: cell anchors on grids, from a detector or recognised in plain tensors."""

from __future__ import annotations

import copy
import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alphafpn.estimate.checks import check_boxes, check_num_fused_levels
from alphafpn.estimate.probe import DetectorProbe
from alphafpn.estimate.resize import Size

# Cell anchors per position that are looked for in plain tensors.
MAX_CELLS = 64


@dataclass(frozen=True, eq=False)
class AnchorLayout:
    """Cell anchors, repeated over the grid of each pyramid level. Finest level first.

    Args:
        cell_anchors: Per level, anchors [A, 4] (xyxy, pixels) of the grid position at the origin.
        strides: Per level, the distance between grid positions in pixels: a number or (y, x).
        grid_sizes: Per level, (rows, columns).
        num_fused_levels: K, how many of the levels the pyramid fuses; the others are extra levels.
        names: Of the feature maps, if they have any.

    The attributes have the same names; `strides` are (y, x) for each level.

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
    strides: Sequence[Any]
    grid_sizes: Sequence[Size]
    num_fused_levels: int
    names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        num_levels = len(self.cell_anchors)
        for name in ("strides", "grid_sizes", "names"):
            part = getattr(self, name)
            if part is not None and len(part) != num_levels:
                raise ValueError(
                    f"{name}: expected one entry for each of {num_levels} levels of cell_anchors, "
                    f"found {len(part)}"
                )
        values = {
            "cell_anchors": tuple(
                check_anchors(cells, f"cell_anchors[{i}]")
                for i, cells in enumerate(self.cell_anchors)
            ),
            "strides": tuple(_stride(s, f"strides[{i}]") for i, s in enumerate(self.strides)),
            "grid_sizes": tuple(
                whole_pair(size, f"grid_sizes[{i}]", "(rows, columns)")
                for i, size in enumerate(self.grid_sizes)
            ),
            "num_fused_levels": check_num_fused_levels(self.num_fused_levels, num_levels),
            "names": None if self.names is None else tuple(self.names),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_detector(cls, model: nn.Module, image_size: Size) -> AnchorLayout:
        """Reads the layout that a torchvision detector has on one image, alone in its batch.

        No feature is computed: sizes come from a copy of the backbone on the meta device.

        Args:
            model: A torchvision RetinaNet, FCOS, Faster, Mask or Keypoint R-CNN, or a module that
                holds exactly one.
            image_size: (height, width) of the image as given to the detector, in pixels. If the
                detector has several `min_size`, the last one counts, as in evaluation.

        Raises:
            TypeError: If `model` has no feature pyramid with anchors on it.
            ValueError: If the resized image would have no pixels.
        """
        size = whole_pair(image_size, "image_size", "(height, width)")
        probe = DetectorProbe(model)
        return cls(*probe.anchor_grids(probe.resize.frame(size)[1]))

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
        levels = [check_anchors(level, f"levels[{i}]") for i, level in enumerate(levels)]
        grids = []
        for i, level in enumerate(levels):
            grid = recognise_grid(level)
            if grid is None:
                raise ValueError(
                    f"levels[{i}]: expected anchors on a regular grid, row by row, found others"
                )
            grids.append(grid)
        cells, strides, grid_sizes = zip(*grids, strict=True)
        k = len(levels) - 1 if num_fused_levels is None else num_fused_levels
        return cls(cells, strides, grid_sizes, k)

    @property
    def level_names(self) -> tuple[str, ...]:
        """Names the levels: P2, P3, ... if strides double, else as the feature maps."""
        strides = [max(stride) for stride in self.strides]
        logs = [round(math.log2(stride)) for stride in strides]
        if strides[0] == 2.0 ** logs[0] and logs == list(range(logs[0], logs[0] + len(logs))):
            return tuple(f"P{k}" for k in logs)
        return tuple(self.names or (f"level {i}" for i in range(len(logs))))

    def anchors(self) -> list[Tensor]:
        """Lists anchors [N_l, 4] (xyxy, pixels) per level; their `cat` is torchvision's."""
        parts = zip(self.cell_anchors, self.strides, self.grid_sizes, strict=True)
        return [_on_grid(*part) for part in parts]

    def to(self, device: torch.device | str) -> AnchorLayout:
        """Returns the same layout with its tensors on `device`."""
        moved = copy.copy(self)
        cells = tuple(cell.to(device) for cell in self.cell_anchors)
        object.__setattr__(moved, "cell_anchors", cells)
        return moved


def _on_grid(cells: Tensor, stride: tuple[float, float], size: Size) -> Tensor:
    """Repeats cell anchors [A, 4] over a grid, in their dtype: anchors [N, 4]."""
    y, x = (
        torch.arange(n, dtype=cells.dtype, device=cells.device) * s
        for n, s in zip(size, stride, strict=True)
    )
    shift_y, shift_x = torch.meshgrid(y, x, indexing="ij")
    shifts = torch.stack([shift_x, shift_y, shift_x, shift_y], dim=-1)
    anchors: Tensor = shifts[:, :, None] + cells
    return anchors.view(-1, 4)


def recognise_grid(anchors: Tensor) -> tuple[Tensor, tuple[float, float], Size] | None:
    """Finds cell anchors, stride (y, x) and (rows, columns) that give exactly `anchors` [N, 4].

    Expects torchvision's order: row by row, and within a position the cell anchors. Returns None
    if there is no such grid.
    """
    some = anchors[1 : MAX_CELLS + 1]
    # The next position, right of the first or below it, repeats the first anchor in x or in y.
    repeats = (some == anchors[0]).sum(1) >= 2
    counts = [int(i) + 1 for i in repeats.nonzero()]
    if len(anchors) <= MAX_CELLS:
        counts.append(len(anchors))
    grids = (_grid_of(anchors, n) for n in counts if len(anchors) % n == 0)
    return next((grid for grid in grids if grid is not None), None)


def _grid_of(anchors: Tensor, num_cells: int) -> tuple[Tensor, tuple[float, float], Size] | None:
    """Finds the grid with `num_cells` anchors at each position, if there is one."""
    tops = anchors[::num_cells, 1]
    lower = (tops != tops[0]).nonzero()
    columns = int(lower[0]) if len(lower) else len(tops)
    size = len(tops) // columns, columns
    cells, last = anchors[:num_cells], anchors[-num_cells]
    strides = []
    for n, distance in zip(size, (last - cells[0])[[1, 0]].tolist(), strict=True):
        step = distance / (n - 1) if n > 1 else 1.0
        # Rounded anchors of a whole stride are recognised by that stride.
        whole = float(round(step))
        strides.append(whole if math.isclose(step, whole, rel_tol=1e-4) else step)
    if min(strides) <= 0:
        return None
    stride = strides[0], strides[1]
    found = torch.equal(_on_grid(cells, stride, size), anchors)
    return (cells, stride, size) if found else None


def check_anchors(anchors: Any, where: str) -> Tensor:
    """Returns `anchors` as `check_boxes` does; at least one is needed."""
    checked = check_boxes(anchors, where)
    if len(checked) == 0:
        raise ValueError(f"{where}: expected at least one anchor, found none")
    return checked


def check_distinct(anchors: AnchorLayout | Sequence[Tensor], where: str) -> None:
    """Raises ValueError if all anchors of a level also lie on a finer one."""
    names: Sequence[str] = ()
    if isinstance(anchors, AnchorLayout):
        if distinct_by_size(anchors):
            return
        names, anchors = anchors.level_names, anchors.anchors()
    for i, j in itertools.combinations(range(len(anchors)), 2):
        if _contains(anchors[i], anchors[j]):
            fine, coarse = (names[k].removeprefix("level ") if names else k for k in (i, j))
            raise ValueError(
                f"{where}: expected levels that can be told apart, found that all anchors of level "
                f"{coarse} also lie on level {fine}, so no box can be given to one of them by its "
                "best IoU. (torchvision's AnchorGenerator returns one tensor per image, not per "
                "level: see AnchorLayout.from_detector. Its MobileNet detectors have such levels "
                "by design; patch them with factors of your choice.)"
            )


def distinct_by_size(layout: AnchorLayout) -> bool:
    """Whether each level has a cell anchor of a size that no finer level has."""
    sizes = [[(x2 - x1, y2 - y1) for x1, y1, x2, y2 in c.tolist()] for c in layout.cell_anchors]
    return not any(
        all(any(_close(size, other) for other in fine) for size in coarse)
        for fine, coarse in itertools.combinations(sizes, 2)
    )


def _close(size: tuple[float, float], other: tuple[float, float]) -> bool:
    # Equal but for rounding.
    return all(math.isclose(a, b, abs_tol=1e-3) for a, b in zip(size, other, strict=True))


def _contains(fine: Tensor, coarse: Tensor) -> bool:
    """Whether every row of `coarse` is a row of `fine`."""
    # One row settles nearly every case without sorting either tensor.
    if not (fine == coarse[0]).all(1).any():
        return False
    fine, coarse = fine.unique(dim=0), coarse.unique(dim=0)
    return len(torch.cat([fine, coarse]).unique(dim=0)) == len(fine)


def _stride(stride: Any, where: str) -> tuple[float, float]:
    """Returns `stride` as positive (y, x)."""
    try:
        y, x = stride if isinstance(stride, Sequence) else (stride, stride)
        pair = float(y), float(x)
    except (TypeError, ValueError):
        raise TypeError(f"{where}: expected a number or (y, x), found {stride!r}") from None
    if not all(0 < s < math.inf for s in pair):
        raise ValueError(f"{where}: expected positive pixels, found {stride}")
    return pair


def whole_pair(values: Any, where: str, what: str) -> Size:
    """Returns `values` as two ints from 1; `what` says which ones."""
    try:
        first, second = (operator.index(n) for n in values)
    except (TypeError, ValueError):
        raise TypeError(f"{where}: expected {what} in whole numbers, found {values!r}") from None
    if min(first, second) < 1:
        raise ValueError(f"{where}: expected {what} of at least 1, found {values}")
    return first, second


def largest(layouts: Sequence[AnchorLayout]) -> AnchorLayout:
    """Returns the layout of the largest image. Small ones may have levels of a single position."""
    return max(layouts, key=lambda layout: math.prod(layout.grid_sizes[0]))


def describe_levels(layouts: Sequence[AnchorLayout], num_levels: int) -> dict[str, Any]:
    """Returns what an estimate says of its anchors; without `layouts` they are irregular."""
    if not layouts:
        return {"level_names": tuple(f"level {i}" for i in range(num_levels))}
    strides = [[max(stride) for stride in layout.strides] for layout in layouts]
    cells = {tuple(map(len, layout.cell_anchors)) for layout in layouts}
    return {
        "level_names": largest(layouts).level_names,
        "strides": tuple(map(max, zip(*strides, strict=True))),
        "anchors_per_cell": cells.pop() if len(cells) == 1 else (),
    }
