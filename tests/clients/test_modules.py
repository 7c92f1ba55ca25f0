"""LightningModules and wrappers: whatever holds exactly one detector stands for it."""

from __future__ import annotations

import pytest
from torch import nn

from alphafpn import adapt_detector, compare_anchors, estimate_alpha_for
from tests.detectors import make_detector, make_fcos, make_retinanet

ITEMS = [((64, 64), [[4.0, 4, 14, 16], [20, 20, 52, 50]])]
every_call = pytest.mark.parametrize(
    "call",
    [
        lambda module: estimate_alpha_for(module, ITEMS),
        lambda module: compare_anchors(module, ITEMS),
        lambda module: adapt_detector(module, 0.5),
    ],
)


@pytest.fixture
def module():
    lightning = pytest.importorskip("lightning")
    module = lightning.LightningModule()
    module.student = make_detector(make_retinanet)
    module.loss = nn.L1Loss()
    return module


def test_a_module_with_one_detector_stands_for_it(module):
    assert estimate_alpha_for(module, ITEMS) == estimate_alpha_for(module.student, ITEMS)
    found, expected = compare_anchors(module, ITEMS), compare_anchors(module.student, ITEMS)
    assert found.to_list() == expected.to_list()
    sizes = module.student.anchor_generator.sizes
    assert adapt_detector(module, 0.5) is module
    assert module.student.anchor_generator.sizes[0][0] == sizes[0][0] / 2


@every_call
def test_two_detectors_are_named(module, call):
    module.teacher = make_detector(make_fcos)
    with pytest.raises(TypeError, match=r"student.*teacher"):
        call(module)


@every_call
def test_no_detector_is_said(call):
    with pytest.raises(TypeError, match="Linear"):
        call(nn.Linear(2, 2))
