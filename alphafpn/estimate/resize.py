"""The resize and padding rule of a detector: `Resize`."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

Size = tuple[int, int]


class Resize:
    """The input sizes that a detector's transform makes, computed without an image.

    torchvision's rule is applied in whole numbers; any other transform runs on an empty image.
    """

    def __init__(self, transform: nn.Module, num_channels: int) -> None:
        self.transform: Any = transform
        self.num_channels = num_channels

    @property
    def min_sizes(self) -> tuple[int | None, ...]:
        """Returns the sizes that training chooses from; `(None,)` if it does not choose."""
        stock = is_stock(self.transform, GeneralizedRCNNTransform, "forward", "resize")
        if not stock or self._skips_resize or self.transform.fixed_size is not None:
            return (None,)
        return tuple(self.transform.min_size)

    @property
    def _skips_resize(self) -> bool:
        # torchvision's transform skips the resize in training only.
        return self.transform.training and getattr(self.transform, "_skip_resize", False)

    def frame(self, size: Size, min_size: int | None = None) -> tuple[Size, Size]:
        """Computes (height, width) of a resized image, and of the batch that holds it alone.

        `min_size` is one of `min_sizes`; by default the last, as in evaluation.
        """
        transform = self.transform
        if is_stock(transform, GeneralizedRCNNTransform, "resize"):
            min_size = min_size or transform.min_size[-1]
        stock = is_stock(
            transform, GeneralizedRCNNTransform, "forward", "normalize", "batch_images"
        )
        if min_size is None or not stock:
            return self._run(size, min_size)
        if self._skips_resize:
            resized = size
        elif transform.fixed_size is not None:
            resized = int(transform.fixed_size[1]), int(transform.fixed_size[0])
        else:
            # `_resize_image_and_masks` and `interpolate(recompute_scale_factor=True)`.
            scale = min(min_size / min(size), transform.max_size / max(size))
            resized = math.floor(size[0] * scale), math.floor(size[1] * scale)
        if min(resized) < 1:
            raise ValueError(f"an image of (height, width) {size} is resized to {resized}")
        unit = transform.size_divisible
        padded = tuple(math.ceil(side / unit) * unit for side in resized)
        return resized, (padded[0], padded[1])

    def _run(self, size: Size, min_size: int | None) -> tuple[Size, Size]:
        """Runs a transform that is not torchvision's, in the mode it is in."""
        transform = copy.copy(self.transform)
        if min_size is not None:
            transform.min_size = (min_size,)
        shape = (self.num_channels, *size)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            try:
                batch, _ = transform.forward([torch.empty(shape, device="meta")], None)
            except Exception:  # of code that needs data
                batch, _ = transform.forward([torch.zeros(shape)], None)
        (height, width), padded = batch.image_sizes[0], batch.tensors.shape[2:]
        return (int(height), int(width)), (int(padded[0]), int(padded[1]))


def resizes(transform: Any) -> bool:
    """Whether a transform resizes images in training, by torchvision's rule."""
    skips = getattr(transform, "_skip_resize", False)
    return is_stock(transform, GeneralizedRCNNTransform, "resize") and not skips


def is_stock(module: nn.Module, stock: type[nn.Module], *methods: str) -> bool:
    """Whether `methods` of `module` are those of `stock`, on its class and on itself."""
    return isinstance(module, stock) and all(
        getattr(type(module), method) is getattr(stock, method) and method not in vars(module)
        for method in methods
    )
