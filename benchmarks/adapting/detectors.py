"""Stock detectors on EfficientNet-Lite0, and the shortcuts that make their runs short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import box_iou
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from benchmarks.lite0 import FROZEN, TAPS, WIDTHS, lite0_body

CHANNELS = 64
_CONVOLUTIONS = 2  # in each part of a dense head, where torchvision's builders have four
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

    Levels, anchors, losses and the rest of the start are torchvision's; images stay as large as
    they are.

    Args:
        kind: `retinanet` or `fcos` (P3 to P7), or `fasterrcnn` (P2 to P6).
        classes: How many, without the background.
        size: (height, width) of the images.
    """
    taps, widths, extra = TAPS[1:], WIDTHS[1:], LastLevelP6P7(CHANNELS, CHANNELS)
    if kind == "fasterrcnn":
        taps, widths, extra = TAPS, WIDTHS, LastLevelMaxPool()
    names = {tap: str(level) for level, tap in enumerate(taps)}
    backbone = BackboneWithFPN(lite0_body(), names, list(widths), CHANNELS, extra)
    options: dict[str, Any] = {
        "num_classes": classes + 1,
        "min_size": min(size),
        "max_size": max(size),
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    ratios = ((0.5, 1.0, 2.0),) * 5
    if kind == "retinanet":
        sizes = tuple(tuple(32 * 2**level * part for part in _OCTAVES) for level in range(5))
        model: Any = RetinaNet(backbone, anchor_generator=AnchorGenerator(sizes, ratios), **options)
        parts, step = (model.head.classification_head, model.head.regression_head), 1
    elif kind == "fcos":
        model = FCOS(backbone, **options)
        parts, step = (model.head.classification_head, model.head.regression_head), 3
    else:
        model = FasterRCNN(backbone, **options, **_RCNN)
        parts, step = (), 0
        pooled = CHANNELS * 7 * 7
        model.roi_heads.box_head.fc6 = nn.Linear(pooled, _BOX_FEATURES)
        model.roi_heads.box_head.fc7 = nn.Linear(_BOX_FEATURES, _BOX_FEATURES)
        for layer in (
            model.roi_heads.box_predictor.cls_score,
            model.roi_heads.box_predictor.bbox_pred,
        ):
            layer.__init__(_BOX_FEATURES, layer.out_features)
    for part in parts:
        part.conv = part.conv[: _CONVOLUTIONS * step]
    return model.to(memory_format=torch.channels_last)


class _Kept(nn.Module):
    """Stands for the parts of a body that are never trained: gives the maps that it was given."""

    maps: Tensor

    def forward(self, _: Tensor) -> Tensor:
        return self.maps


@torch.no_grad()
def frozen_maps(model: Any, pixels: Tensor, at_once: int = 32) -> Tensor:
    """What the parts that are never trained make of images, after the detector's own transform.

    Args:
        model: A detector of `stock`, adapted or not.
        pixels: Uint8 [N, 3, H, W].
        at_once: Images in a batch.
    """
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

    Args:
        model: The detector.
        matches: By a target's `row`: what the detector's matcher found. Filled as needed.
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
