"""A small detector for scenes: a RetinaNet of P2-P6 on a residual network."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock

from alphafpn.tiny import tiny_retinanet

CHANNELS = 32
MEAN, DEVIATION = 0.45, 0.25  # of pixels from 0 to 1, in all channels
Levels: TypeAlias = tuple[tuple[float, ...], ...]
# Sizes of anchors by level; drawn figures are so alike that one shape does.
DRAWN_SIZES: Levels = tuple((size, size * 2**0.5) for size in (6.0, 12.0, 24.0, 48.0, 96.0))
DRAWN_RATIOS = (1.6,)
_WIDTHS = (16, 16, 32, 64, 96)


def body() -> nn.Sequential:
    """Makes the residual network: C2 to C5 at strides 4 to 32."""
    stem = nn.Conv2d(3, _WIDTHS[0], 3, 2, 1, bias=False)
    stages = [nn.Sequential(stem, nn.BatchNorm2d(_WIDTHS[0]), nn.ReLU())]
    for before, width in itertools.pairwise(_WIDTHS):
        shortcut = nn.Sequential(nn.Conv2d(before, width, 1, 2, bias=False), nn.BatchNorm2d(width))
        stages.append(BasicBlock(before, width, 2, shortcut))
    return nn.Sequential(OrderedDict((f"c{i}", stage) for i, stage in enumerate(stages, 1)))


class _Backbone(BackboneWithFPN):  # type: ignore[misc]
    """Modifications: a convolution and a ReLU follow each map, for both parts of the head."""

    def __init__(self) -> None:
        names = {f"c{i}": str(i) for i in range(2, 6)}
        super().__init__(body(), names, list(_WIDTHS[1:]), CHANNELS)
        convolution = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        self.trunk = nn.Sequential(convolution, nn.ReLU())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: self.trunk(level) for name, level in super().forward(x).items()}


def detector(sizes: Levels, ratios: tuple[float, ...], classes: int = 1) -> Any:
    """Makes the detector in training mode; one convolution serves both outputs of its head.

    Args:
        sizes: Of the anchors in pixels, by level.
        ratios: Height over width of the anchors.
        classes: How many, without the background.
    """
    model = tiny_retinanet(
        _Backbone(), num_classes=classes + 1, anchor_sizes=sizes, aspect_ratios=ratios
    )
    model.head.classification_head.conv = nn.Sequential()
    model.head.regression_head.conv = nn.Sequential()
    model.transform.image_mean, model.transform.image_std = [MEAN] * 3, [DEVIATION] * 3
    return model.to(memory_format=torch.channels_last)
