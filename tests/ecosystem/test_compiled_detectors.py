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


@pytest.mark.parametrize(
    ("build", "training"),
    [(make_retinanet, True), (make_retinanet, False), (make_faster_rcnn, False)],
)
def test_detectors_compile_as_stock_ones_do(build, training):
    images, targets = (part[:1] for part in make_batch())
    args = (images, targets) if training else (images,)
    stock = make_detector(build).train(training)
    model = make_detector(build, FACTORS).train(training)
    _, _, counter = compile_and_run(stock, args)
    graphs = counter.frame_count
    compiled, found, counter = compile_and_run(model, args)
    assert counter.frame_count == graphs
    torch.testing.assert_close(found, run(model, args))
    if build is make_retinanet:  # the other's proposals, and so its shapes, change with factors
        # Other factors are used at once, by the graphs that are there.
        patch_detector(compiled, 1.0)
        torch.testing.assert_close(run(compiled, args), run(stock, args))
        assert counter.frame_count == graphs
