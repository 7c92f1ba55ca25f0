"""`Matcher`, what all matchers do, and `SearchMatcher`, which tries every pair: for any anchors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

# Boxes, and pairs of box and anchor, that are evaluated at once: on a CPU their temporaries then
# stay in the cache.
SEARCH_ROWS, PAIRS = 64, 262_144


class Matcher(Protocol):
    """Gives each box the level of its best-IoU anchor."""

    def match(self, boxes: Tensor, layout_index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Finds level (int64 [B]) and IoU [B] of the best anchor of each box [B, 4] (xyxy).

        The level is the number of levels if a box overlaps no anchor. `layout_index` [B] tells
        which of the matcher's layouts each box lies on.
        """
        ...


class SearchMatcher:
    """Finds the exact best level for any anchors [N_l, 4]: evaluates all pairs, block by block."""

    def __init__(self, levels: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> None:
        self.levels = [level.to(device).t().contiguous() for level in levels]
        self.dtype, self.device = dtype, device
        self.rows, self.pairs = SEARCH_ROWS, PAIRS
        if device.type != "cpu":  # slow to start a kernel: half a GiB at once
            self.rows, self.pairs = 8 * SEARCH_ROWS, 64 * PAIRS

    def match(self, boxes: Tensor, layout_index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Matcher.match`."""
        level = torch.full((len(boxes),), len(self.levels), device=self.device)
        best = torch.zeros(len(boxes), dtype=self.dtype, device=self.device)
        for start in range(0, len(boxes), self.rows):
            part = slice(start, start + self.rows)
            for i, anchors in enumerate(self.levels):
                value = self._best_iou(boxes[part], anchors)
                level[part].masked_fill_(value > best[part], i)
                torch.maximum(best[part], value, out=best[part])
        return level, best

    def _best_iou(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        best = torch.zeros(len(boxes), dtype=self.dtype, device=self.device)
        for chunk in anchors.split(self.pairs // len(boxes), dim=1):
            iou = pair_iou(boxes[:, :, None].unbind(1), chunk.unbind(0))
            torch.maximum(best, best_of(iou), out=best)
        return best


def pair_iou(boxes: Sequence[Tensor], anchors: Sequence[Tensor]) -> Tensor:
    """Computes the IoU of boxes and anchors given as columns (x1, y1, x2, y2) that broadcast.

    The operations are those of `torchvision.ops.box_iou` in the same order, so the result is equal
    in every bit, also if boxes and anchors have different types.
    """
    (x1, y1, x2, y2), (ax1, ay1, ax2, ay2) = boxes, anchors
    width = (torch.minimum(x2, ax2) - torch.maximum(x1, ax1)).clamp_(min=0)
    height = (torch.minimum(y2, ay2) - torch.maximum(y1, ay1)).clamp_(min=0)
    inter = width * height
    union = (x2 - x1) * (y2 - y1) + (ax2 - ax1) * (ay2 - ay1) - inter
    return inter.div_(union)


def best_of(iou: Tensor) -> Tensor:
    """Takes the largest IoU in each row; 0 / 0, of a box and an anchor without area, is 0."""
    return iou.flatten(1).amax(1).nan_to_num_(nan=0.0)
