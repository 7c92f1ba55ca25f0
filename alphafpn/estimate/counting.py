"""Boxes, block by block, to counts per level, and from these to an estimate (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from alphafpn.estimate.alpha_estimate import AlphaEstimate
from alphafpn.estimate.level_statistics import IOU_BINS, IOU_UNIT, SIZE_UNIT
from alphafpn.estimate.search import Matcher

# Boxes matched and added up at once: what bounds the memory beyond the inputs. On a CPU larger
# blocks give their temporaries back to the system, and mapping them again takes time; on a GPU
# shorter ones start more kernels.
BLOCK = {"cpu": 1 << 19, "other": 1 << 20}


@dataclass
class LevelCounts:
    """What boxes and anchors add up to; the base of an `AlphaEstimate`.

    Attributes:
        per_image: Boxes per image and level, int64 [M, L + 1]; last the boxes without any anchor.
        histogram: Boxes per hundredth of best IoU, int64 [101].
        iou_sums: Likewise per level, in `IOU_UNIT`, float64 [L + 1].
        size_sum: In `SIZE_UNIT`, float64.
        num_sizes: Input sizes that were added.
    """

    per_image: Tensor
    histogram: Tensor
    iou_sums: Tensor
    size_sum: Tensor
    num_sizes: int = 1

    def __add__(self, other: LevelCounts) -> LevelCounts:
        """Adds the same images, counted at another input size too."""
        return LevelCounts(
            *(getattr(self, f.name) + getattr(other, f.name) for f in fields(LevelCounts))
        )

    def estimate(
        self,
        num_fused_levels: int,
        clamp: tuple[float, float] | None,
        num_boxes: int,
        *,
        follows_iou: bool = True,
        **description: Any,
    ) -> AlphaEstimate:
        """Makes the estimate; `description` is what else an `AlphaEstimate` holds."""
        *counts, num_unmatched = self.per_image.sum(0).tolist()
        # Products of counts in float64 are exact far beyond any data set.
        per_image = self.per_image[:, :-1].double()
        moments = (per_image.t() @ per_image).round().long().tolist()
        return AlphaEstimate(
            counts=tuple(counts),
            moments=tuple(tuple(row) for row in moments),
            num_fused_levels=num_fused_levels,
            num_images=len(per_image),
            num_boxes=num_boxes,
            num_unmatched=num_unmatched,
            num_sizes=self.num_sizes,
            clamp=clamp,
            iou_histogram=tuple(self.histogram.tolist()) if follows_iou else None,
            iou_sums=tuple(int(s) for s in self.iou_sums[:-1].tolist()),
            size_sum=int(self.size_sum),
            **description,
        )


def count_levels(
    matcher: Matcher,
    boxes: Tensor | Iterable[Tensor],
    sizes: Tensor,
    num_levels: int,
    layout: Tensor,
) -> LevelCounts:
    """Matches and adds up, block by block.

    Args:
        matcher: Of the anchors.
        boxes: [G, 4] xyxy, image after image; or in pieces, wherever they are cut.
        sizes: Boxes per image, int64 [M] on the CPU, with sum G.
        num_levels: L.
        layout: Which of the matcher's layouts each image has, int64 [M].
    """
    device = matcher.device
    counts = LevelCounts(
        torch.zeros(len(sizes), num_levels + 1, dtype=torch.int64, device=device),
        torch.zeros(IOU_BINS, dtype=torch.int64, device=device),
        torch.zeros(num_levels + 1, dtype=torch.float64, device=device),
        torch.zeros((), dtype=torch.float64, device=device),
    )
    layout = layout.to(device)
    ends = sizes.cumsum(0)
    stop = 0
    for part in boxes.split(block_size(device)) if isinstance(boxes, Tensor) else boxes:
        start, stop = stop, stop + len(part)
        # The images of this block; the first and the last may lie in others as well.
        first, end = images_of(ends, start, stop)
        bounds = ends[first:end].clamp(max=stop)
        lengths = bounds.diff(prepend=torch.tensor([start], device="cpu")).to(device)
        image = torch.repeat_interleave(lengths, output_size=len(part))
        level, iou = matcher.match(part, layout.index_select(0, image + first))
        rows = counts.per_image[first:end]
        key = image.mul_(num_levels + 1).add_(level)
        rows += torch.bincount(key, minlength=rows.numel()).view_as(rows)
        # The small number makes up for the rounding of an IoU that is a whole hundredth.
        bins = (iou * (IOU_BINS - 1) + 1e-4).long()
        counts.histogram += torch.bincount(bins, minlength=IOU_BINS)
        units = (iou / IOU_UNIT).round_().double()
        counts.iou_sums.index_add_(0, level, units)
        area = (part[:, 2] - part[:, 0]).mul_(part[:, 3] - part[:, 1])
        counts.size_sum += (area.sqrt_() / SIZE_UNIT).round_().sum(dtype=torch.float64)
    return counts


def block_size(device: torch.device) -> int:
    """Returns how many boxes are matched and added up at once."""
    return BLOCK.get(device.type, BLOCK["other"])


def images_of(ends: Tensor, start: int, stop: int) -> tuple[int, int]:
    """Returns the first image with boxes from `start` to `stop`, and the one after the last."""
    boxes = torch.tensor([start, stop - 1], device="cpu")
    first, last = torch.searchsorted(ends, boxes, right=True).tolist()
    return first, last + 1
