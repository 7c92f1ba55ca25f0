"""torch.compile with its default backend, which writes C++ and has it compiled."""

from __future__ import annotations

import os
import shutil
import sys

import pytest
import torch
from torch._dynamo.utils import counters

from alphafpn.pyramid import LearnableAlpha
from alphafpn.surgery import patch_detector
from tests.pyramids import make_features, make_pyramid, relative_error

FACTORS = [0.367, 0.387]
COMPILER = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason=f"inductor needs a C++ compiler, found no {COMPILER}"
)


@pytest.fixture(autouse=True)
def afresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def outputs_and_gradients(fpn, forward, x):
    fpn.zero_grad()
    maps = forward(x)
    sum(p.square().mean() for p in maps.values()).backward()
    return maps, {name: p.grad.clone() for name, p in fpn.named_parameters()}


@pytest.mark.parametrize("kind", [list, LearnableAlpha])
def test_one_graph_agrees_with_eager_and_outlives_its_factors(kind):
    fpn, x = patch_detector(make_pyramid(levels=3), kind(FACTORS)), make_features(3, 16)
    compiled = torch.compile(fpn, fullgraph=True)
    for factors in (FACTORS, [1.0, 1.0], [0.1, 0.2]):
        patch_detector(compiled, kind(factors))
        expected, wanted = outputs_and_gradients(fpn, fpn, x)
        maps, gradients = outputs_and_gradients(fpn, compiled, x)
        assert relative_error(maps, expected) < 1e-5
        assert gradients.keys() == wanted.keys()
        assert relative_error(gradients, wanted) < 1e-5
    assert counters["stats"]["unique_graphs"] == 1
