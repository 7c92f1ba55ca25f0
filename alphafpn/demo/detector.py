"""A small RetinaNet with levels and anchors as coarse as torchvision's."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from alphafpn.demo.scenes import SIDE
from alphafpn.tiny import tiny_retinanet

CHANNELS = 32
_WIDTHS = (16, 16, 32, 64, 96)  # of C1 to C5
_SIZES = (32, 64, 128, 256)  # of the anchors of P3 to P6, in pixels
_RATIOS = (0.5, 1.0, 2.0)
_MEAN, _DEVIATION = 0.45, 0.25  # of pixels from 0 to 1, in all channels


def detector() -> Any:
    """Makes a RetinaNet of P3 to P6 with anchors from 32 px, for scenes at their own size.

    Its body is a residual network of 5 blocks, without pretrained weights. Each part of the head
    has one convolution instead of four. The losses are those of `tiny_retinanet`, which do not
    depend on how the objects are spread over the images of a batch.
    """
    levels = {f"c{i}": str(i - 3) for i in range(3, 6)}
    model = tiny_retinanet(
        BackboneWithFPN(_body(), levels, list(_WIDTHS[2:]), CHANNELS, LastLevelMaxPool()),
        anchor_sizes=_SIZES,
        aspect_ratios=_RATIOS,
        min_size=SIDE,
        max_size=SIDE,
        image_mean=[_MEAN] * 3,
        image_std=[_DEVIATION] * 3,
    )
    for part in (model.head.classification_head, model.head.regression_head):
        part.conv = part.conv[:1]
        # torchvision's start is made for pretrained maps: these gradients would be too small.
        nn.init.kaiming_normal_(part.conv[0][0].weight, nonlinearity="relu")
    return model.to(memory_format=torch.channels_last)


def _body() -> nn.Sequential:
    """Makes the residual network: C1 to C5 at strides 2 to 32."""
    stem = nn.Conv2d(3, _WIDTHS[0], 3, 2, 1, bias=False)
    stages = [nn.Sequential(stem, nn.BatchNorm2d(_WIDTHS[0]), nn.ReLU())]
    for before, width in itertools.pairwise(_WIDTHS):
        shortcut = nn.Sequential(nn.Conv2d(before, width, 1, 2, bias=False), nn.BatchNorm2d(width))
        stages.append(BasicBlock(before, width, 2, shortcut))
    return nn.Sequential(OrderedDict((f"c{i}", stage) for i, stage in enumerate(stages, 1)))
