"""The paper's detectors on EfficientNet-Lite0: stock levels and anchors, or the paper's."""

from __future__ import annotations

import itertools
from typing import Any

from torch import nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from alphafpn.tiny import tiny_faster_rcnn, tiny_retinanet
from benchmarks.lite0 import TAPS, WIDTHS, lite0_body

_STOCK_SIZES = {
    "retinanet": [[size * 2 ** (k / 3) for k in range(3)] for size in (32, 64, 128, 256, 512)],
    "fasterrcnn": [[size] for size in (32, 64, 128, 256, 512)],
}
_TOY_WIDTHS = (8, 8, 16, 16, 16)


def detector(kind: str, levels: str, backbone: str, channels: int) -> Any:
    """A `retinanet` or `fasterrcnn` with one class, the paper's losses and a stock pyramid.

    `levels` are `stock`, torchvision's with anchors from 32 pixels, or `paper`: P2 to P6 with the
    paper's anchors. `backbone` is `lite0`, with ImageNet's weights, or `toy`.
    """
    body, taps, widths = (lite0_body(), TAPS, WIDTHS) if backbone == "lite0" else _toy()
    extra: nn.Module = LastLevelMaxPool()
    options: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if levels == "stock":
        options |= {"anchor_sizes": _STOCK_SIZES[kind], "aspect_ratios": (0.5, 1.0, 2.0)}
        if kind == "retinanet":
            taps, widths, extra = taps[1:], widths[1:], LastLevelP6P7(channels, channels)
    names = {tap: str(level) for level, tap in enumerate(taps)}
    pyramid = BackboneWithFPN(body, names, list(widths), channels, extra)
    if kind == "retinanet":
        return tiny_retinanet(pyramid, detections_per_img=200, **options)
    return tiny_faster_rcnn(pyramid, box_detections_per_img=200, **options)


def _toy() -> tuple[nn.Sequential, tuple[str, ...], tuple[int, ...]]:
    """A residual network of ten layers from scratch, for runs of seconds on a CPU."""
    body = nn.Sequential(nn.Conv2d(3, _TOY_WIDTHS[0], 3, 2, 1), nn.ReLU())
    for before, width in itertools.pairwise(_TOY_WIDTHS):
        shortcut = nn.Sequential(nn.Conv2d(before, width, 1, 2, bias=False), nn.BatchNorm2d(width))
        body.append(BasicBlock(before, width, 2, shortcut))
    return body, ("2", "3", "4", "5"), _TOY_WIDTHS[1:]
