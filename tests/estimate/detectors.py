"""Detectors of three fused levels and one extra level, in a few thousand weights."""

from __future__ import annotations

from torch import nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import MultiScaleRoIAlign


def small_backbone(extra=None, cls=BackboneWithFPN):
    """Strides 4, 8 and 16, and a pooled map where there are no extra blocks."""
    body = nn.Sequential(*(nn.Conv2d(3, 3, 3, stride, 1) for stride in (4, 2, 2)))
    return cls(body, {"0": "0", "1": "1", "2": "2"}, [3] * 3, 32, extra)


def small_detector(kind="retinanet", sizes=(8, 16, 32, 64), backbone=None, **kwargs):
    kwargs = {"min_size": 64, "max_size": 100, **kwargs}
    backbone = small_backbone() if backbone is None else backbone
    ratios = (1.0,) if kind == "fcos" else (0.5, 1.0, 2.0)
    generator = AnchorGenerator(tuple((s,) for s in sizes), (ratios,) * len(sizes))
    if kind == "faster":
        pool = MultiScaleRoIAlign(["0", "1", "2"], 7, 2)
        kwargs |= {"rpn_anchor_generator": generator, "box_roi_pool": pool}
        return detection.FasterRCNN(backbone, 2, **kwargs)
    cls = detection.FCOS if kind == "fcos" else detection.RetinaNet
    return cls(backbone, 2, anchor_generator=generator, **kwargs)
