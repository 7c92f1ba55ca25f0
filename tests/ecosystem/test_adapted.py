"""Adapted and patched detectors in torch's own tools: as far as stock ones go."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from alphafpn import adapt_detector, patch_detector
from tests.detectors import make_batch
from tests.test_adapt import images, make, make_fcos, make_rcnn, make_retinanet

FACTORS = [0.5, 0.4, 0.3]
BUILDERS = [make_retinanet, make_fcos, make_rcnn]


def adapted(build=make_retinanet, alpha=FACTORS):
    """With a finer level and smaller anchors, then patched."""
    torch.manual_seed(0)
    return patch_detector(adapt_detector(make(build), 0.5, finer_level=True), alpha)


def gradients(run, model):
    model.zero_grad()
    torch.manual_seed(1)
    sum(run(*make_batch()).values()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("build", BUILDERS)
def test_scripted_agrees(build):
    model = adapted(build).eval()
    with torch.no_grad():
        _, found = torch.jit.script(model)(images())
        expected = model(images())
    assert len(expected[0]["boxes"]) > 0
    torch.testing.assert_close(found, expected)


def test_compiled_code_is_not_run_on_other_levels():
    """A backbone may be compiled, and run, before its detector is adapted and compiled."""
    testing = pytest.importorskip("torch._dynamo.testing")
    torch._dynamo.reset()
    counter, image = testing.CompileCounterWithBackend("eager"), torch.rand(1, 3, 64, 96)
    model = make().eval()
    original = model.backbone
    model.backbone = torch.compile(original, backend=counter)
    compiled = torch.compile(model, backend=counter)

    def check_maps(names):
        with torch.no_grad():
            found = model.backbone(image)
            torch.testing.assert_close(dict(found), dict(original(image)))
        assert list(found) == names

    check_maps(["0", "1", "2", "p6", "p7"])
    graphs = counter.frame_count
    assert adapt_detector(compiled, 0.5, finer_level=True) is compiled
    check_maps(["0", "1", "2", "3", "p6", "p7"])
    assert counter.frame_count == 2 * graphs > 0


@pytest.mark.parametrize("build", BUILDERS)
def test_ddp_trains_as_one_process(tmp_path, build):
    single = adapted(build)
    model = copy.deepcopy(single)
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        # The second pass fails if the first left a parameter without its gradient.
        for _ in range(2):
            found = gradients(wrapped, model)
    finally:
        dist.destroy_process_group()
    gradients(single, single)
    torch.testing.assert_close(found, gradients(single, single))
    assert found["backbone.fpn.inner_blocks.0.0.weight"].any()
