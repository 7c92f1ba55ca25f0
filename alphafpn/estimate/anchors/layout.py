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

from alphafpn.estimate.matching.grid import Cell, GridLevel

Size = tuple[int, int]

# Cell anchors that are looked for in plain tensors.
MAX_CELLS = 64


@dataclass(frozen=True, eq=False)
class AnchorLayout:
    """Cell anchors, repeated over the grid of each pyramid level. Finest level first.

    Args:
        cell_anchors: per level, anchors [A, 4] (xyxy, pixels) of the grid position at the origin.
        strides: per level, the distance between grid positions in pixels: a number or (y, x).
        grid_sizes: per level, (rows, columns).
        num_fused_levels: K, how many of the levels the pyramid fuses; the others are extra levels.
        names: of the feature maps, where they have any.

    Raises:
        TypeError: if a part has the wrong type.
        ValueError: if the parts do not fit together; the message names the level.

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
            levels.append(GridLevel(_as_tuples(cells), pair, grid, cells.dtype))
        object.__setattr__(self, "cell_anchors", tuple(all_cells))
        object.__setattr__(self, "_levels", tuple(levels))

    @classmethod
    def from_detector(cls, model: nn.Module, image_size: Size) -> AnchorLayout:
        """The layout a torchvision detector has on one image, alone in its batch.

        No feature is computed: sizes come from a copy of the backbone on the meta device.

        Args:
            model: a torchvision RetinaNet, FCOS, Faster, Mask or Keypoint R-CNN, or the like.
            image_size: (height, width) of the image as given to the detector, in pixels. Of several
                ``min_size`` the last one counts, as in evaluation.

        Raises:
            TypeError: if `model` has no feature pyramid with anchors on it.
            ValueError: if the resized image would have no pixels.
        """
        # Only here, since that module builds on this one.
        from alphafpn.estimate.anchors.detector import DetectorView

        size = _whole_pair(image_size, "image_size: (height, width)")
        view = DetectorView(model)
        return view.layout(view.frame(size)[1])

    @classmethod
    def from_tensors(
        cls, levels: Sequence[Tensor], num_fused_levels: int | None = None
    ) -> AnchorLayout:
        """Recognises the grid in plain tensors of anchors.

        Args:
            levels: anchors [N_l, 4] (xyxy, pixels) per level, in torchvision's order: grid row by
                row, and within a position the cell anchors.
            num_fused_levels: K; by default all levels but one.

        Raises:
            ValueError: if a level is no regular grid; the message names it.
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
        """P2, P3, ... where strides double from level to level, else the feature maps' names."""
        logs = [round(math.log2(max(level.stride))) for level in self._levels]
        exact = max(self._levels[0].stride) == 2.0 ** logs[0]
        if exact and logs == list(range(logs[0], logs[0] + len(logs))):
            return tuple(f"P{k}" for k in logs)
        return tuple(self.names or (f"level {i}" for i in range(len(logs))))

    def anchors(self) -> list[Tensor]:
        """Anchors [N_l, 4] (xyxy, pixels) per level; their `cat` is what torchvision generates."""
        result = []
        for cells, level in zip(self.cell_anchors, self._levels, strict=True):
            if level.anchors is not None:
                result.append(level.anchors)
                continue
            y, x = (
                torch.arange(n, dtype=cells.dtype, device=cells.device) * s
                for n, s in zip(level.size, level.stride, strict=True)
            )
            shift_y, shift_x = torch.meshgrid(y, x, indexing="ij")
            shifts = torch.stack([shift_x, shift_y, shift_x, shift_y], dim=-1).view(-1, 1, 4)
            result.append((shifts + cells).reshape(-1, 4))
        return result

    def to(self, device: torch.device | str) -> AnchorLayout:
        """The same layout with its tensors on `device`."""
        moved = copy.copy(self)
        cells = [cell.to(device) for cell in self.cell_anchors]
        object.__setattr__(moved, "cell_anchors", cells)
        levels = tuple(
            level if level.anchors is None else level._replace(anchors=level.anchors.to(device))
            for level in self._levels
        )
        object.__setattr__(moved, "_levels", levels)
        return moved


def check_num_fused_levels(num_fused_levels: int, num_levels: int) -> None:
    """Raises TypeError or ValueError unless 2 <= num_fused_levels <= num_levels."""
    if not isinstance(num_fused_levels, int):
        raise TypeError(f"num_fused_levels: an int expected, found {num_fused_levels!r}")
    if not 2 <= num_fused_levels <= num_levels:
        raise ValueError(
            f"num_fused_levels: from 2 to the number of levels ({num_levels}) expected, found "
            f"{num_fused_levels}. (torchvision's AnchorGenerator returns one tensor per image, not "
            "per level: see AnchorLayout.from_detector.)"
        )


def check_boxes(boxes: object, where: str) -> Tensor:
    """`boxes` as a floating tensor [N, 4] of finite xyxy boxes.

    Raises:
        TypeError: if it is no tensor of real numbers.
        ValueError: if it has another shape, or a box is not finite or inverted, or so large that
            its area is not finite.
    """
    if not isinstance(boxes, Tensor):
        raise TypeError(f"{where}: a tensor [N, 4] expected, found {type(boxes).__name__}")
    if boxes.dtype == torch.bool or boxes.is_complex():
        raise TypeError(f"{where}: real numbers expected, found {boxes.dtype}")
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        # An image without boxes is often written `torch.tensor([])`.
        if boxes.shape in ((0,), (0, 0), (1, 0)):
            return boxes.new_zeros((0, 4), dtype=torch.float32)
        raise ValueError(f"{where}: shape [N, 4] expected, found {list(boxes.shape)}")
    boxes = boxes.detach()
    if boxes.dtype not in (torch.float32, torch.float64):
        boxes = boxes.float()
    if len(boxes):
        sides = boxes[:, 2:] - boxes[:, :2]
        # NaN and inf - inf fail the first comparison, a single inf the second.
        low, high = torch.stack(sides.aminmax()).tolist()
        if not (low >= 0 and high <= math.sqrt(torch.finfo(boxes.dtype).max)):
            ok = boxes.isfinite().all(1) & (sides >= 0).all(1) & sides.prod(1).isfinite()
            if not ok.all():
                index = int(ok.int().argmin())
                raise ValueError(
                    f"{where}[{index}]: finite x1 <= x2 and y1 <= y2, with a finite area, expected,"
                    f" found {boxes[index].tolist()}"
                )
    return boxes


def _stride(stride: Any, level: int) -> tuple[float, float]:
    """`stride` as positive (y, x)."""
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
    """`values` as two ints from 1; `what` begins the error message."""
    try:
        first, second = (operator.index(n) for n in values)
    except (TypeError, ValueError):
        raise TypeError(f"{what} in whole numbers expected, found {values!r}") from None
    if min(first, second) < 1:
        raise ValueError(f"{what} of at least 1 expected, found {values}")
    return first, second


def recognise_grid(anchors: Tensor) -> GridLevel | None:
    """The grid that anchors [N, 4] lie on, or None where they are no regular grid.

    Expects torchvision's order: row by row, and within a position the cell anchors.
    """
    if len(anchors) == 0:
        return None
    low, high = torch.stack(anchors.aminmax()).tolist()
    slack = 4 * torch.finfo(anchors.dtype).eps * max(-low, high, 1.0)
    # The next position starts with a copy of the first anchor, to the right of it or below.
    moved = anchors[1 : MAX_CELLS + 1] - anchors[0]
    copies = ((moved[:, :2] - moved[:, 2:]).abs() <= slack).all(1)
    copies &= ((moved > slack) | (moved.abs() <= slack)).all(1) & (moved.abs() <= slack).any(1)
    candidates = [int(i) + 1 for i in copies.nonzero()]
    if len(anchors) <= MAX_CELLS:
        candidates.append(len(anchors))
    grids = (_grid_of(anchors, num_cells, slack) for num_cells in candidates)
    return next((grid for grid in grids if grid is not None), None)


def _grid_of(anchors: Tensor, num_cells: int, slack: float) -> GridLevel | None:
    """The grid with `num_cells` anchors at each position, if it is one within `slack` pixels."""
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
    strides, shifts = [], []
    for d, last in enumerate((grid[-1, 0, 0, 1], grid[0, -1, 0, 0])):
        steps = size[d] - 1
        step = float(last - cells[0, 1 - d]) / steps if steps else 1.0
        # Anchors are often sums of whole strides, so a step that may be whole is.
        if round(step) and abs(step - round(step)) * steps <= slack:
            step = float(round(step))
        if step <= 0:
            return None
        strides.append(step)
        shifts.append(torch.arange(size[d], device=anchors.device, dtype=anchors.dtype) * step)
    shift_y, shift_x = shifts[0][:, None, None], shifts[1][:, None]
    error = torch.stack(
        [
            (cells[:, k] + shift - grid[..., k]).abs().max()
            for k, shift in enumerate((shift_x, shift_y) * 2)
        ]
    )
    worst = float(error.max())
    if worst > slack:
        return None
    return GridLevel(
        _as_tuples(cells),
        (strides[0], strides[1]),
        size,
        anchors.dtype,
        anchors if worst > 0 else None,
    )


def _as_tuples(cells: Tensor) -> tuple[Cell, ...]:
    return tuple((x1, y1, x2, y2) for x1, y1, x2, y2 in cells.tolist())


def largest(layouts: Sequence[AnchorLayout]) -> AnchorLayout:
    """The layout of the largest image. Small ones may have levels of a single position."""
    return max(layouts, key=lambda layout: math.prod(layout._levels[0].size))


def describe(layouts: Sequence[AnchorLayout], num_levels: int) -> dict[str, Any]:
    """What an estimate says of its anchors; without `layouts` they are irregular."""
    if not layouts:
        return {"level_names": tuple(f"level {i}" for i in range(num_levels))}
    strides = [[max(level.stride) for level in layout._levels] for layout in layouts]
    cells = {tuple(len(level.cells) for level in layout._levels) for layout in layouts}
    return {
        "level_names": largest(layouts).level_names,
        "strides": tuple(map(max, zip(*strides, strict=True))),
        "anchors_per_cell": cells.pop() if len(cells) == 1 else (),
    }


def check_distinct(layout: AnchorLayout, where: str) -> None:
    """Raises ValueError if all anchors of a level also lie on a finer one."""
    levels = layout._levels
    for coarse in range(1, len(levels)):
        for fine in range(coarse):
            if all(_lies_on(cell, levels[coarse], levels[fine]) for cell in levels[coarse].cells):
                names = layout.level_names
                raise ValueError(same_levels_message(where, names[fine], names[coarse]))


def same_levels_message(where: str, fine: str, coarse: str) -> str:
    """Why such levels are refused, for an error message."""
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
