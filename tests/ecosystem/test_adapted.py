"""Adapted and patched detectors in other tools: as far as stock ones go."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from alphafpn import adapt_detector, fold_alpha, patch_detector
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


# torch


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


@pytest.mark.filterwarnings("ignore:.*create_unbacked_symint:FutureWarning")
def test_compiled_code_is_not_run_on_other_levels():
    """The detector may be compiled before it is adapted; it takes no more graphs than before."""
    testing = pytest.importorskip("torch._dynamo.testing")
    torch._dynamo.reset()
    counter = testing.CompileCounterWithBackend("eager")
    model = make().eval()
    compiled, graphs = torch.compile(model, backend=counter), 0
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(compiled(images()[:1]), model(images()[:1]))
        graphs = graphs or counter.frame_count
        if len(model.backbone.fpn.inner_blocks) == 3:
            assert adapt_detector(compiled, 0.5, finer_level=True) is compiled
    assert len(model.backbone.fpn.inner_blocks) == 4
    assert 0 < graphs <= counter.frame_count <= 2 * graphs


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


def test_averaged_models_are_adapted_as_their_own():
    swa = torch.optim.swa_utils
    model = adapted()
    averaged = swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    averaged.update_parameters(model)
    for name, tensor in averaged.module.named_parameters():
        torch.testing.assert_close(tensor, 1.5 * model.get_parameter(name))
    anchors = averaged.module.anchor_generator.cell_anchors
    torch.testing.assert_close(anchors, model.anchor_generator.cell_anchors)
    unadapted = swa.AveragedModel(make())
    assert adapt_detector(unadapted, 0.5) is unadapted
    assert unadapted.module.anchor_generator.sizes[0] == (8.0,)


# ONNX


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("build", BUILDERS)
def test_exported_to_onnx_agrees(tmp_path, build, fold):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from tests.ecosystem.test_onnx import export, run

    model = adapted(build).eval()
    model = fold_alpha(model) if fold else model
    scenes = [torch.rand(3, 64, 64, generator=torch.manual_seed(i)) for i in range(2)]
    export(model, ([scenes[0]],), tmp_path / "detector.onnx", dynamo=False)
    found = run(tmp_path / "detector.onnx", scenes[1:])
    with torch.no_grad():
        (expected,) = model(scenes[1:])
    assert len(expected["scores"]) > 0
    for x, y in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


# Lightning


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_lightning_resumes_as_if_never_stopped(tmp_path):
    lightning = pytest.importorskip("lightning")
    from tests.ecosystem.test_lightning import make_trainer

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.detector = make()
            torch.manual_seed(0)
            # The call is in the script, as a checkpoint knows no anchors.
            assert adapt_detector(self, 0.5, finer_level=True) is self
            patch_detector(self, FACTORS)

        def training_step(self, batch, index):
            torch.manual_seed(index)
            return sum(self.detector(*batch).values())

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-3)

    def fit(module, steps, **options):
        trainer = make_trainer(tmp_path, steps)
        trainer.fit(module, DataLoader([make_batch()] * 4, batch_size=None), **options)
        return trainer

    whole, half, resumed = Module(), Module(), Module()
    start = copy.deepcopy(whole.state_dict())
    fit(whole, 4)
    fit(half, 2).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, 4, ckpt_path=tmp_path / "half.ckpt")
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    new = "detector.backbone.fpn.inner_blocks.0.0.weight"
    assert not torch.equal(start[new], whole.state_dict()[new])
    with pytest.raises(RuntimeError, match=r"Unexpected key.*fpn\.inner_blocks\.3"):
        make().load_state_dict(whole.detector.state_dict())


# timm


def with_timm(backbone):
    anchors = AnchorGenerator(tuple((8 << i,) for i in range(4)), ((1.0,),) * 4)
    return RetinaNet(backbone, 2, anchor_generator=anchors, min_size=64, max_size=96)


def test_timm_pyramids_take_a_scale_and_a_finer_level_if_the_body_allows_it():
    timm = pytest.importorskip("timm")

    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = timm.create_model("test_resnet", features_only=True, out_indices=(2, 3, 4))
            channels = self.body.feature_info.channels()
            self.fpn, self.out_channels = FeaturePyramidNetwork(channels, 8, LastLevelMaxPool()), 8

        def forward(self, x):
            return self.fpn(OrderedDict((str(i), c) for i, c in enumerate(self.body(x))))

    model = with_timm(Pyramid())
    adapt_detector(model, 0.5)
    assert model.anchor_generator.sizes[0] == (4.0,)
    with pytest.raises(ValueError, match=r"^finer_level: .* found FeatureListNet$"):
        adapt_detector(model, 1, finer_level=True)

    body = timm.create_model("test_resnet")
    names = {f"layer{i}": str(i - 2) for i in (2, 3, 4)}
    channels = [info["num_chs"] for info in body.feature_info[-3:]]
    model = with_timm(BackboneWithFPN(body, names, channels, 8))
    adapt_detector(model, 1, finer_level=True)
    maps = model.backbone(torch.rand(1, 3, 64, 64))
    assert [m.shape[-1] for m in maps.values()] == [16, 8, 4, 2, 1]
