"""Small pyramids, inputs and a literal Eq. 1 that several test files share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from alphafpn.pyramid import AttentionAlpha, LearnableAlpha
from alphafpn.surgery import patch_detector

# For the three edges of four levels.
FACTORS = [0.367, 0.387, 0.368]
# Of alpha: fixed, learnable, and computed from the image.
KINDS = [list, LearnableAlpha, AttentionAlpha]
CHANNELS = (3, 5, 6, 7)
OUT = 4
NORMS = {
    "no norm": None,
    "batch": nn.BatchNorm2d,
    "frozen": FrozenBatchNorm2d,
    "group": lambda channels: nn.GroupNorm(2, channels),
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
}
EXTRAS = {
    "no extra": lambda: None,
    "pool": LastLevelMaxPool,
    "p6p7 on c5": lambda: LastLevelP6P7(CHANNELS[-1], OUT),
    "p6p7 on p5": lambda: LastLevelP6P7(OUT, OUT),
}


def make_pyramid(norm="no norm", extra="no extra", levels=4, cls=FeaturePyramidNetwork, **kwargs):
    """A pyramid in eval mode whose weights, biases and statistics are all random."""
    torch.manual_seed(0)
    channels = list(CHANNELS[-levels:])
    fpn = cls(channels, OUT, EXTRAS[extra](), NORMS[norm], **kwargs)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in fpn.state_dict().items():
        if tensor.is_floating_point() and name.startswith(("inner", "layer", "extra")):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
            if not name.endswith("var"):
                tensor.sub_(0.6)
    return fpn.eval()


def make_patched(alpha, **kwargs):
    """A patched pyramid whose gates, if any, answer to the image."""
    fpn = patch_detector(make_pyramid(**kwargs), alpha)
    with torch.no_grad():
        for name, parameter in fpn.named_parameters():
            if name.startswith("gates"):
                parameter.add_(0.1)
    return fpn


def make_features(levels=4, size=24, images=2, seed=0) -> OrderedDict[str, Tensor]:
    """Feature maps of halving sizes with the channels that `make_pyramid` expects."""
    generator = torch.Generator().manual_seed(seed)
    return OrderedDict(
        (
            str(i),
            torch.rand(images, c, -(-size >> i) or 1, (size + 3 >> i) or 1, generator=generator),
        )
        for i, c in enumerate(CHANNELS[-levels:])
    )


def literal_pyramid(fpn, alpha: Sequence[float], x: dict[str, Tensor]) -> list[Tensor]:
    """Eq. 1 as the paper writes it, fused levels only: scales after upsampling, level by level."""
    laterals = [block(c) for block, c in zip(fpn.inner_blocks, x.values(), strict=True)]
    merged = laterals[-1:]
    for lateral, factor in zip(laterals[-2::-1], reversed(alpha), strict=True):
        upsampled = F.interpolate(merged[0], size=lateral.shape[-2:], mode="nearest")
        merged.insert(0, lateral + torch.tensor(factor, dtype=upsampled.dtype) * upsampled)
    return [block(p) for block, p in zip(fpn.layer_blocks, merged, strict=True)]


def assert_equal_maps(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Same names in the same order, bitwise same maps."""
    assert list(found) == list(expected)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference in any map, over the largest magnitude in that map."""
    assert list(found) == list(expected)
    return max(
        float((found[name] - p).abs().max().detach() / p.abs().max().detach())
        for name, p in expected.items()
    )
