"""FreeAnchor (Zhang et al., NeurIPS 2019): anchors learn which objects they are for."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_iou

from alphafpn.tiny import tiny_retinanet
from alphafpn.tiny.detectors import Alpha

_PRIOR = 0.02  # of the class logits at the start
_SHARE, _GAMMA = 0.5, 2.0  # the focal loss's alpha and gamma
_BETA, _BOX_WEIGHT = 0.11, 0.75
_LEAST_IOU = 0.6  # below it, a predicted box does not excuse its anchor


def free_anchor(
    backbone: str | nn.Module = "resnet50",
    *,
    num_classes: int = 2,
    alpha: Alpha | None = None,
    bag_size: int = 50,
    **kwargs: Any,
) -> RetinaNet:
    """Builds the paper's Adaptive FreeAnchor: `tiny_retinanet` that trains with FreeAnchor's loss.

    Inference is `tiny_retinanet`'s, and so are its weights' names. S-alpha counts its anchors as
    there: the bags choose among anchors in training, and do not change which ones there are.

    Args:
        backbone: As in `tiny_retinanet`.
        num_classes: Including the background, which has label 0.
        alpha: As in `tiny_retinanet`.
        bag_size: How many anchors each object may choose from, those of the best IoU.
        **kwargs: For `tiny_retinanet`.

    Returns:
        The detector, in training mode.

    Raises:
        TypeError: As in `tiny_retinanet`.
        ValueError: If `bag_size` is below 1, and as in `tiny_retinanet`.
    """
    if bag_size < 1:
        raise ValueError(f"bag_size: expected at least 1 anchor, found {bag_size}")
    model = tiny_retinanet(backbone, num_classes=num_classes, alpha=alpha, **kwargs)
    model.head = FreeAnchorHead(model.head, bag_size)
    return model


class FreeAnchorHead(RetinaNetHead):  # type: ignore[misc]
    """Modifications: the loss is FreeAnchor's, which no matching by IoU comes before.

    Args:
        stock: The head to take all parts from.
        bag_size: Anchors per object.
    """

    def __init__(self, stock: RetinaNetHead, bag_size: int) -> None:
        nn.Module.__init__(self)
        self.classification_head = stock.classification_head
        self.regression_head = stock.regression_head
        self.bag_size = bag_size
        nn.init.constant_(self.classification_head.cls_logits.bias, math.log(_PRIOR / (1 - _PRIOR)))

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """The losses of the objects' bags, and of all anchors as background."""
        logits, deltas = (
            head_outputs[name].to(torch.promote_types(head_outputs[name].dtype, torch.float32))
            for name in ("cls_logits", "bbox_regression")
        )
        coder = self.regression_head.box_coder
        positive, negative = [], []
        for i, target in enumerate(targets):
            scores, boxes, labels = logits[i].sigmoid(), target["boxes"], target["labels"]
            with torch.no_grad():
                found = coder.decode_single(deltas[i], anchors[i])
                taken = box_confidence(box_iou(boxes, found), labels, scores.shape[1])
            negative.append(negative_losses(scores * (1 - taken)).sum())
            bag = box_iou(boxes, anchors[i]).topk(min(self.bag_size, len(scores)), dim=1).indices
            flat = bag.flatten()
            wanted = coder.encode_single(boxes.repeat_interleave(bag.shape[1], 0), anchors[i][flat])
            box_loss = F.smooth_l1_loss(deltas[i][flat], wanted, beta=_BETA, reduction="none")
            likelihood = torch.exp(-_BOX_WEIGHT * box_loss.sum(1)).view_as(bag)
            positive.append(bag_losses(scores[bag, labels[:, None]] * likelihood).sum())
        objects = max(1, sum(len(target["boxes"]) for target in targets))
        return {
            "positive_bags": torch.stack(positive).sum() / objects,
            "negative_bag": torch.stack(negative).sum() / (objects * self.bag_size),
        }


def bag_losses(confidence: Tensor) -> Tensor:
    """Losses [G] of bags whose anchors match their object with `confidence` [G, k].

    The mean-max function is near the mean while confidences are low, and near the maximum
    once one of them is high.
    """
    weight = 1 / (1 - confidence).clamp(min=1e-12)
    matched = (weight * confidence).sum(1) / weight.sum(1)
    return _SHARE * F.binary_cross_entropy(matched, torch.ones_like(matched), reduction="none")


def negative_losses(wrong: Tensor) -> Tensor:
    """Losses of anchors that claim an object with probability `wrong`, and have none."""
    log = F.binary_cross_entropy(wrong, torch.zeros_like(wrong), reduction="none")
    return (1 - _SHARE) * wrong**_GAMMA * log


def box_confidence(iou: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """How surely each anchor's predicted box is on an object of each class: [A, num_classes].

    The saturated linear of the paper: 0 up to an IoU of 0.6, 1 at the best IoU that the object has.

    Args:
        iou: Of objects with predicted boxes, [G, A].
        labels: Of the objects, [G].
        num_classes: Including the background.
    """
    taken = iou.new_zeros(iou.shape[1], num_classes)
    if len(labels):
        best = iou.max(1, keepdim=True).values
        rise = (iou - _LEAST_IOU) / (best - _LEAST_IOU).clamp(min=1e-12)
        confidence = rise.clamp(0, 1)
        for label in labels.unique():
            taken[:, label] = confidence[labels == label].max(0).values
    return taken
