"""timm: its backbones under torchvision's pyramid, estimated and patched."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from alphafpn.adapt import adapt_detector
from alphafpn.estimate.anchor_layout import AnchorLayout
from alphafpn.estimate.s_alpha import estimate_alpha, estimate_alpha_for
from alphafpn.surgery import fold_alpha, patch_detector

timm = pytest.importorskip("timm")


class TimmPyramid(nn.Module):
    def __init__(self, name, out_channels, out_indices=(-4, -3, -2, -1)):
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=out_indices)
        channels = self.body.feature_info.channels()
        self.fpn = FeaturePyramidNetwork(channels, out_channels, LastLevelMaxPool())
        self.out_channels = out_channels

    def forward(self, x):
        return self.fpn(OrderedDict((str(i), c) for i, c in enumerate(self.body(x))))


def make_detector(backbone, levels=5):
    anchors = AnchorGenerator(tuple((8 << i,) for i in range(levels)), ((0.5, 1.0, 2.0),) * levels)
    return RetinaNet(backbone, 2, anchor_generator=anchors, min_size=160, max_size=224)


@pytest.fixture(scope="module", params=["test_resnet", "test_convnext"])
def detector(request):
    torch.manual_seed(0)
    return make_detector(TimmPyramid(request.param, 32))


def items():
    generator = torch.Generator().manual_seed(0)
    for size in ((160, 200), (120, 160), (100, 100)):
        corner = torch.rand(60, 2, generator=generator) * 60
        sides = 4 * torch.exp(torch.rand(60, 2, generator=generator) * 2.5)
        yield size, torch.cat([corner, corner + sides], 1)


def test_is_estimated_on_the_anchors_that_it_makes(detector):
    estimate = estimate_alpha_for(detector, items())
    assert estimate.level_names == ("P2", "P3", "P4", "P5", "P6")
    anchors, boxes = [], []
    for size, box in items():
        targets = [{"boxes": box, "labels": torch.ones(len(box))}]
        images, (target,) = detector.transform([torch.zeros(3, *size)], targets)
        maps = list(detector.backbone(images.tensors).values())
        anchors.append(AnchorLayout.from_detector(detector, size).anchors())
        assert torch.equal(torch.cat(anchors[-1]), detector.anchor_generator(images, maps)[0])
        boxes.append(target["boxes"])
    assert estimate_alpha(anchors, boxes).counts == estimate.counts
    assert min(estimate.counts[:4]) > 0


def test_is_patched_and_folded(detector):
    estimate = estimate_alpha_for(detector, items())
    image = torch.rand(1, 3, 160, 192, generator=torch.manual_seed(0))
    with torch.no_grad():
        stock = detector.backbone(image)
        patched = patch_detector(detector, estimate).backbone(image)
        assert detector.backbone.fpn.alpha.tolist() == pytest.approx(list(estimate))
        assert not torch.allclose(patched["0"], stock["0"], rtol=1e-3)
        assert torch.equal(patched["3"], stock["3"])
        torch.testing.assert_close(fold_alpha(detector).backbone(image), patched)


def test_takes_a_scale_and_a_finer_level_if_the_body_allows_it():
    model = make_detector(TimmPyramid("test_resnet", 8, (2, 3, 4)), levels=4)
    adapt_detector(model, 0.5)
    assert model.anchor_generator.sizes[0] == (4.0,)
    with pytest.raises(ValueError, match=r"^finer_level: .* found FeatureListNet$"):
        adapt_detector(model, 1, finer_level=True)

    body = timm.create_model("test_resnet")
    names = {f"layer{i}": str(i - 2) for i in (2, 3, 4)}
    channels = [info["num_chs"] for info in body.feature_info[-3:]]
    model = make_detector(BackboneWithFPN(body, names, channels, 8), levels=4)
    adapt_detector(model, 1, finer_level=True)
    maps = model.backbone(torch.rand(1, 3, 64, 64))
    assert [m.shape[-1] for m in maps.values()] == [16, 8, 4, 2, 1]
