"""Adapted detectors in LightningModules, and with timm's backbones."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from alphafpn import adapt_detector, patch_detector
from tests.detectors import make_batch
from tests.test_adapt import make

FACTORS = [0.5, 0.4, 0.3]

# Lightning


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_lightning_resumes_as_if_never_stopped(tmp_path):
    lightning = pytest.importorskip("lightning")
    from tests.clients.test_lightning import make_trainer

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
