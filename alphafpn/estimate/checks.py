"""What boxes, K and the clamp must be, with the errors that say so."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def check_boxes(boxes: object, where: str) -> Tensor:
    """Returns `boxes` as a floating tensor [N, 4] of finite xyxy boxes.

    Raises:
        TypeError: If it is no tensor of real numbers.
        ValueError: If it has another shape, or a box is not finite or inverted, or so large that
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
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    # NaN and inf - inf fail the comparison, a single inf makes the area inf or NaN.
    ok = (torch.minimum(width, height) >= 0) & (width * height).isfinite()
    if not ok.all():
        index = int(ok.int().argmin())
        raise ValueError(
            f"{where}[{index}]: finite x1 <= x2 and y1 <= y2, with a finite area, expected, found "
            f"{boxes[index].tolist()}"
        )
    return boxes


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


def check_clamp(clamp: Any) -> tuple[float, float] | None:
    """Returns `clamp` as two floats.

    Raises:
        TypeError: If it is not None or a pair of numbers.
        ValueError: Unless 0 <= lower <= upper < inf.
    """
    if clamp is None:
        return None
    try:
        low, high = (float(bound) for bound in clamp)
    except (TypeError, ValueError):
        raise TypeError(f"clamp: None or (lower, upper) expected, found {clamp!r}") from None
    if not 0 <= low <= high < math.inf:
        raise ValueError(f"clamp: 0 <= lower <= upper < inf expected, found {clamp!r}")
    return low, high
