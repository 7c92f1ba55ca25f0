"""Boxes and anchors of COCO's size, the same for all benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator

from alphafpn import AnchorLayout

BOXES = 860_000
SIZE = (800, 1088)
RATIOS = (0.5, 1.0, 2.0)
STRIDES = (4, 8, 16, 32, 64)


def boxes(count: int = BOXES, size: tuple[int, int] = SIZE, device: str = "cpu") -> Tensor:
    """Boxes [count, 4] with log-normal sizes, clipped to the image."""
    generator = torch.Generator().manual_seed(0)
    height, width = size
    centre = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
    scale = torch.randn(count, 1, generator=generator) * 0.9 + 3.6
    shape = torch.exp(scale + torch.randn(count, 2, generator=generator) * 0.4)
    result = torch.cat([centre - shape / 2, centre + shape / 2], dim=1)
    result[:, 0::2].clamp_(0, width)
    result[:, 1::2].clamp_(0, height)
    return result.to(device)


def layout(shapes: int, size: tuple[int, int] = SIZE) -> AnchorLayout:
    """P2-P6 with 3 shapes a cell (Faster R-CNN) or 9 (RetinaNet's octaves)."""
    octaves = (0.0,) if shapes == 3 else (0.0, 1 / 3, 2 / 3)
    sizes = tuple(tuple(int(8 * s * 2**o) for o in octaves) for s in STRIDES)
    grids = [(-(-size[0] // s), -(-size[1] // s)) for s in STRIDES]
    return AnchorLayout(
        AnchorGenerator(sizes, (RATIOS,) * 5).cell_anchors,
        [(size[0] // h, size[1] // w) for h, w in grids],
        grids,
        4,
    )
