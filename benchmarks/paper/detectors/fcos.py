"""FCOS (Tian et al., ICCV 2019) for tiny objects: torchvision's, on P2-P6."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torchvision.models import WeightsEnum
from torchvision.models.detection import FCOS
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.models.detection.fcos import (
    FCOSClassificationHead,
    FCOSHead,
    FCOSRegressionHead,
)

from alphafpn.tiny.detectors import (
    Alpha,
    _anchor_generator,
    _backbone,
    _check_levels,
    _check_options,
    _finish,
)

_GROUPS = 32  # of torchvision's head


def tiny_fcos(
    backbone: str | nn.Module = "resnet50",
    *,
    num_classes: int = 2,
    weights: None = None,
    weights_backbone: WeightsEnum | str | None = "IMAGENET1K_V1",
    trainable_backbone_layers: int | None = None,
    alpha: Alpha | None = None,
    sizes: Sequence[float] = (2, 4, 8, 16, 32),
    group_norm: bool = True,
    **kwargs: Any,
) -> FCOS:
    """Builds torchvision's FCOS on P2-P6, its levels split at 16, 32, 64 and 128 pixels.

    | | torchvision's `fcos_resnet50_fpn` | here |
    |---|---|---|
    | levels | P3-P5, P6 and P7 by convolutions | P2-P5, P6 by max-pooling |
    | a level's range, to the box's farthest side | 64, 128, 256, 512 | 16, 32, 64, 128 |
    | input | resized to 800-1333 | as it is, padded to multiples of 32 |

    torchvision derives a level's range from the size of its one anchor (4 to 8 times as large), and
    counts the radius of centre sampling in such sizes. Half the strides give the ranges above, and
    a radius of 3 sizes is then FCOS's 1.5 strides. S-alpha follows the ranges: there is no matching
    by IoU.

    Args:
        backbone: As in `tiny_retinanet`.
        num_classes: Including the background, which has label 0.
        weights: As in `tiny_retinanet`.
        weights_backbone: As in `tiny_retinanet`.
        trainable_backbone_layers: As in `tiny_retinanet`.
        alpha: As in `tiny_retinanet`.
        sizes: One for each level, finest first: a quarter of where the level's range begins.
        group_norm: Whether the head normalises, as torchvision's does.
        **kwargs: For torchvision's `FCOS`. With `min_size`, `max_size` or `fixed_size` it resizes
            images, with its own defaults for those not given.

    Returns:
        The detector, in training mode.

    Raises:
        TypeError: As in `tiny_retinanet`.
        ValueError: If there is more than one size per level, or the pyramid's channels do not fall
            into 32 groups, and as in `tiny_retinanet`.
    """
    _check_options(FCOS, kwargs)
    anchors = _anchor_generator(sizes, (1.0,))
    if anchors.num_anchors_per_location()[0] != 1:
        raise ValueError(f"sizes: expected one per level, found {tuple(sizes)}")
    body = _backbone(backbone, weights, weights_backbone, trainable_backbone_layers)
    channels = body.out_channels
    if group_norm and channels % _GROUPS:
        raise ValueError(
            f"group_norm: expected a pyramid of a multiple of {_GROUPS} channels, found {channels}"
        )
    head = Head(channels, num_classes, None if group_norm else nn.Identity)
    defaults = {"center_sampling_radius": 3.0}
    model = FCOS(body, num_classes, anchor_generator=anchors, head=head, **{**defaults, **kwargs})
    _check_levels(model, anchors)
    return _finish(model, alpha, kwargs)


class Head(FCOSHead):  # type: ignore[misc]
    """Modifications: may do without normalisation, which torchvision's has no switch for.

    Args:
        channels: Of the pyramid.
        num_classes: Including the background.
        norm_layer: Makes a layer for that many channels; None: torchvision's group normalisation.
    """

    def __init__(self, channels: int, num_classes: int, norm_layer: type[nn.Module] | None) -> None:
        nn.Module.__init__(self)
        self.box_coder = BoxLinearCoder(normalize_by_size=True)
        self.classification_head = FCOSClassificationHead(
            channels, 1, num_classes, norm_layer=norm_layer
        )
        self.regression_head = FCOSRegressionHead(channels, 1, norm_layer=norm_layer)
