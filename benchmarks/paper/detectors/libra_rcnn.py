"""Libra R-CNN (Pang et al., CVPR 2019): balance among samples, features and losses."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.ops import FeaturePyramidNetwork, box_iou
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from alphafpn.tiny import tiny_faster_rcnn
from alphafpn.tiny.detectors import Alpha, PerLevel

SIZES, RATIOS = (8, 16, 32, 64, 128), (0.5, 1.0, 2.0)
_BINS = 3
_ALPHA, _GAMMA = 0.5, 1.5  # of the balanced L1 loss
_REFINED_LEVEL = 2  # P4, the middle of five


def libra_rcnn(
    backbone: str | nn.Module = "resnet50",
    *,
    num_classes: int = 2,
    alpha: Alpha | None = None,
    anchor_sizes: PerLevel = SIZES,
    aspect_ratios: PerLevel = RATIOS,
    balanced_sampling: bool = True,
    balanced_pyramid: bool = True,
    balanced_loss: bool = True,
    **kwargs: Any,
) -> FasterRCNN:
    """Builds Libra R-CNN on `tiny_faster_rcnn`; with all three parts off it is that detector.

    The balanced pyramid comes after the fusion that the factors weigh, and fuses once more, by
    averaging all levels. S-alpha counts the anchors of the RPN, as for Faster R-CNN.

    Args:
        backbone: As in `tiny_faster_rcnn`.
        num_classes: Including the background, which has label 0.
        alpha: As in `tiny_faster_rcnn`.
        anchor_sizes: As in `tiny_faster_rcnn`, other than by default.
        aspect_ratios: As in `tiny_faster_rcnn`, other than by default.
        balanced_sampling: Whether RoIs of the background are drawn evenly over their IoU.
        balanced_pyramid: Whether all levels are averaged, refined and added to each.
        balanced_loss: Whether the RoIs' box loss is the balanced L1.
        **kwargs: For `tiny_faster_rcnn`.

    Returns:
        The detector, in training mode.

    Raises:
        TypeError: As in `tiny_faster_rcnn`.
        ValueError: As in `tiny_faster_rcnn`.
    """
    model = tiny_faster_rcnn(
        backbone,
        num_classes=num_classes,
        alpha=alpha,
        anchor_sizes=anchor_sizes,
        aspect_ratios=aspect_ratios,
        **kwargs,
    )
    if balanced_sampling or balanced_loss:
        model.roi_heads = LibraRoIHeads(model.roi_heads, balanced_sampling, balanced_loss)
    if balanced_pyramid:
        for fpn in [m for m in model.backbone.modules() if isinstance(m, FeaturePyramidNetwork)]:
            fpn.extra_blocks = BalancedPyramid(model.backbone.out_channels, fpn.extra_blocks)
    return model


class LibraRoIHeads(RoIHeads):  # type: ignore[misc]
    """Modifications: how background is sampled, and the box loss.

    Args:
        stock: The heads to take all parts from.
        balanced_sampling: As in `libra_rcnn`.
        balanced_loss: As in `libra_rcnn`.
    """

    def __init__(self, stock: RoIHeads, balanced_sampling: bool, balanced_loss: bool) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(stock))
        self.balanced_sampling = balanced_sampling
        self.balanced_loss = balanced_loss
        self._ious: list[Tensor] = []

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Keeps what `subsample`, which comes next, is to balance over."""
        self._ious = [
            box_iou(boxes, found).max(0).values if len(boxes) else found.new_zeros(len(found))
            for boxes, found in zip(gt_boxes, proposals, strict=True)
        ]
        return super().assign_targets_to_proposals(proposals, gt_boxes, gt_labels)

    def subsample(self, labels: list[Tensor]) -> list[Tensor]:
        """Replaces the background that the stock sampler draws by as much, evenly over IoU."""
        sampled = super().subsample(labels)
        if not self.balanced_sampling:
            return sampled
        limit = self.proposal_matcher.low_threshold
        chosen = []
        for drawn, label, iou in zip(sampled, labels, self._ious, strict=True):
            objects, background = drawn[label[drawn] > 0], torch.where(label == 0)[0]
            count = len(drawn) - len(objects)
            evenly = sample_evenly(iou[background], count, limit)
            chosen.append(torch.cat([objects, background[evenly]]).sort().values)
        return chosen

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """As the parent's, but for the box loss in training."""
        if not self.training:
            return super().forward(features, proposals, image_shapes, targets)
        proposals, _, labels, wanted = self.select_training_samples(proposals, targets)
        pooled = self.box_roi_pool(features, proposals, image_shapes)
        logits, deltas = self.box_predictor(self.box_head(pooled))
        class_loss, box_loss = fastrcnn_loss(logits, deltas, labels, wanted)
        if self.balanced_loss:
            label = torch.cat(labels)
            rows = torch.where(label > 0)[0]
            found = deltas.view(len(label), -1, 4)[rows, label[rows]]
            box_loss = balanced_l1(found - torch.cat(wanted)[rows]).sum() / len(label)
        return [], {"loss_classifier": class_loss, "loss_box_reg": box_loss}


def sample_evenly(iou: Tensor, count: int, limit: float, bins: int = _BINS) -> Tensor:
    """Draws `count` indices of `iou` [n], as evenly over its range as there is background for.

    A third of them comes from each third of [0, limit), at random; what some thirds lack, all that
    is left makes up for (the paper's Sec. 3.1).
    """
    which = (iou * bins / limit).long().clamp(0, bins - 1)
    order = torch.randperm(len(iou), device=iou.device)
    rank = torch.empty_like(order)
    for k in range(bins):
        own = order[which[order] == k]
        rank[own] = torch.arange(len(own), device=iou.device)
    # Shares that add up to the count; the last thirds, of the highest IoU, have the rest.
    shares = torch.tensor(
        [(count * (k + 1)) // bins - (count * k) // bins for k in range(bins)], device=iou.device
    )
    first = rank < shares[which]
    left = order[~first[order]]
    return torch.cat([order[first[order]], left])[:count]


def balanced_l1(difference: Tensor) -> Tensor:
    """The balanced L1 loss of Sec. 3.3, element by element."""
    b = math.exp(_GAMMA / _ALPHA) - 1
    x = difference.abs()
    inlier = _ALPHA / b * (b * x + 1) * torch.log(b * x + 1) - _ALPHA * x
    return torch.where(x < 1, inlier, _GAMMA * x + _GAMMA / b - _ALPHA)


class NonLocal(nn.Module):
    """The embedded Gaussian non-local block (Wang et al., CVPR 2018), the identity at the start."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (
            nn.Conv2d(channels, channels, 1) for _ in range(4)
        )
        for layer in (self.query, self.key, self.value):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Adds to each position what it attends to among all of them."""
        query, key, value = (
            layer(x).flatten(2).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        attention = torch.softmax(query @ key.transpose(1, 2), dim=-1)
        return x + self.out((attention @ value).transpose(1, 2).reshape(x.shape))


class BalancedPyramid(ExtraFPNBlock):  # type: ignore[misc]
    """The balanced feature pyramid: every level plus the refined mean of all (Sec. 3.2).

    As an extra block it comes after the fusion, so that the pyramid stays a stock one, which can be
    patched and folded.

    Args:
        channels: Of the pyramid.
        extra: The extra block that makes the coarser levels, if there is one.
    """

    def __init__(self, channels: int, extra: nn.Module | None) -> None:
        super().__init__()
        self.extra = extra
        self.refine = NonLocal(channels)

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        """The levels, coarser ones included, each with the common map added."""
        if self.extra is not None:
            results, names = self.extra(results, x, names)
        size = results[min(_REFINED_LEVEL, len(results) - 1)].shape[-2:]
        mean = torch.stack([_resized(level, size) for level in results]).mean(0)
        common = self.refine(mean)
        return [level + _resized(common, level.shape[-2:]) for level in results], names


def _resized(feature: Tensor, size: Any) -> Tensor:
    """A map at another size: max-pooled where that is smaller, else of nearest neighbours."""
    if feature.shape[-2] >= size[0]:
        return F.adaptive_max_pool2d(feature, size)
    return F.interpolate(feature, size=size, mode="nearest")
