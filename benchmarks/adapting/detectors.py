"""Stock detectors on EfficientNet-Lite0, and the shortcuts that make their runs short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import box_iou
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from benchmarks.lite0 import FROZEN, TAPS, WIDTHS, lite0_body

CHANNELS = 64
_OCTAVES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
# Of the two-stage detector: a smaller second stage, as a crop holds few objects.
_RCNN = {
    "rpn_pre_nms_top_n_train": 500,
    "rpn_pre_nms_top_n_test": 500,
    "rpn_post_nms_top_n_train": 200,
    "rpn_post_nms_top_n_test": 200,
    "box_batch_size_per_image": 64,
}
_BOX_FEATURES = 256


def stock(kind: str, classes: int, size: tuple[int, int]) -> Any:
    """A detector as torchvision's builders make it, apart from its size.

    `kind` is `retinanet` or `fcos` (P3 to P7), or `fasterrcnn` (P2 to P6); `classes` are without
    the background. Levels, anchors, losses and first weights are torchvision's. Each part of a
    dense head has two convolutions, where the builders have four. Images of `size` (height, width)
    stay as large as they are.
    """
    taps, widths, extra = TAPS[1:], WIDTHS[1:], LastLevelP6P7(CHANNELS, CHANNELS)
    if kind == "fasterrcnn":
        taps, widths, extra = TAPS, WIDTHS, LastLevelMaxPool()
    names = {tap: str(level) for level, tap in enumerate(taps)}
    backbone = BackboneWithFPN(lite0_body(), names, list(widths), CHANNELS, extra)
    options: dict[str, Any] = {
        "min_size": min(size),
        "max_size": max(size),
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    if kind == "fasterrcnn":
        head = TwoMLPHead(CHANNELS * 7 * 7, _BOX_FEATURES)
        predictor = FastRCNNPredictor(_BOX_FEATURES, classes + 1)
        model: Any = FasterRCNN(
            backbone, box_head=head, box_predictor=predictor, **options, **_RCNN
        )
    else:
        options["num_classes"] = classes + 1
        if kind == "retinanet":
            sizes = tuple(tuple(32 * 2**level * part for part in _OCTAVES) for level in range(5))
            options["anchor_generator"] = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
        model = {"retinanet": RetinaNet, "fcos": FCOS}[kind](backbone, **options)
        for head in (model.head.classification_head, model.head.regression_head):
            # A convolution of FCOS comes with a normalisation.
            head.conv = head.conv[: len(head.conv) // 2]
    return model.to(memory_format=torch.channels_last)


class _Kept(nn.Module):
    """Stands for the parts of a body that are never trained: gives the maps that it was given."""

    maps: Tensor

    def forward(self, _: Tensor) -> Tensor:
        return self.maps


@torch.no_grad()
def frozen_maps(model: Any, pixels: Tensor, at_once: int = 32) -> Tensor:
    """What the parts that are never trained make of transformed images, uint8 [N, 3, H, W]."""
    frozen = nn.Sequential(*(model.backbone.body[name] for name in FROZEN))
    maps = []
    for part in pixels.split(at_once):
        images, _ = model.transform([image / 255 for image in part])
        tensors = images.tensors.contiguous(memory_format=torch.channels_last)
        maps.append(frozen(tensors))
    return torch.cat(maps)


def keep_maps(model: Any) -> _Kept:
    """Takes the frozen parts out of a detector, in place; give what is returned `maps` instead.

    The detector may be run on any images of the right size: their pixels do not count.
    """
    kept = _Kept()
    for name in FROZEN:
        model.backbone.body[name] = nn.Identity()
    model.backbone.body[FROZEN[0]] = kept
    return kept


def keep_matches(model: RetinaNet, matches: dict[int, Tensor]) -> None:
    """Makes RetinaNet's loss look up which anchor is for which object, in place.

    `matches` holds, by a target's `row`, what the detector's matcher found. It is filled as needed.
    """

    def compute_loss(
        targets: Sequence[dict[str, Tensor]], outputs: dict[str, Tensor], anchors: list[Tensor]
    ) -> Any:
        for target, all_anchors in zip(targets, anchors, strict=True):
            if target["row"] not in matches:
                found = torch.full((len(all_anchors),), -1)
                if len(target["boxes"]):
                    found = model.proposal_matcher(box_iou(target["boxes"], all_anchors))
                matches[target["row"]] = found.short()
        found = [matches[target["row"]].long() for target in targets]
        return model.head.compute_loss(targets, outputs, anchors, found)

    model.compute_loss = compute_loss
