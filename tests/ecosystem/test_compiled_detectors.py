"""torch.compile on whole detectors: as many graphs, and outputs as near to eager, as stock."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from alphafpn.surgery import patch_detector
from tests.detectors import make_batch, make_detector, make_faster_rcnn, make_retinanet

FACTORS = [0.5, 0.25]
# What torchvision itself sets off.
pytestmark = pytest.mark.filterwarnings("ignore:.*create_unbacked_symint:FutureWarning")


def compile_and_run(model, args):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    return compiled, run(compiled, args), counter


def run(model, args):
    """Draws the same random numbers each time."""
    torch.manual_seed(1)
    return model(*args)


@pytest.mark.parametrize("training", [True, False])
def test_one_stage_detectors_compile_as_stock_ones_do(training):
    images, targets = (part[:1] for part in make_batch())
    args = (images, targets) if training else (images,)
    stock = make_detector(make_retinanet).train(training)
    model = make_detector(make_retinanet, FACTORS).train(training)
    _, _, counter = compile_and_run(stock, args)
    graphs = counter.frame_count
    compiled, found, counter = compile_and_run(model, args)
    assert counter.frame_count == graphs
    torch.testing.assert_close(found, run(model, args))
    # Other factors are used at once, by the graphs that are there.
    patch_detector(compiled, 1.0)
    torch.testing.assert_close(run(compiled, args), run(stock, args))
    assert counter.frame_count == graphs


def test_two_stage_detectors_compile_as_stock_ones_do():
    args = (make_batch()[0][:1],)
    _, _, counter = compile_and_run(make_detector(make_faster_rcnn).eval(), args)
    graphs = counter.frame_count
    model = make_detector(make_faster_rcnn, FACTORS).eval()
    _, found, counter = compile_and_run(model, args)
    assert counter.frame_count == graphs
    torch.testing.assert_close(found, run(model, args))
