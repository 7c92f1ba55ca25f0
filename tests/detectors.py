"""torchvision's kinds of detector in a few thousand weights, and a batch to train them on."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn
from torchvision.models import detection, list_models
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from alphafpn.surgery import patch_detector

DETECTORS = [name for name in list_models(module=detection) if "fpn" in name]


def make_backbone(extra, out=8, cls=BackboneWithFPN):
    """Strides 4, 8 and 16 in a few hundred weights, with batch norm and dropout."""
    body = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.Dropout(0.2), nn.ReLU()),
        nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU()),
    )
    layers = {"0": "0", "1": "1", "2": "2"}
    return cls(body, layers, [4, 6, 8], out, extra_blocks=extra)


def make_stages(levels=3, extra=None, norm=None, names="0123", out=64):
    """A backbone with maps at the last of the strides 4, 8, 16 and 32, and stages before them."""

    def block(inputs, outputs, stride):
        # Without ReLU, which is slow on the meta device.
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs))

    channels = [4, 4, 6, 8, 10, 12]
    shapes = zip([3, *channels[:-1]], channels, (2, 1, 2, 2, 2, 2), strict=True)
    stages = [block(*shape) for shape in shapes]
    body = nn.Sequential(
        OrderedDict((f"block{i}" if i else "stem", stage) for i, stage in enumerate(stages))
    )
    layers = {f"block{6 - levels + i}": names[i] for i in range(levels)}
    extra = LastLevelMaxPool() if extra is None else extra
    return BackboneWithFPN(body, layers, channels[-levels:], out, extra, norm)


def squares(levels, size=8):
    return AnchorGenerator(tuple((size << i,) for i in range(levels)), ((1.0,),) * levels)


SIZES = {"min_size": 64, "max_size": 96}


def make_retinanet(backbone=None, levels=5, size=8, **kwargs):
    options = {"anchor_generator": squares(levels, size), "score_thresh": 0.0, **SIZES, **kwargs}
    return detection.RetinaNet(backbone or make_backbone(LastLevelP6P7(8, 8)), 2, **options)


def make_faster_rcnn(backbone=None, levels=4, size=8, cls=detection.FasterRCNN, **kwargs):
    backbone = backbone or make_backbone(LastLevelMaxPool())
    options = {
        "rpn_anchor_generator": squares(levels, size),
        "box_head": detection.faster_rcnn.TwoMLPHead(backbone.out_channels * 49, 8),
        "box_predictor": detection.faster_rcnn.FastRCNNPredictor(8, 2),
        "box_score_thresh": 0.0,
        **SIZES,
        **kwargs,
    }
    return cls(backbone, **options)


def make_fcos(backbone=None, levels=4, size=8, **kwargs):
    backbone = backbone or make_backbone(LastLevelMaxPool(), out=32)
    options = {
        "anchor_generator": squares(levels, size),
        "head": detection.fcos.FCOSHead(backbone.out_channels, 1, 2, num_convs=1),
        "score_thresh": 0.0,
        **SIZES,
        **kwargs,
    }
    return detection.FCOS(backbone, 2, **options)


BUILDERS = [make_retinanet, make_faster_rcnn, make_fcos]


def small_detector(kind="retinanet", sizes=(8, 16, 32, 64), backbone=None, **kwargs):
    """Maps at strides 4, 8 and 16 and a pooled one, with anchors of three shapes; FCOS has one."""
    build = {"retinanet": make_retinanet, "faster": make_faster_rcnn, "fcos": make_fcos}[kind]
    ratios = (1.0,) if kind == "fcos" else (0.5, 1.0, 2.0)
    name = "rpn_anchor_generator" if kind == "faster" else "anchor_generator"
    generator = AnchorGenerator(tuple((s,) for s in sizes), (ratios,) * len(sizes))
    backbone = backbone or make_backbone(LastLevelMaxPool(), 32 if kind == "fcos" else 8)
    return build(backbone, **{name: generator, "max_size": 100, **kwargs})


def make_detector(build, alpha=None, **kwargs):
    """A detector in training mode; its scores differ from anchor to anchor, as trained ones do."""
    torch.manual_seed(0)
    model = build(**kwargs).train()
    for parameter in model.parameters():
        if parameter.dim() == 4:
            nn.init.kaiming_normal_(parameter)
    return model if alpha is None else patch_detector(model, alpha)


def generator_of(model):
    return getattr(model, "rpn", model).anchor_generator


def make_batch(boxes=True):
    """Two images of different sizes, one without boxes; or both without."""
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.rand(3, 64, 64, generator=generator),
        torch.rand(3, 50, 70, generator=generator),
    ]
    given = torch.tensor([[4.0, 4.0, 14.0, 16.0], [20.0, 20.0, 52.0, 50.0]])[: 2 * boxes]
    return images, [
        {"boxes": given, "labels": torch.ones(len(given), dtype=torch.int64)},
        {"boxes": given[:0], "labels": torch.zeros(0, dtype=torch.int64)},
    ]
