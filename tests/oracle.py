"""Algorithm 1 as the paper words it: box by box, level by level, anchor against anchor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torchvision.ops import box_iou


def level_ious(levels: Sequence[Tensor], boxes: Tensor) -> list[list[float]]:
    """Best IoU of each box on each level; an IoU of 0 / 0 is none."""
    best = [box_iou(boxes, anchors).nan_to_num(nan=0.0).amax(1).tolist() for anchors in levels]
    return [[best[i][g] for i in range(len(levels))] for g in range(len(boxes))]


def best_level(ious: Sequence[float]) -> int:
    """The first level that holds the maximum; the number of levels without any overlap."""
    best, level = 0.0, len(ious)
    for i, iou in enumerate(ious):
        if iou > best:
            best, level = iou, i
    return level


def is_clear(ious: Sequence[float]) -> bool:
    """Whether the two best levels differ by more than 1e-6, or not at all."""
    second, first = sorted(ious)[-2:]
    return first - second > 1e-6 or first == second


def counts(
    levels: Sequence[Sequence[Tensor]], images: Sequence[Tensor]
) -> tuple[list[int], int, list[list[int]]]:
    """Boxes per level, boxes that overlap nothing, and boxes per image and level."""
    per_image = []
    unmatched = 0
    for anchors, boxes in zip(levels, images, strict=True):
        row = [0] * (len(anchors) + 1)
        for ious in level_ious(anchors, boxes):
            row[best_level(ious)] += 1
        unmatched += row.pop()
        per_image.append(row)
    return [sum(column) for column in zip(*per_image, strict=True)], unmatched, per_image


def ratios(counts: Sequence[int], num_fused_levels: int) -> list[float]:
    """Eq. 2, with the extra levels in the last numerator; without a guard against 0."""
    k = num_fused_levels
    result = [counts[i + 1] / counts[i] for i in range(k - 2)]
    return [*result, sum(counts[k - 1 :]) / counts[k - 2]]


def fcos_levels(sizes: Sequence[float], boxes: Tensor) -> list[int]:
    """The level whose regression range holds the distance from a box's centre to its far sides.

    As torchvision's FCOS matches an anchor point at the centre; the number of levels where no range
    does.
    """
    result = []
    for x1, y1, x2, y2 in boxes.tolist():
        distance = max(x2 - x1, y2 - y1) / 2
        level = len(sizes)
        for i, size in reversed(list(enumerate(sizes))):
            lower = 0 if i == 0 else 4 * size
            upper = math.inf if i == len(sizes) - 1 else 8 * size
            if lower < distance < upper:
                level = i
        result.append(level)
    return result


def fcos_owners(levels: Sequence[Tensor], boxes: Tensor, radius: float = 1.5) -> list[int]:
    """The box that owns each location of an image, -1 for none, as FCOS's loss assigns them.

    Location by location and box by box, with each number in float32 as in torchvision. `levels` are
    anchors [N_l, 4] (xyxy), one per location.
    """
    with np.errstate(over="ignore"):
        rows = boxes.float().numpy()
        two, reach = np.float32(2), np.float32(radius)
        owners = []
        for level, anchors in enumerate(levels):
            for left, top, right, bottom in anchors.float().numpy():
                x, y, size = (left + right) / two, (top + bottom) / two, right - left
                low = size * np.float32(4) if level else np.float32(0)
                high = size * np.float32(8) if level < len(levels) - 1 else np.float32(math.inf)
                best, owner = np.float32(0), -1
                for index, (x1, y1, x2, y2) in enumerate(rows):
                    offset = max(abs(x - (x1 + x2) / two), abs(y - (y1 + y2) / two))
                    sides = x - x1, y - y1, x2 - x, y2 - y
                    value = np.float32(1e8) - (x2 - x1) * (y2 - y1)
                    near, inside = offset < reach * size, min(sides) > 0
                    if near and inside and low < max(sides) < high and value > best:
                        best, owner = value, index
                owners.append(owner if best >= np.float32(1e-5) else -1)
    return owners
