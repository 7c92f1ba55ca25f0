"""timm: its backbones under torchvision's pyramid, estimated and patched."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from alphafpn.estimate.anchor_layout import AnchorLayout
from alphafpn.estimate.s_alpha import estimate_alpha, estimate_alpha_for
from alphafpn.surgery import fold_alpha, patch_detector

timm = pytest.importorskip("timm")


class TimmPyramid(nn.Module):
    def __init__(self, name: str, out_channels: int) -> None:
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=(-4, -3, -2, -1))
        channels = self.body.feature_info.channels()
        self.fpn = FeaturePyramidNetwork(channels, out_channels, LastLevelMaxPool())
        self.out_channels = out_channels

    def forward(self, x):
        return self.fpn(OrderedDict((str(i), c) for i, c in enumerate(self.body(x))))


@pytest.fixture(scope="module", params=["test_resnet", "test_convnext"])
def detector(request):
    torch.manual_seed(0)
    anchors = AnchorGenerator(tuple((8 << i,) for i in range(5)), ((0.5, 1.0, 2.0),) * 5)
    backbone = TimmPyramid(request.param, 32)
    return RetinaNet(backbone, 2, anchor_generator=anchors, min_size=160, max_size=224)


def items():
    generator = torch.Generator().manual_seed(0)
    for height, width in ((160, 200), (120, 160), (100, 100)):
        corner = torch.rand(60, 2, generator=generator) * 60
        size = 4 * torch.exp(torch.rand(60, 2, generator=generator) * 2.5)
        yield (height, width), torch.cat([corner, corner + size], 1)


def test_is_estimated_on_the_anchors_that_it_makes(detector):
    estimate = estimate_alpha_for(detector, items())
    assert estimate.num_boxes == 180
    assert estimate.level_names == ("P2", "P3", "P4", "P5", "P6")
    anchors, boxes = [], []
    for size, box in items():
        images, (target,) = detector.transform(
            [torch.zeros(3, *size)], [{"boxes": box, "labels": torch.ones(60)}]
        )
        generated = detector.anchor_generator(
            ImageList(images.tensors, images.image_sizes),
            list(detector.backbone(images.tensors).values()),
        )
        layout = AnchorLayout.from_detector(detector, size).anchors()
        torch.testing.assert_close(torch.cat(layout), generated[0], rtol=0, atol=0)
        anchors.append(layout)
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
