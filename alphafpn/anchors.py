"""What anchors lie where on an image: `AnchorLayout`, from a detector or from plain tensors."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork

from alphafpn.matching import Cell, GridLevel

Size = tuple[int, int]


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
        ValueError: if the parts do not fit together; the message names the level.

    Example:
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
        levels = []
        for i, (cells, stride, size) in enumerate(
            zip(self.cell_anchors, self.strides, self.grid_sizes, strict=True)
        ):
            cells = check_boxes(cells, f"cell_anchors[{i}]")
            if len(cells) == 0:
                raise ValueError(f"cell_anchors[{i}]: at least one anchor expected, found none")
            pair = (stride, stride) if isinstance(stride, int | float) else tuple(stride)
            pair = tuple(float(s) for s in pair)
            if len(pair) != 2 or not all(s > 0 and math.isfinite(s) for s in pair):
                raise ValueError(f"strides[{i}]: positive pixels expected, found {stride}")
            rows, columns = (int(n) for n in size)
            if min(rows, columns) < 1:
                raise ValueError(f"grid_sizes[{i}]: (rows, columns) >= 1 expected, found {size}")
            levels.append(GridLevel(_as_tuples(cells), pair, (rows, columns)))
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
        """
        view = DetectorView(model)
        return view.layout(view.padded_size(image_size, view.resized_size(image_size)))

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


class DetectorView:
    """What the statistics need of a torchvision detector, checked once.

    Attributes:
        transform: the detector's own resize and padding.
        generator: its anchor generator.
        num_fused_levels: K of its pyramid.
        is_fcos: whether levels follow regression ranges instead of IoU.
        detections_per_image: the detector's cap on detections.
    """

    def __init__(self, model: nn.Module) -> None:
        model = getattr(model, "_orig_mod", getattr(model, "module", model))
        name = type(model).__name__
        generator = getattr(getattr(model, "rpn", model), "anchor_generator", None)
        transform = getattr(model, "transform", None)
        backbone = getattr(model, "backbone", None)
        if not (isinstance(transform, nn.Module) and isinstance(backbone, nn.Module)):
            raise TypeError(
                f"a torchvision detector expected, found {name} without transform or backbone"
            )
        if not isinstance(generator, AnchorGenerator):
            raise TypeError(
                f"a detector with an AnchorGenerator expected, found {name} with "
                f"{type(generator).__name__}"
            )
        for method in ("forward", "grid_anchors"):
            if getattr(type(generator), method) is not getattr(AnchorGenerator, method):
                raise TypeError(
                    f"{type(generator).__name__} overrides AnchorGenerator.{method}: pass its "
                    "anchors, split by level, to estimate_alpha"
                )
        pyramids = [m for m in backbone.modules() if isinstance(m, FeaturePyramidNetwork)]
        if not pyramids:
            raise TypeError(f"no FeaturePyramidNetwork in the backbone of {name}")
        self.transform: Any = transform
        self.generator = generator
        self.num_fused_levels = len(pyramids[0].inner_blocks)
        self.is_fcos = name == "FCOS" or any(c.__name__ == "FCOS" for c in type(model).__mro__)
        heads = getattr(model, "roi_heads", model)
        self.detections_per_image: int | None = getattr(heads, "detections_per_img", None)
        self._backbone = _meta_copy(backbone)
        self._sizes: dict[int, list[tuple[str, int]]] = {}
        self._separable: bool | None = None

    @property
    def min_sizes(self) -> tuple[int | None, ...]:
        """The sizes that training chooses from; ``(None,)`` where there is no such choice."""
        if not self._stock("resize") or self.transform.fixed_size is not None:
            return (None,)
        return tuple(self.transform.min_size)

    def resized_size(self, size: Size, min_size: int | None = None) -> Size:
        """(height, width) after the detector's resize of an image of (height, width)."""
        transform = self.transform
        if not self._stock("resize"):
            image = torch.empty(self.num_channels, *size, device="meta")
            height, width = transform.resize(image, None)[0].shape[-2:]
            return int(height), int(width)
        if transform.fixed_size is not None:
            return int(transform.fixed_size[1]), int(transform.fixed_size[0])
        if min_size is None:
            min_size = transform.min_size[-1]
        # `_resize_image_and_masks` and `interpolate(recompute_scale_factor=True)`.
        scale = min(min_size / min(size), transform.max_size / max(size))
        return math.floor(size[0] * scale), math.floor(size[1] * scale)

    def padded_size(self, size: Size, resized: Size) -> Size:
        """(height, width) of the batch that holds the resized image alone."""
        if min(resized) < 1:
            raise ValueError(f"an image of (height, width) {size} is resized to {resized}")
        if not self._stock("batch_images"):
            image = torch.empty(self.num_channels, *resized, device="meta")
            height, width = self.transform.batch_images([image]).shape[-2:]
            return int(height), int(width)
        unit = self.transform.size_divisible
        return math.ceil(resized[0] / unit) * unit, math.ceil(resized[1] / unit) * unit

    def layout(self, padded: Size) -> AnchorLayout:
        """The layout on a batch of (height, width)."""
        maps = self.feature_maps(padded)
        cells = [cell.float() for cell in self.generator.cell_anchors]
        if len(cells) != len(maps):
            raise ValueError(
                f"{len(maps)} feature maps {[name for name, _ in maps]}, but cell anchors for "
                f"{len(cells)} levels"
            )
        grids = [size for _, size in maps]
        strides = [(float(padded[0] // h), float(padded[1] // w)) for h, w in grids]
        names = [name for name, _ in maps]
        return AnchorLayout(cells, strides, grids, self.num_fused_levels, names)

    def feature_maps(self, padded: Size) -> list[tuple[str, Size]]:
        """Name and (rows, columns) of each feature map.

        A convolutional backbone treats rows and columns alike, so one probe per length serves all
        shapes made of those lengths; the first oblong shape checks that this one does.
        """
        if self._separable is None and padded[0] != padded[1]:
            self._separable = self._probe(padded) == self._combine(padded)
        return self._probe(padded) if self._separable is False else self._combine(padded)

    @property
    def num_channels(self) -> int:
        """Of the images."""
        return len(self.transform.image_mean)

    def _combine(self, padded: Size) -> list[tuple[str, Size]]:
        for length in padded:
            if length not in self._sizes:
                maps = self._probe((length, length))
                self._sizes[length] = [(name, size[0]) for name, size in maps]
        rows, columns = (self._sizes[length] for length in padded)
        return [(name, (h, w)) for (name, h), (_, w) in zip(rows, columns, strict=True)]

    def _probe(self, padded: Size) -> list[tuple[str, Size]]:
        parameter = next(self._backbone.parameters(), torch.empty(0))
        image = torch.empty(1, self.num_channels, *padded, device="meta", dtype=parameter.dtype)
        with torch.no_grad():
            maps = self._backbone(image)
        if isinstance(maps, Tensor):
            maps = {"0": maps}
        return [
            (str(name), (int(feature.shape[-2]), int(feature.shape[-1])))
            for name, feature in maps.items()
        ]

    def _stock(self, method: str) -> bool:
        """Whether `method` of the transform is torchvision's own."""
        own = getattr(type(self.transform), method, None)
        return own is getattr(GeneralizedRCNNTransform, method)


def _meta_copy(module: nn.Module) -> nn.Module:
    """A copy in eval mode whose tensors have shapes but no data; `module` stays as it is."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    clone = copy.deepcopy(module, memo)
    for part in clone.modules():
        # Hooks are the user's code, made for real tensors.
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
        for name, child in part.named_children():
            # No shape depends on it, and batch_norm on meta tensors loads the compiler: seconds.
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(part, name, nn.Identity())
    return clone.eval()


def check_num_fused_levels(num_fused_levels: int, num_levels: int) -> None:
    """Raises ValueError unless 2 <= num_fused_levels <= num_levels."""
    if not 2 <= num_fused_levels <= num_levels:
        raise ValueError(
            f"num_fused_levels: from 2 to the number of levels ({num_levels}) expected, found "
            f"{num_fused_levels}. (torchvision's AnchorGenerator returns one tensor per image, not "
            "per level: see AnchorLayout.from_detector.)"
        )


def check_boxes(boxes: object, where: str) -> Tensor:
    """`boxes` as a floating tensor [N, 4] of finite xyxy boxes.

    Raises:
        TypeError: if it is no numeric tensor.
        ValueError: if it has another shape, or a box is not finite or inverted.
    """
    if not isinstance(boxes, Tensor):
        raise TypeError(f"{where}: a tensor [N, 4] expected, found {type(boxes).__name__}")
    if boxes.dtype == torch.bool or boxes.is_complex():
        raise TypeError(f"{where}: real numbers expected, found {boxes.dtype}")
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        # An image without boxes is often written `torch.tensor([])`.
        if boxes.numel() == 0 and boxes.dim() <= 2:
            return boxes.new_zeros((0, 4), dtype=torch.float32)
        raise ValueError(f"{where}: shape [N, 4] expected, found {list(boxes.shape)}")
    boxes = boxes.detach()
    if boxes.dtype not in (torch.float32, torch.float64):
        boxes = boxes.float()
    if len(boxes):
        sides = boxes[:, 2:] - boxes[:, :2]
        # NaN and inf - inf fail the first comparison, a single inf the second.
        low, high = torch.stack(sides.aminmax()).tolist()
        if not (low >= 0 and high < math.inf):
            raise ValueError(where + bad_box(boxes))
    return boxes


def bad_box(boxes: Tensor) -> str:
    """Index and value of the first box that is not finite or inverted, for an error message."""
    ok = boxes.isfinite().all(1) & (boxes[:, 2:] >= boxes[:, :2]).all(1)
    index = int((~ok).nonzero()[0])
    found = boxes[index].tolist()
    return f"[{index}]: finite x1 <= x2 and y1 <= y2 expected, found {found}"


def recognise_grid(anchors: Tensor) -> GridLevel | None:
    """The grid that anchors [N, 4] lie on, or None where they are no regular grid.

    Expects torchvision's order: row by row, and within a position the cell anchors.
    """
    if len(anchors) == 0:
        return None
    moved = anchors - anchors[0]
    scale = max(float(anchors.abs().max()), 1.0)
    slack = 4 * torch.finfo(anchors.dtype).eps * scale
    # Copies of the first anchor: translated by the same step at both corners.
    copies = ((moved[:, :2] - moved[:, 2:]).abs() <= slack).all(1) & (moved[:, :2] >= -slack).all(1)
    same_row = (copies & (moved[:, 1].abs() <= slack)).nonzero().squeeze(1)
    same_column = (copies & (moved[:, 0].abs() <= slack)).nonzero().squeeze(1)
    if len(same_row) > 1:
        num_cells = int(same_row[1])
    elif len(same_column) > 1:
        num_cells = int(same_column[1])
    else:
        num_cells = len(anchors)
    columns = len(same_row)
    rows, rest = divmod(len(anchors), num_cells * columns)
    if rest or len(same_column) != rows:
        return None
    grid = anchors.view(rows, columns, num_cells, 4)
    steps_x = float(grid[0, -1, 0, 0] - grid[0, 0, 0, 0]) / max(1, columns - 1)
    steps_y = float(grid[-1, 0, 0, 1] - grid[0, 0, 0, 1]) / max(1, rows - 1)
    cells = grid[0, 0]
    # Anchors are often sums of whole strides, so a step that is nearly one is one.
    stride_y, stride_x = (_round_step(step) if step else 1.0 for step in (steps_y, steps_x))
    shift_x = torch.arange(columns, device=anchors.device, dtype=anchors.dtype) * stride_x
    shift_y = torch.arange(rows, device=anchors.device, dtype=anchors.dtype) * stride_y
    error = torch.zeros((), device=anchors.device, dtype=anchors.dtype)
    for d, shift in ((0, shift_x[:, None]), (1, shift_y[:, None, None])):
        for k in (d, d + 2):
            error = torch.maximum(error, (cells[:, k] + shift - grid[..., k]).abs().max())
    worst = float(error)
    if worst > slack:
        return None
    sides = (cells[:, 2:] - cells[:, :2]).min()
    if not float(sides) > 0:
        return None
    return GridLevel(
        _as_tuples(cells),
        (stride_y, stride_x),
        (rows, columns),
        anchors if worst > 0 else None,
    )


def _as_tuples(cells: Tensor) -> tuple[Cell, ...]:
    return tuple((x1, y1, x2, y2) for x1, y1, x2, y2 in cells.tolist())


def _round_step(step: float) -> float:
    whole = round(step)
    return float(whole) if whole and abs(step - whole) < 1e-3 else step


def indistinguishable_levels(layout: AnchorLayout) -> tuple[int, int] | None:
    """The first (finer, coarser) pair of levels where all coarser anchors lie on the finer one."""
    levels = layout._levels
    for coarse in range(1, len(levels)):
        for fine in range(coarse):
            if all(_lies_on(cell, levels[coarse], levels[fine]) for cell in levels[coarse].cells):
                return fine, coarse
    return None


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
