"""`RangeMatcher`: levels by regression range instead of IoU, for FCOS."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


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

    def match(self, boxes: Tensor, layout: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Matcher.match`; there is no IoU, so it is 0."""
        half = (boxes[:, 2:] - boxes[:, :2]).amax(1) / 2
        level = torch.full((len(boxes),), len(self.sizes), device=self.device)
        for i, size in reversed(list(enumerate(self.sizes))):
            low = 4 * size if i else -math.inf
            high = 8 * size if i < len(self.sizes) - 1 else math.inf
            level[(low <= half) & (half < high)] = i
        return level, torch.zeros_like(half)
