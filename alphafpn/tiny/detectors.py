"""The paper's detectors for tiny objects, on torchvision's classes.

Both see images as they are: unless a resize is asked for, what goes in is what the network sees.
Box arithmetic is in float32 even under autocast, where torchvision's is in the features' dtype:
in bfloat16 a coordinate above 256 is a multiple of 2 pixels, as large as the objects.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812
import torchvision
from torch import Tensor, nn
from torchvision.models import WeightsEnum
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign, sigmoid_focal_loss

from alphafpn.estimate.probe import DetectorProbe
from alphafpn.pyramid import Alpha
from alphafpn.surgery import patch_detector

PerLevel: TypeAlias = Sequence[float | Sequence[float]]

# The paper's (8, 16, 32, 64, 128), each in three octaves.
RETINANET_SIZES = tuple(
    tuple(size * 2 ** (octave / 3) for octave in range(3)) for size in (8, 16, 32, 64, 128)
)
FASTER_RCNN_SIZES = (8.31, 12.5, 18.55, 30.23, 60.41)

_BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
_BETA = 0.11
_RESIZES = ("min_size", "max_size", "fixed_size")


def tiny_retinanet(
    backbone: str | nn.Module = "resnet50",
    *,
    num_classes: int = 2,
    weights: None = None,
    weights_backbone: WeightsEnum | str | None = "IMAGENET1K_V1",
    trainable_backbone_layers: int | None = None,
    alpha: Alpha | None = None,
    anchor_sizes: PerLevel = RETINANET_SIZES,
    aspect_ratios: PerLevel = (0.5, 1.0, 2.0),
    **kwargs: Any,
) -> RetinaNet:
    """Builds the paper's Adaptive RetinaNet: P2-P6 and small anchors.

    | | torchvision's `retinanet_resnet50_fpn` | here |
    |---|---|---|
    | levels | P3-P5, P6 and P7 by convolutions | P2-P5, P6 by max-pooling |
    | anchor sizes | 32 to 512, in octaves cut to whole numbers | 8 to 128, in octaves |
    | input | resized to 800-1333 | as it is, padded to multiples of 32 |
    | focal loss | sum / positives, mean over images | batch's sum / (positives + images) |
    | box loss | L1 | smooth L1, beta 0.11 |
    | box deltas | unweighted | times (10, 10, 5, 5) |
    | box loss, norm | sum / positives, mean over images | batch's sum / (4 * positives) |
    | NMS | 0.5 | 0.4 |
    | detections per image | 300 | 100 |
    | box arithmetic under autocast | in the features' dtype | in float32 |

    As in both: score above 0.05, the best 1000 of each level before NMS, positives from IoU 0.5 and
    negatives below 0.4. Other than in the paper: ImageNet weights are torchvision's (RGB, stride in
    the 3x3 convolution), anchors have torchvision's positions and rounding, and the background
    class takes a logit that stays unused, as torchvision counts classes.

    Args:
        backbone: Name of a torchvision ResNet, or a module that returns an `OrderedDict` of feature
            maps from a pyramid, finest first, each of `out_channels` channels. A module becomes a
            part of the detector, and is patched there.
        num_classes: Including the background, which has label 0.
        weights: Must be `None`: there are none. Taken so that all builders have the same signature.
        weights_backbone: Of a `backbone` given by name: torchvision's name or enum for its ImageNet
            weights. `None` downloads nothing; batch normalisation is trained then, not frozen.
        trainable_backbone_layers: How many of the five parts of a `backbone` given by name are
            trained, from the deepest. By default 3 with `weights_backbone`, else all.
        alpha: Fusion factors, as for `patch_detector`; `None` leaves the pyramid as it is.
        anchor_sizes: In pixels for each level, finest first: one size, or several. By default 8,
            16, 32, 64 and 128, each also `2 ** (1 / 3)` and `2 ** (2 / 3)` times as large.
        aspect_ratios: Height over width, for all levels or for each one.
        **kwargs: For torchvision's `RetinaNet`. With `min_size`, `max_size` or `fixed_size` it
            resizes images, with its own defaults for those not given.

    Returns:
        The detector, in training mode. Its state dict has torchvision's keys.

    Raises:
        TypeError: If `backbone` has no `FeaturePyramidNetwork`, `alpha` is of no known kind, or
            torchvision knows no such keyword (by itself it ignores those).
        ValueError: If a ResNet or weights of that name do not exist; if feature maps, anchors and
            `alpha` do not fit together.

    Examples:
        >>> model = tiny_retinanet("resnet18", weights_backbone=None, alpha=[0.4, 0.4, 0.4])
        >>> [len(cells) for cells in model.anchor_generator.cell_anchors]
        [9, 9, 9, 9, 9]
    """
    _check_options(RetinaNet, kwargs)
    anchors = _anchor_generator(anchor_sizes, aspect_ratios)
    body = _backbone(backbone, weights, weights_backbone, trainable_backbone_layers)
    head = _PaperHead(body.out_channels, anchors.num_anchors_per_location()[0], num_classes)
    defaults = {"nms_thresh": 0.4, "detections_per_img": 100}
    model = RetinaNet(
        body, num_classes, anchor_generator=anchors, head=head, **{**defaults, **kwargs}
    )
    model.box_coder = head.regression_head.box_coder
    _check_levels(model, anchors)
    return _finish(model, alpha, kwargs)


def tiny_faster_rcnn(
    backbone: str | nn.Module = "resnet50",
    *,
    num_classes: int = 2,
    weights: None = None,
    weights_backbone: WeightsEnum | str | None = "IMAGENET1K_V1",
    trainable_backbone_layers: int | None = None,
    alpha: Alpha | None = None,
    anchor_sizes: PerLevel = FASTER_RCNN_SIZES,
    aspect_ratios: PerLevel = (0.5, 1.3, 2.0),
    **kwargs: Any,
) -> FasterRCNN:
    """Builds the paper's Faster R-CNN: P2-P6, small anchors, RoIs from the levels that are fused.

    | | torchvision's `fasterrcnn_resnet50_fpn` | here |
    |---|---|---|
    | anchor sizes | 32 to 512 | 8.31, 12.5, 18.55, 30.23, 60.41 |
    | aspect ratios | 0.5, 1, 2 | 0.5, 1.3, 2 |
    | input | resized to 800-1333 | as it is, padded to multiples of 32 |
    | detections per image | 100 | 200 |
    | box arithmetic under autocast | in the features' dtype | in float32 |

    As in both: RPN 0.7 / 0.3, 256 anchors per image, NMS 0.7; RoI 0.5, 512 per image, deltas times
    (10, 10, 5, 5); score above 0.05, NMS 0.5. Other than in the paper, and as in torchvision: the
    smooth L1 of RoIs has beta 1/9 for 1, the RPN trains on anchors that cross the border, and on
    its best 2000 proposals of each image instead of the batch; ImageNet weights and the anchors'
    positions and rounding are as in `tiny_retinanet`.

    Args:
        backbone: As in `tiny_retinanet`.
        num_classes: Including the background, which has label 0.
        weights: As in `tiny_retinanet`.
        weights_backbone: As in `tiny_retinanet`.
        trainable_backbone_layers: As in `tiny_retinanet`.
        alpha: As in `tiny_retinanet`.
        anchor_sizes: In pixels for each level, finest first: one size, or several.
        aspect_ratios: Height over width, for all levels or for each one.
        **kwargs: For torchvision's `FasterRCNN`. With `min_size`, `max_size` or `fixed_size` it
            resizes images, with its own defaults for those not given.

    Returns:
        The detector, in training mode. Its state dict has torchvision's keys.

    Raises:
        TypeError: As in `tiny_retinanet`.
        ValueError: As in `tiny_retinanet`.

    Examples:
        >>> model = tiny_faster_rcnn("resnet18", weights_backbone=None, alpha=0.4)
        >>> model.roi_heads.box_roi_pool.featmap_names
        ['0', '1', '2', '3']
    """
    _check_options(FasterRCNN, kwargs)
    anchors = _anchor_generator(anchor_sizes, aspect_ratios)
    body = _backbone(backbone, weights, weights_backbone, trainable_backbone_layers)
    defaults = {"box_detections_per_img": 200}
    model = FasterRCNN(body, num_classes, rpn_anchor_generator=anchors, **{**defaults, **kwargs})
    names = _check_levels(model, anchors)
    if "box_roi_pool" not in kwargs:
        model.roi_heads.box_roi_pool = MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2)
    for part in (model.rpn, model.roi_heads):
        part.box_coder = _BoxCoder(part.box_coder.weights)
    return _finish(model, alpha, kwargs)


class _Unresized(GeneralizedRCNNTransform):  # type: ignore[misc]
    """Modifications: leaves images as large as they are."""

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target

    def __repr__(self) -> str:
        normalise = f"Normalize(mean={self.image_mean}, std={self.image_std})"
        return f"Unresized(\n    {normalise}\n    Pad(size_divisible={self.size_divisible})\n)"


class _AnchorGenerator(AnchorGenerator):  # type: ignore[misc]
    """Modifications: anchors are float32 where features are narrower."""

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.promote_types(dtype, torch.float32), device)


class _BoxCoder(BoxCoder):  # type: ignore[misc]
    """Modifications: boxes are decoded in the wider dtype of deltas and anchors."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        rel_codes = rel_codes.to(torch.promote_types(rel_codes.dtype, boxes.dtype))
        decoded: Tensor = super().decode_single(rel_codes, boxes)
        return decoded


class _PaperHead(RetinaNetHead):  # type: ignore[misc]
    """Modifications: the losses and the box deltas' weights are the paper's."""

    def __init__(self, in_channels: int, num_anchors: int, num_classes: int) -> None:
        super().__init__(in_channels, num_anchors, num_classes)
        self.regression_head.box_coder = _BoxCoder(_BOX_WEIGHTS)

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        # Near 1 a bfloat16 has steps of 1/256, too coarse for the focal weight of a sure negative.
        logits, deltas = (
            head_outputs[name].to(torch.promote_types(head_outputs[name].dtype, torch.float32))
            for name in ("cls_logits", "bbox_regression")
        )
        class_losses, box_losses, positives = [], [], []
        for i, (target, matches) in enumerate(zip(targets, matched_idxs, strict=True)):
            positive = torch.where(matches >= 0)[0]
            truth = matches[positive]
            wanted = torch.zeros_like(logits[i])
            wanted[positive, target["labels"][truth]] = 1
            decided = matches != self.classification_head.BETWEEN_THRESHOLDS
            class_losses.append(
                sigmoid_focal_loss(logits[i][decided], wanted[decided], reduction="sum")
            )
            coder = self.regression_head.box_coder
            wanted = coder.encode_single(target["boxes"][truth], anchors[i][positive])
            box_losses.append(
                F.smooth_l1_loss(deltas[i][positive], wanted, beta=_BETA, reduction="sum")
            )
            positives.append(positive.numel())
        return {
            "classification": torch.stack(class_losses).sum() / (sum(positives) + len(targets)),
            "bbox_regression": torch.stack(box_losses).sum() / (4 * max(1, sum(positives))),
        }


def _check_options(detector: type[nn.Module], options: dict[str, Any]) -> None:
    parts = (detector, GeneralizedRCNNTransform)
    known = {name for part in parts for name in inspect.signature(part).parameters} - {"kwargs"}
    for name in options:
        if name not in known:
            raise TypeError(
                f"{name}: expected an argument of torchvision's {detector.__name__}, which has "
                f"{', '.join(sorted(known))}; found none of that name"
            )


def _backbone(
    backbone: str | nn.Module, weights: object, weights_backbone: Any, trainable: int | None
) -> Any:
    if weights is not None:
        raise ValueError(
            f"weights: expected None, as none are published, found {weights!r}; load your own with "
            "load_state_dict"
        )
    if isinstance(backbone, nn.Module):
        if not isinstance(getattr(backbone, "out_channels", None), int):
            raise ValueError(
                f"backbone: expected a module with `out_channels`, found {type(backbone).__name__} "
                "without"
            )
        return backbone
    known = torchvision.models.list_models(torchvision.models, include="*resne*")
    if backbone not in known:
        raise ValueError(f"backbone: expected a module or one of {known}, found {backbone!r}")
    if trainable is None:
        trainable = 5 if weights_backbone is None else 3
    try:
        return resnet_fpn_backbone(
            backbone_name=backbone,
            weights=weights_backbone,
            norm_layer=nn.BatchNorm2d if weights_backbone is None else FrozenBatchNorm2d,
            trainable_layers=trainable,
        )
    except KeyError as error:
        names = [entry.name for entry in torchvision.models.get_model_weights(backbone)]
        raise ValueError(
            f"weights_backbone: expected None or one of {names} for {backbone}, found "
            f"{weights_backbone!r}"
        ) from error


def _anchor_generator(sizes: PerLevel, ratios: PerLevel) -> AnchorGenerator:
    if not len(sizes) or not len(ratios):
        raise ValueError("anchor_sizes and aspect_ratios: expected some for each level, found none")
    per_level = [(size,) if isinstance(size, int | float) else tuple(size) for size in sizes]
    if any(isinstance(ratio, int | float) for ratio in ratios):
        ratios = [tuple(ratios)] * len(per_level)  # type: ignore[arg-type]
    shapes = [tuple(level) for level in ratios]  # type: ignore[arg-type]
    if len(shapes) != len(per_level):
        raise ValueError(
            f"aspect_ratios: expected ratios for all levels or for each of {len(per_level)}, found "
            f"{len(shapes)} levels"
        )
    generator = _AnchorGenerator(tuple(per_level), tuple(shapes))
    counts = generator.num_anchors_per_location()
    if len(set(counts)) != 1:
        raise ValueError(
            f"anchors: expected equally many per position on each level, as one head serves all, "
            f"found {counts}"
        )
    for level, cells in enumerate(generator.cell_anchors):
        if not (cells[:, 2:] - cells[:, :2]).min() > 0:
            raise ValueError(
                f"anchors: expected some pixels on each side after torchvision's rounding, found "
                f"sizes {per_level[level]} with aspect ratios {shapes[level]} on level {level}"
            )
    return generator


def _check_levels(model: nn.Module, anchors: AnchorGenerator) -> list[str]:
    """Names of the fused feature maps, if there are anchors for each map."""
    view = DetectorProbe(model)
    names = [name for name, _ in view.feature_maps((256, 256))]
    if len(names) != len(anchors.cell_anchors):
        raise ValueError(
            f"anchor_sizes: expected sizes for {len(names)} levels, the backbone's feature maps "
            f"{names}, found {len(anchors.cell_anchors)}: {anchors.sizes}"
        )
    return names[: view.num_fused_levels]


def _finish(model: Any, alpha: Alpha | None, options: dict[str, Any]) -> Any:
    if not any(name in options for name in _RESIZES):
        stock = model.transform
        model.transform = _Unresized(
            *(stock.min_size, stock.max_size, stock.image_mean, stock.image_std),
            size_divisible=stock.size_divisible,
        )
    return model if alpha is None else patch_detector(model, alpha)
