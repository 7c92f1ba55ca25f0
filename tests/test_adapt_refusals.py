"""What adapting refuses, with one line, and leaves as it was."""

from __future__ import annotations

import math
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.detection import backbone_utils
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork

from alphafpn import adapt_detector, patch_detector
from alphafpn.tiny.detectors import tiny_retinanet
from tests.detectors import generator_of, make_stages, squares
from tests.messages import pattern
from tests.states import assert_unchanged, snapshot
from tests.test_adapt import OUT, make, make_fcos, make_rcnn, make_retinanet, on_meta, row_of


def with_part(path, part, build=make_retinanet):
    model = make(build)
    model.set_submodule(path, part)
    return model


def with_generator(generator):
    return with_part("rpn.anchor_generator", generator, make_rcnn)


def with_block(block):
    return with_part("backbone.fpn.inner_blocks.0", block)


def without_pyramid():
    backbone = nn.Conv2d(3, OUT, 3, 16, 1)
    backbone.out_channels = OUT
    return make(make_rcnn, levels=0, backbone=backbone)


class OwnPyramid(FeaturePyramidNetwork):
    pass


class LastFive(backbone_utils.BackboneWithFPN):
    def forward(self, x):
        return OrderedDict(list(super().forward(x).items())[-5:])


class ByName(backbone_utils.BackboneWithFPN):
    def forward(self, x):
        maps = self.body(x)
        return self.fpn(OrderedDict((name, maps[name]) for name in "012"))


def with_class(part, cls):
    model = make()
    model.get_submodule(part).__class__ = cls
    return model


def row_for(change=lambda model: None, **keywords):
    """A row that starts from what a detector was before `change`."""

    def case():
        model = make()
        row = row_of(model)
        change(model)
        return model, (row,), keywords

    return case


def call(build, *args, **keywords):
    return lambda: (build(), args or (1,), keywords)


FINER, LARGER = {"finer_level": True}, {"input_scale": 2}
ROW = "fit: expected a row alone, ... found also"
ADAPTED = "that the row starts from, found ...: is the detector already adapted?"
HEAD = "anchor generator: expected 1 anchors per cell, as the head has, found"
TYPE_ERRORS = {
    "model: expected a torch.nn.Module, found str": call(lambda: "retinanet"),
    "model: ... found none in Sequential (0: Conv2d)": call(
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1))
    ),
    "model: ... found 2 in ModuleList (0: RetinaNet, 1: FCOS)": call(
        lambda: nn.ModuleList([make(), make(make_fcos)])
    ),
    "model: ... AnchorGenerator, found FasterRCNN with Identity": call(
        lambda: with_generator(nn.Identity())
    ),
    "fit: expected a row ..., or a number, found str": call(make, "0.5"),
    "fit: expected a row ..., or a number, found bool": call(make, True),
    "fit: expected a row ..., or a number, found Tensor": call(make, torch.ones(9, 9)),
    f"{ROW} finer_level=True, input_scale=1, max_objects=None": row_for(finer_level=True),
    f"{ROW} finer_level=False, input_scale=2, max_objects=None": row_for(input_scale=2),
    f"{ROW} finer_level=False, input_scale=1, max_objects=100": row_for(max_objects=100),
    "finer_level: expected a bool, found int": call(make, finer_level=1),
    "input_scale: expected a number, found str": call(make, input_scale="2"),
    "max_objects: expected a whole number, found float": call(make, max_objects=3.5),
    "max_objects: expected a whole number, found bool": call(make, max_objects=True),
}
VALUE_ERRORS = {
    "fit: expected a finite number above 0, found 0": call(make, 0),
    "fit: expected a finite number above 0, found nan": call(make, math.nan),
    "fit: expected a finite number above 0, found inf": call(make, math.inf),
    "fit: ... found 0.02: an anchor on level 0 would have 0 x 0 pixels": call(make, 0.02),
    "fit: ... found 1e+38: an anchor on level 0 would have inf x inf pixels": call(make, 1e38),
    f"fit: expected the anchor (-8.0, ...) {ADAPTED}": row_for(
        lambda model: adapt_detector(model, 0.5)
    ),
    f"fit: expected the anchor (-128.0, ...) {ADAPTED}": row_for(
        lambda model: generator_of(model).cell_anchors.pop()
    ),
    f"fit: expected the input sizes ((64,), 96, None) {ADAPTED}": row_for(
        lambda model: adapt_detector(model, 1, input_scale=2)
    ),
    "input_scale: expected a finite number above 0, found -2": call(make, input_scale=-2),
    "input_scale: ... at least 1, found ((0,), 1, None)": call(make, input_scale=0.006),
    "input_scale: ... at least 1, found ((13,), 19, (0, 13))": call(
        lambda: make(fixed_size=(2, 64)), input_scale=0.2
    ),
    "input_scale: ... found _Unresized, which does not: ...": call(
        lambda: tiny_retinanet(make_stages(4), weights_backbone=None), **LARGER
    ),
    "input_scale: ... found GeneralizedRCNNTransform, which does not: ...": call(
        lambda: make(_skip_resize=True), **LARGER
    ),
    "max_objects: expected a finite number above 0, found 0": call(make, max_objects=0),
    "model: ... found an AlphaFeaturePyramidNetwork: adapt before patching": call(
        lambda: patch_detector(make(), 0.5)
    ),
    # torchvision's own error comes late and says little, or there is none.
    f"{HEAD} 3": call(lambda: with_generator(AnchorGenerator(((8, 9, 10),) * 4, ((1.0,),) * 4))),
    f"{HEAD} 1 and 2": call(
        lambda: with_generator(AnchorGenerator(((8, 9), *((8,),) * 3), ((1.0,),) * 4))
    ),
    "model: ... for 3 levels of anchors, found 4 (0, 1, 2, pool)": call(
        lambda: with_generator(squares(3))
    ),
    "finer_level: ... at stride 8 or more, found stride 4; ... are stem (stride 2), ..., block2 "
    "(stride 4), block3 (stride 8), ...": call(lambda: make(levels=4), **FINER),
    "finer_level: ... strides [32, 32] of ['13', '16']; ... 13 (stride 32), ...": call(
        lambda: on_meta("fasterrcnn_mobilenet_v3_large_fpn"), **FINER
    ),
    "finer_level: ... at stride 8 or more, found stride 4; ... layer1 (stride 4), ...": call(
        lambda: on_meta("fasterrcnn_resnet50_fpn"), **FINER
    ),
    "finer_level: ... body ... found none": call(without_pyramid, **FINER),
    "finer_level: ... body ... found Sequential": call(
        lambda: with_part("backbone.body", nn.Sequential()), **FINER
    ),
    "finer_level: expected a FeaturePyramidNetwork, found OwnPyramid": call(
        lambda: with_class("backbone.fpn", OwnPyramid), **FINER
    ),
    "finer_level: expected blocks ... found Conv2d with none": call(
        lambda: with_block(nn.Conv2d(8, OUT, 1)), **FINER
    ),
    "finer_level: expected blocks ... found Sequential with Identity": call(
        lambda: with_block(nn.Sequential(nn.Identity(), nn.Conv2d(8, OUT, 1))), **FINER
    ),
    "model: ... for 6 levels of anchors, found 5 (1, 2, 3, p6, p7)": call(
        lambda: with_class("backbone", LastFive), **FINER
    ),
    "model: ... for 6 levels of anchors, found RuntimeError: Given groups=1, ...": call(
        lambda: with_class("backbone", ByName), **FINER
    ),
}


@pytest.mark.parametrize(
    ("error", "message", "case"),
    [(TypeError, *pair) for pair in TYPE_ERRORS.items()]
    + [(ValueError, *pair) for pair in VALUE_ERRORS.items()],
    ids=[*TYPE_ERRORS, *VALUE_ERRORS],
)
def test_refusals(error, message, case):
    """One line, and the model stays bitwise and attribute for attribute what it was."""
    model, args, keywords = case()
    before = snapshot(model)
    with pytest.raises(error, match=f"^{pattern(message)}$"):
        adapt_detector(model, *args, **keywords)
    assert_unchanged(model, before)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_wrapped_and_scripted_detectors_are_refused(tmp_path):
    def refused(model, name):
        message = f"expected a module without wrapper, found a {name} .*; adapt before wrapping or"
        with pytest.raises(TypeError, match=message):
            adapt_detector(model, 0.5)

    model = make()
    model.backbone.fpn = torch.jit.script(model.backbone.fpn)
    refused(model, "ScriptModule")
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        refused(DistributedDataParallel(make()), "DistributedDataParallel")
    finally:
        dist.destroy_process_group()
    assert generator_of(model).sizes[0] == (16.0,)
