"""A torchvision detector as the statistics see it: `DetectorProbe`."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork

Size = tuple[int, int]


class DetectorProbe:
    """What the statistics need of a torchvision detector, checked once.

    Attributes:
        transform: The detector's own resize and padding.
        generator: Its anchor generator.
        num_fused_levels: K of its pyramid.
        is_fcos: Whether levels follow regression ranges instead of IoU.
        detections_per_image: The detector's cap on detections.
        num_channels: Of an image.
    """

    def __init__(self, model: nn.Module) -> None:
        model = _unwrapped(model)
        name = type(model).__name__
        generator = getattr(getattr(model, "rpn", model), "anchor_generator", None)
        transform = getattr(model, "transform", None)
        backbone = getattr(model, "backbone", None)
        if not (isinstance(transform, nn.Module) and isinstance(backbone, nn.Module)):
            raise TypeError(
                f"a torchvision detector expected, found {name} without transform or backbone"
            )
        if not isinstance(generator, AnchorGenerator):
            raise TypeError(
                f"a detector with an AnchorGenerator expected, found {name} with "
                f"{type(generator).__name__}"
            )
        if not _is_stock(generator, AnchorGenerator, "forward", "grid_anchors"):
            raise TypeError(
                f"{type(generator).__name__} places anchors in its own way: pass them, split by "
                "level, to estimate_alpha"
            )
        pyramids = [m for m in backbone.modules() if isinstance(m, FeaturePyramidNetwork)]
        if not pyramids:
            raise TypeError(f"no FeaturePyramidNetwork in the backbone of {name}")
        self.transform: Any = copy.copy(transform)
        self.num_channels = len(getattr(transform, "image_mean", "RGB"))
        self.generator = generator
        self.num_fused_levels = len(pyramids[0].inner_blocks)
        self.is_fcos = isinstance(model, FCOS)
        heads = getattr(model, "roi_heads", model)
        self.detections_per_image: int | None = getattr(heads, "detections_per_img", None)
        self._backbone: nn.Module = backbone._modules.get("_orig_mod") or backbone
        self._clone: nn.Module = _copy(self._backbone, on_meta=True)
        self._sizes: dict[int, list[tuple[str, int]]] = {}
        self._separable: bool | None = None

    @property
    def min_sizes(self) -> tuple[int | None, ...]:
        """Returns the sizes that training chooses from; `(None,)` where there is no such choice."""
        stock = _is_stock(self.transform, GeneralizedRCNNTransform, "forward")
        if not stock or not self.resizes or self.transform.fixed_size is not None:
            return (None,)
        return tuple(self.transform.min_size)

    @property
    def resizes(self) -> bool:
        """Whether images are resized, and in torchvision's way."""
        stock = _is_stock(self.transform, GeneralizedRCNNTransform, "resize")
        return stock and not self._skips_resize

    def frame(self, size: Size, min_size: int | None = None) -> tuple[Size, Size]:
        """Computes (height, width) of a resized image, and of the batch that holds it alone.

        Args:
            size: (height, width) of the original image.
            min_size: One of `min_sizes`; by default the last, as in evaluation.

        Raises:
            ValueError: If nothing is left of the resized image.
        """
        transform = self.transform
        if _is_stock(transform, GeneralizedRCNNTransform, "resize"):
            min_size = min_size or transform.min_size[-1]
        if min_size is None or not _is_stock(
            transform, GeneralizedRCNNTransform, "forward", "normalize", "batch_images"
        ):
            return self._run_transform(size, min_size)
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
        return resized, (
            math.ceil(resized[0] / unit) * unit,
            math.ceil(resized[1] / unit) * unit,
        )

    def _run_transform(self, size: Size, min_size: int | None) -> tuple[Size, Size]:
        """Computes `frame` of a transform that is not torchvision's, in the mode it is in."""
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

    @property
    def _skips_resize(self) -> bool:
        """Whether images come resized, as they may for torchvision's transform in training."""
        return self.transform.training and getattr(self.transform, "_skip_resize", False)

    def anchor_grids(
        self, padded: Size
    ) -> tuple[list[Tensor], list[tuple[float, float]], list[Size], int, list[str]]:
        """Returns what an `AnchorLayout` consists of, on a batch of (height, width), in its order.

        Cell anchors [A, 4], strides (y, x) and grid sizes (rows, columns) per level; K; the names
        of the feature maps.
        """
        maps = self.feature_maps(padded)
        names, grids = [name for name, _ in maps], [size for _, size in maps]
        cells = [cell.float() for cell in self.generator.cell_anchors]
        if len(cells) != len(maps):
            raise ValueError(
                f"{len(maps)} feature maps {names}, but cell anchors for {len(cells)} levels"
            )
        strides = [(float(padded[0] // h), float(padded[1] // w)) for h, w in grids]
        return cells, strides, grids, self.num_fused_levels, names

    def feature_maps(self, padded: Size) -> list[tuple[str, Size]]:
        """Returns name and (rows, columns) of each feature map.

        A convolutional backbone treats rows and columns alike, so one probe per length serves all
        shapes made of those lengths; the first oblong shape checks that this one does.
        """
        if self._separable is None and padded[0] != padded[1]:
            self._separable = self._probe(padded) == self._combine(padded)
        return self._probe(padded) if self._separable is False else self._combine(padded)

    def _combine(self, padded: Size) -> list[tuple[str, Size]]:
        for length in padded:
            if length not in self._sizes:
                maps = self._probe((length, length))
                self._sizes[length] = [(name, size[0]) for name, size in maps]
        rows, columns = (self._sizes[length] for length in padded)
        return [(name, (h, w)) for (name, h), (_, w) in zip(rows, columns, strict=True)]

    def _probe(self, padded: Size) -> list[tuple[str, Size]]:
        try:
            maps = self._run_backbone(padded)
        except Exception:
            # Some code looks at values, which meta tensors lack.
            self._clone = _copy(self._backbone, on_meta=False)
            maps = self._run_backbone(padded)
        if isinstance(maps, Tensor):
            maps = {"0": maps}
        return [
            (str(name), (int(feature.shape[-2]), int(feature.shape[-1])))
            for name, feature in maps.items()
        ]

    def _run_backbone(self, padded: Size) -> Any:
        like = next(self._clone.parameters())
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return self._clone(like.new_zeros(1, self.num_channels, *padded))


def _unwrapped(module: nn.Module) -> nn.Module:
    """Returns the module inside `torch.compile` and (Distributed)DataParallel."""
    while isinstance(module, nn.Module):
        inside = module._modules.get("_orig_mod")
        if inside is None and "transform" not in module._modules:
            inside = module._modules.get("module")
        if inside is None:
            break
        module = inside
    return module


def _is_stock(module: nn.Module, stock: type[nn.Module], *methods: str) -> bool:
    """Whether `methods` of `module` are those of `stock`, on its class and on itself."""
    return isinstance(module, stock) and all(
        getattr(type(module), method) is getattr(stock, method) and method not in vars(module)
        for method in methods
    )


def _copy(module: nn.Module, *, on_meta: bool) -> nn.Module:
    """Copies a module in eval mode, on meta without data or with it; `module` stays as it is."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name, value in vars(part).items():
            # Hooks are the user's code, made for the real module.
            if name.endswith("_hooks") and isinstance(value, dict):
                memo[id(value)] = type(value)()
    if not on_meta:
        return copy.deepcopy(module, memo).eval()
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    others = [v for part in module.modules() for v in vars(part).values() if isinstance(v, Tensor)]
    for tensor in [*module.buffers(), *others]:
        memo.setdefault(id(tensor), tensor.detach().to("meta"))
    clone = copy.deepcopy(module, memo)
    for part in clone.modules():
        for name, child in part.named_children():
            # No shape depends on it, and batch_norm on meta tensors loads the compiler: seconds.
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(part, name, nn.Identity())
    return clone.eval()
