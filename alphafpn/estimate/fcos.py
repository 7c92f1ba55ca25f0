"""FCOS: levels by regression range instead of IoU, and the boxes that own a location."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Boxes per block. This bounds temporary memory.
_BLOCK = 16_384


class RangeMatcher:
    """Finds levels by regression range instead of IoU, as FCOS does.

    Half the longer side of a box lies between 4 and 8 times the size of its level's anchors; the
    finest level has no lower bound, the coarsest no upper one. Where ranges overlap the finest
    level takes the box, and between ranges no level does.

    Args:
        sizes: Of the anchors, in pixels, one per level; in FCOS each is twice the one before.
        device: Where the boxes are.
    """

    def __init__(self, sizes: Sequence[float], device: torch.device) -> None:
        self.sizes, self.device = sizes, device

    def match(self, boxes: Tensor, layout_index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Matcher.match`; there is no IoU, so it is 0."""
        half = (boxes[:, 2:] - boxes[:, :2]).amax(1) / 2
        level = torch.full((len(boxes),), len(self.sizes), device=self.device)
        for i, size in reversed(list(enumerate(self.sizes))):
            low = 4 * size if i else -math.inf
            high = 8 * size if i < len(self.sizes) - 1 else math.inf
            level[(low <= half) & (half < high)] = i
        return level, torch.zeros_like(half)


def owned_boxes(
    boxes: Tensor,
    image_index: Tensor,
    layout_index: Tensor,
    cells: Sequence[Tensor],
    strides: Tensor,
    grid_sizes: Tensor,
    radius: float,
) -> Tensor:
    """Finds the boxes that own at least one location, as torchvision's `FCOS.compute_loss` assigns.

    A location of a level belongs to the smallest box that it lies in, that has its centre within
    the radius, and whose farthest side is within the level's range. All arithmetic is float32, as
    there: areas within 8 square pixels of each other tie, and the lower index wins.

    Args:
        boxes: [G, 4] xyxy, float32, ordered by image.
        image_index: The image of each box, int64 [G].
        layout_index: The layout of each box, int64 [G].
        cells: Per level, the one cell anchor [1, 4] (xyxy) of the position at the origin.
        strides: Per layout and level (y, x), [layouts, L, 2].
        grid_sizes: Per layout and level (rows, columns), int64 [layouts, L, 2].
        radius: `center_sampling_radius`, in units of a level's anchor size.

    Returns:
        Whether each box owns a location, bool [G].
    """
    value = 1e8 - (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    centres = (boxes[:, :2] + boxes[:, 2:]).flip(1) / 2  # (y, x)
    half = (boxes[:, 2:] - boxes[:, :2]).amax(1) / 2
    span = int(grid_sizes.amax()) + 1
    owned = torch.zeros(len(boxes), dtype=torch.bool)
    for (first, stop), (level, cell) in itertools.product(
        _whole_images(image_index), enumerate(cells)
    ):
        size = (cell[0, 2] - cell[0, 0]).float()
        reach, low, high = radius * size, size * 4, size * 8
        if level == 0:
            low = torch.zeros_like(low)
        if level == len(cells) - 1:
            high = torch.full_like(high, math.inf)
        # The farthest side of a box is between half of the longer side and this plus the radius.
        part = half[first:stop]
        some = first + ((part + reach + 1 > low) & (part - 1 < high)).nonzero().squeeze(1)
        if not len(some):
            continue
        stride, grid = strides[layout_index[some], level], grid_sizes[layout_index[some], level]
        origin = (cell[0, [1, 0]] + cell[0, [3, 2]]) / 2
        # Positions along both axes that may be within the radius, [B, steps, 2] as (y, x).
        nearest = ((centres[some] - reach - origin) / stride).floor()
        steps = torch.arange(int((2 * reach / stride.min()).floor()) + 2)
        index = nearest.long()[:, None] + steps[:, None]
        # Anchors are a whole number of strides from the cell, added in float32.
        shift = (index * stride.long()[:, None]).float()
        place = ((shift + cell[0, [1, 0]]) + (shift + cell[0, [3, 2]])) / 2
        near = (place - centres[some][:, None]).abs() < reach
        sides = place - boxes[some][:, None, [1, 0]], boxes[some][:, None, [3, 2]] - place
        farthest = torch.maximum(*sides)
        good = near & (torch.minimum(*sides) > 0) & (farthest < high)
        good &= (index >= 0) & (index < grid[:, None])
        # A location needs both axes, but the farthest side on one of them.
        match = good[:, :, None, 0] & good[:, None, :, 1]
        match &= (farthest > low)[:, :, None, 0] | (farthest > low)[:, None, :, 1]
        box, row, column = match.nonzero().unbind(1)
        key = image_index[some[box]]
        key = (key * span + index[box, row, 0]) * span + index[box, column, 1]
        owned[_winners(key, some[box], value)] = True
    return owned


def _whole_images(image_index: Tensor) -> list[tuple[int, int]]:
    """Cuts boxes into blocks (first, stop) of whole images, since boxes compete within one."""
    ends = image_index.unique_consecutive(return_counts=True)[1].cumsum(0).tolist()
    blocks, first = [], 0
    for end, following in itertools.pairwise([*ends, math.inf]):
        if following - first > _BLOCK:
            blocks.append((first, end))
            first = end
    return blocks


def _winners(location: Tensor, box: Tensor, value: Tensor) -> Tensor:
    """Returns the boxes that win a location: the largest value, the lower index among equals."""
    which = torch.unique(location, return_inverse=True)[1]
    best = torch.zeros(int(which.max()) + 1 if len(which) else 0)
    best.scatter_reduce_(0, which, value[box], "amax")
    won = (value[box] == best[which]) & (value[box] >= 1e-5)
    first = torch.full(best.shape, len(value), dtype=torch.int64)
    first.scatter_reduce_(0, which[won], box[won], "amin")
    return first[first < len(value)]
