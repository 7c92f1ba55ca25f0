"""DeepForest: its LightningModule, its detector and its data set."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torchvision

from alphafpn import adapt_detector, compare_anchors, estimate_alpha_for, patch_detector

deepforest = pytest.importorskip("deepforest")
main = pytest.importorskip("deepforest.main")
retinanet = pytest.importorskip("deepforest.models.retinanet")
training = pytest.importorskip("deepforest.datasets.training")

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")


@pytest.fixture
def module(monkeypatch):
    """As `deepforest()` makes it, but with random weights, as nothing is downloaded."""
    builder = torchvision.models.detection.retinanet_resnet50_fpn
    monkeypatch.setattr(
        torchvision.models.detection,
        "retinanet_resnet50_fpn",
        functools.partial(builder, weights_backbone=None),
    )
    torch.manual_seed(0)
    model = retinanet.RetinaNetHub(num_classes=1, label_dict={"Tree": 0})
    return main.deepforest(model=model, config_args={"log_root": "."})


@pytest.fixture
def dataset():
    path = deepforest.get_data("OSBS_029.csv")
    return training.BoxDataset(path, deepforest.get_data("."), augmentations=[])


def test_the_module_is_counted_on_its_data_set(module, dataset):
    image, target, _ = dataset[0]
    expected = estimate_alpha_for(module.model, [(image.shape[-2:], target["boxes"])])
    assert expected.num_boxes == len(target["boxes"]) > 20
    assert estimate_alpha_for(module, dataset) == expected
    assert estimate_alpha_for(module, dataset, category_ids=[0]).counts == expected.counts


def test_the_module_is_adapted_patched_and_trained(module, dataset):
    comparison = compare_anchors(module, dataset)
    assert len(comparison.rows) == 5
    adapt_detector(module, 0.5)
    patch_detector(module, 0.5)
    image = dataset[0][0][:, :96, :96]
    boxes = torch.tensor([[3.0, 3.0, 30.0, 40.0], [50.0, 20.0, 90.0, 60.0]])
    module.model.transform.min_size = (96,)
    target = {"boxes": boxes, "labels": torch.zeros(2, dtype=torch.int64)}
    losses = module.train().model([image], [target])
    loss = sum(losses.values())
    loss.backward()
    assert math.isfinite(loss.detach())
