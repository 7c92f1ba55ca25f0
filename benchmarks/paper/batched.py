"""The losses of `tiny_retinanet` for a whole batch at once, in place of a loop over its images.

Images of a batch are of one size here, so that all of them share their anchors. Losses and
gradients are those of `model(images, targets)` up to rounding; only the order of sums differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.ops import sigmoid_focal_loss

BETWEEN = -2  # of the two thresholds: neither object nor background
_BETA = 0.11
# Boxes times anchors that are compared at once: what fits a CPU's cache, and what fills a GPU.
_PAIRS_ON_CPU, _PAIRS = 1 << 18, 1 << 24


class BatchedLoss:
    """The losses of one detector on images of one size.

    Args:
        model: A `tiny_retinanet` whose images are not resized.
        size: (height, width) of the images, multiples of 32.
    """

    def __init__(self, model: RetinaNet, size: Sequence[int]) -> None:
        self.matcher = model.proposal_matcher
        self.weights = torch.tensor(model.box_coder.weights)
        device = next(model.parameters()).device
        with torch.no_grad():
            training = model.training
            empty = torch.zeros(1, 3, *size, device=device)
            features = list(model.eval().backbone(empty).values())
            images = ImageList(empty, [(size[0], size[1])])
            self.anchors: Tensor = model.anchor_generator(images, features)[0]
            model.train(training)
        self.weights = self.weights.to(device)

    def match(self, boxes: Sequence[Tensor]) -> Tensor:
        """Finds the object of each anchor.

        Args:
            boxes: xyxy [G_i, 4] of each of N images.

        Returns:
            int64 [N, A]: the row of the image's object, -1 for background, `BETWEEN` for anchors
            that are neither.
        """
        counts = [len(part) for part in boxes]
        most = max(counts)
        if most == 0:
            return torch.full((len(boxes), len(self.anchors)), -1, device=self.anchors.device)
        padded = self.anchors.new_zeros(len(boxes), most, 4)
        for row, part in zip(padded, boxes, strict=True):
            row[: len(part)] = part
        real = torch.arange(most, device=padded.device) < torch.tensor(
            counts, device=padded.device
        ).unsqueeze(1)
        pairs = _PAIRS_ON_CPU if padded.device.type == "cpu" else _PAIRS
        step = max(1, pairs // (most * len(self.anchors)))
        parts = zip(padded.split(step), real.split(step), strict=True)
        return torch.cat([self._match(*part) for part in parts])

    def _match(self, boxes: Tensor, real: Tensor) -> Tensor:
        # Column by column: a product over a last dimension of two would cost more than all else.
        inter: Tensor | float = 1.0
        for axis in range(2):
            low = torch.maximum(boxes[:, :, None, axis], self.anchors[:, axis])
            high = torch.minimum(boxes[:, :, None, axis + 2], self.anchors[:, axis + 2])
            inter = high.sub_(low).clamp_(min=0).mul_(inter)
        area, all_area = (
            (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1]) for b in (boxes, self.anchors)
        )
        iou = inter / (area[:, :, None] + all_area).sub_(inter)
        iou[~real] = -1.0  # of rows that only fill up
        value, index = iou.max(1)
        found = index.clone()
        found[value < self.matcher.low_threshold] = -1
        between = (value >= self.matcher.low_threshold) & (value < self.matcher.high_threshold)
        found[between] = BETWEEN
        # As torchvision: each object keeps the anchors that overlap it best, however little.
        best = iou.amax(2, keepdim=True).masked_fill(~real[:, :, None], 2.0)
        kept = (iou == best).any(1)
        return torch.where(kept, index, found)

    def __call__(
        self,
        logits: Tensor,
        deltas: Tensor,
        matched: Tensor,
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Computes what `model(images, targets)` returns in training.

        Args:
            logits: Of the classification head, [N, A, C].
            deltas: Of the regression head, [N, A, 4].
            matched: What `match` gives.
            boxes: xyxy [G_i, 4] of each image.
            labels: [G_i] of each image.
        """
        logits, deltas = logits.float(), deltas.float()
        counts = torch.tensor([len(part) for part in boxes], device=matched.device)
        image, anchor = (matched >= 0).nonzero(as_tuple=True)
        row = matched[image, anchor] + (counts.cumsum(0) - counts)[image]
        wanted = torch.zeros_like(logits)
        wanted[image, anchor, torch.cat(list(labels))[row]] = 1
        losses = sigmoid_focal_loss(logits, wanted).sum(2)
        classification = losses.masked_fill(matched == BETWEEN, 0).sum()
        aim = _encode(torch.cat(list(boxes))[row], self.anchors[anchor]) * self.weights
        regression = F.smooth_l1_loss(deltas[image, anchor], aim, beta=_BETA, reduction="sum")
        return {
            "classification": classification / (len(image) + len(boxes)),
            "bbox_regression": regression / (4 * max(1, len(image))),
        }


def _encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Box deltas [N, 4] without weights."""
    sides, others = (b[:, 2:] - b[:, :2] for b in (boxes, anchors))
    shift = (boxes[:, :2] + boxes[:, 2:] - anchors[:, :2] - anchors[:, 2:]) / 2
    return torch.cat([shift / others, (sides / others).log()], 1)


def outputs(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, A, C] and box deltas [N, A, 4] of normalised images [N, 3, H, W]."""
    found = model.head(list(model.backbone(images).values()))
    return found["cls_logits"], found["bbox_regression"]
