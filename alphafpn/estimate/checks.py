"""What boxes, K and the clamp must be, with the errors that say so."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

# The paper's bounds on fusion factors.
DEFAULT_CLAMP = (0.2, 2.0)


def check_boxes(boxes: object, where: str) -> Tensor:
    """Returns `boxes` as a floating tensor [N, 4] of xyxy boxes with finite areas, or raises."""
    checked = as_boxes(boxes, where)
    check_values(checked, where)
    return checked


def as_boxes(boxes: object, where: str) -> Tensor:
    """Returns `boxes` as a floating tensor [N, 4] in xyxy, without a look at the values."""
    if not isinstance(boxes, Tensor):
        raise TypeError(f"{where}: expected a tensor [N, 4], found {type(boxes).__name__}")
    if boxes.dtype == torch.bool or boxes.is_complex():
        raise TypeError(f"{where}: expected real numbers, found {boxes.dtype}")
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        # An image without boxes is often written `torch.tensor([])`.
        if boxes.shape in ((0,), (0, 0), (1, 0)):
            return torch.zeros((0, 4), device=boxes.device)
        raise ValueError(f"{where}: expected shape [N, 4], found {list(boxes.shape)}")
    boxes = to_xyxy(boxes, where).detach()
    return boxes if boxes.dtype in (torch.float32, torch.float64) else boxes.float()


def check_values(boxes: Tensor, where: str) -> None:
    """Raises ValueError unless boxes [N, 4] have x1 <= x2, y1 <= y2 and finite areas."""
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    # NaN and inf - inf fail the comparison, a single inf makes the area inf or NaN.
    ok = (torch.minimum(width, height) >= 0) & (width * height).isfinite()
    if not ok.all():
        index = int(ok.int().argmin())
        raise ValueError(
            f"{where}[{index}]: expected finite x1 <= x2 and y1 <= y2, with a finite area, found "
            f"{boxes[index].tolist()}"
        )


def to_xyxy(boxes: Tensor, where: str) -> Tensor:
    """Returns `BoundingBoxes` of any unrotated format as a plain tensor in xyxy."""
    if not isinstance(boxes, BoundingBoxes):
        return boxes
    if boxes.format not in (
        BoundingBoxFormat.XYXY, BoundingBoxFormat.XYWH, BoundingBoxFormat.CXCYWH,
    ):  # fmt: skip
        raise ValueError(f"{where}: expected unrotated boxes, found {boxes.format.value}")
    # Few need it, and it is slow to import.
    from torchvision.transforms.v2.functional import convert_bounding_box_format

    plain: Tensor = boxes.as_subclass(Tensor)
    if boxes.format is BoundingBoxFormat.XYXY:
        return plain
    plain = plain if plain.dtype == torch.float64 else plain.float()
    xyxy: Tensor = convert_bounding_box_format(plain, boxes.format, BoundingBoxFormat.XYXY)
    return xyxy


def check_num_fused_levels(num_fused_levels: Any, num_levels: int) -> int:
    """Returns `num_fused_levels` as an int from 2 to `num_levels`, or raises."""
    try:
        if isinstance(num_fused_levels, bool):
            raise TypeError
        number = operator.index(num_fused_levels)
    except TypeError:
        raise TypeError(f"num_fused_levels: expected an int, found {num_fused_levels!r}") from None
    if not 2 <= number <= num_levels:
        raise ValueError(
            f"num_fused_levels: expected 2 to {num_levels}, the number of levels, found {number}. "
            "(torchvision's AnchorGenerator returns one tensor per image, not per level: see "
            "AnchorLayout.from_detector.)"
        )
    return number


def check_clamp(clamp: Any) -> tuple[float, float] | None:
    """Returns `clamp` as None or two floats with 0 <= lower <= upper < inf, or raises."""
    if clamp is None:
        return None
    try:
        low, high = (float(bound) for bound in clamp)
    except (TypeError, ValueError):
        raise TypeError(f"clamp: expected None or (lower, upper), found {clamp!r}") from None
    if not 0 <= low <= high < math.inf:
        raise ValueError(f"clamp: expected 0 <= lower <= upper < inf, found {clamp!r}")
    return low, high
