"""`DetectorProbe`: finds the detector in a module and runs a copy of it on the meta device."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOS
from torchvision.ops import FeaturePyramidNetwork

from alphafpn.estimate.resize import Resize, Size, is_stock

# By name: importing FSDP to ask would load all of torch.distributed.
_WRAPPERS = ("ScriptModule", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


def find_detector(model: nn.Module) -> Any:
    """Returns the only detector in `model`, a module with a `transform` and a `backbone`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
    found = {
        path or "model": module
        for path, module in model.named_modules()
        if {"transform", "backbone"} <= module._modules.keys()
    }
    if len(found) != 1:
        parts = found or dict(model.named_children())
        names = ", ".join(f"{path}: {type(part).__name__}" for path, part in parts.items())
        raise TypeError(
            "model: expected one torchvision detector, with a transform and a backbone, found "
            f"{len(found) or 'none'} in {type(model).__name__} ({names or 'no parts'})"
        )
    return next(iter(found.values()))


def refuse_wrappers(model: nn.Module, advice: str) -> None:
    """Raises TypeError if anything in `model` is scripted or wrapped in DDP or FSDP."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
    for path, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__name__ in _WRAPPERS:
                raise TypeError(
                    f"{path or 'model'}: expected a module without wrapper, found a "
                    f"{cls.__name__} ({type(module).__name__}); {advice}"
                )


class DetectorProbe:
    """The levels, anchors and input sizes of a detector, read from a copy without weights.

    `like` is a probe of the same detector, for a `model` that is a skeleton adapted from its.

    Attributes:
        detector: A copy of the detector on the meta device, from `skeleton`.
        generator: Its anchor generator.
        resize: Its resize and padding rule.
        num_fused_levels: K of its pyramid.
        is_fcos: Whether levels follow regression ranges instead of IoU.
        detections_per_image: The detector's cap on detections.
    """

    def __init__(self, model: nn.Module, like: DetectorProbe | None = None) -> None:
        detector = find_detector(model)
        name = type(detector).__name__
        generator = anchor_generator(detector)
        if not is_stock(generator, AnchorGenerator, "forward", "grid_anchors"):
            raise TypeError(
                f"{type(generator).__name__} places anchors in its own way: pass them, split by "
                "level, to estimate_alpha"
            )
        pyramids = [m for m in detector.backbone.modules() if isinstance(m, FeaturePyramidNetwork)]
        if not pyramids:
            raise TypeError(f"{name}: expected a FeaturePyramidNetwork in its backbone, found none")
        self.detector: Any = skeleton(detector) if like is None else detector
        self.detector.backbone.eval()
        self.generator = anchor_generator(self.detector)
        self.num_channels = input_channels(detector.backbone)
        self.resize = Resize(self.detector.transform, self.num_channels)
        self.num_fused_levels = len(pyramids[0].inner_blocks)
        self.is_fcos = isinstance(detector, FCOS)
        heads = getattr(detector, "roi_heads", detector)
        self.detections_per_image: int | None = getattr(heads, "detections_per_img", None)
        # Running the backbone takes longer than all else, so probes of one backbone share the maps.
        same = like is not None and like.num_fused_levels == self.num_fused_levels
        self.maps: dict[Size, list[tuple[str, Size]]] = like.maps if like and same else {}

    def anchor_grids(
        self, padded: Size
    ) -> tuple[list[Tensor], list[tuple[float, float]], list[Size], int, list[str]]:
        """Returns the arguments of `AnchorLayout` for a batch of (height, width), in its order.

        Cell anchors [A, 4], strides (y, x) and grid sizes (rows, columns) per level; K; the names
        of the feature maps.
        """
        maps = self.feature_maps(padded)
        names, grids = [name for name, _ in maps], [size for _, size in maps]
        cells = [cell.float() for cell in self.generator.cell_anchors]
        if len(cells) != len(maps):
            raise ValueError(
                f"anchor generator: expected cell anchors for {len(maps)} feature maps "
                f"{names}, found {len(cells)}"
            )
        strides = [(float(padded[0] // h), float(padded[1] // w)) for h, w in grids]
        return cells, strides, grids, self.num_fused_levels, names

    def feature_maps(self, padded: Size) -> list[tuple[str, Size]]:
        """Returns name and (rows, columns) of each feature map.

        A convolutional backbone treats rows and columns alike, so one run per length serves all
        shapes made of those lengths. The first oblong shape checks that this backbone does.
        """
        first = next((shape for shape in self.maps if shape[0] != shape[1]), padded)
        alike = self._map_sizes(first) == self._combine(first)
        return self._combine(padded) if alike else self._map_sizes(padded)

    def _combine(self, padded: Size) -> list[tuple[str, Size]]:
        rows, columns = (self._map_sizes((length, length)) for length in padded)
        return [(name, (h, w)) for (name, (h, _)), (_, (_, w)) in zip(rows, columns, strict=True)]

    def _map_sizes(self, padded: Size) -> list[tuple[str, Size]]:
        if padded not in self.maps:
            maps = run_backbone(self.detector.backbone, (1, self.num_channels, *padded))
            self.maps[padded] = [
                (str(name), (int(feature.shape[-2]), int(feature.shape[-1])))
                for name, feature in maps.items()
            ]
        return self.maps[padded]


def anchor_generator(detector: Any) -> AnchorGenerator:
    """Returns the anchor generator of a detector; raises TypeError if it has none."""
    generator = getattr(getattr(detector, "rpn", detector), "anchor_generator", None)
    if not isinstance(generator, AnchorGenerator):
        raise TypeError(
            f"model: expected a detector with an AnchorGenerator, found {type(detector).__name__} "
            f"with {type(generator).__name__}"
        )
    return generator


def input_channels(backbone: nn.Module) -> int:
    """Returns the channels of an image: those of the backbone's first convolution, else 3."""
    return next((m.in_channels for m in backbone.modules() if isinstance(m, nn.Conv2d)), 3)


def run_backbone(backbone: nn.Module, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Runs a skeleton's backbone on an image batch of `shape` [N, C, H, W]; returns its maps."""
    like = next(backbone.parameters())
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            maps = backbone(like.new_zeros(shape))
        except Exception:
            # Some code looks at values, which meta tensors lack.
            backbone = copy.deepcopy(backbone).to_empty(device="cpu")
            for tensor in (*backbone.parameters(), *backbone.buffers()):
                tensor.zero_()
            maps = backbone(like.new_zeros(shape, device="cpu"))
    return {"0": maps} if isinstance(maps, Tensor) else maps


def skeleton(model: nn.Module) -> Any:
    """Copies a model to the meta device; anchors keep their values.

    Hooks are left out: they are the user's code, made for the real module. An attribute that cannot
    be copied, such as a lock, is shared with the model. Normalisations become the identity: no
    shape depends on them, and on meta tensors they would load the compiler.
    """
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        meta = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(meta, False) if isinstance(tensor, nn.Parameter) else meta
    parts = list(model.modules())
    for part in reversed(parts):  # a compiled module comes before the one inside it
        if "_orig_mod" in part._modules:
            memo[id(part)] = memo[id(part._modules["_orig_mod"])]
        elif isinstance(part, nn.modules.batchnorm._BatchNorm | nn.GroupNorm):
            memo[id(part)] = nn.Identity()
        else:
            memo[id(part)] = type(part).__new__(type(part))
    for part in parts:
        clone = memo[id(part)]
        if type(clone) is not type(part):
            continue
        for name, value in vars(part).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                copied: Any = type(value)()
            elif isinstance(value, Tensor):
                copied = memo.setdefault(id(value), value.detach().to("meta"))
            else:
                try:
                    copied = copy.deepcopy(value, memo)
                except Exception:
                    copied = value
            clone.__dict__[name] = copied
    return memo[id(model)]
