"""TorchGeo: its tasks and its samples, with as many channels as satellites have."""

from __future__ import annotations

import math

import pytest
import torch

from alphafpn import adapt_detector, compare_anchors, estimate_alpha_for, fold_alpha, patch_detector

trainers = pytest.importorskip("torchgeo.trainers")

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")
DETECTORS = ["faster-rcnn", "fcos", "retinanet", "mask-rcnn"]
BOXES = torch.tensor([[4.0, 4.0, 14.0, 16.0], [20.0, 20.0, 52.0, 50.0], [0.0, 30.0, 60.0, 64.0]])


def make_task(name, channels):
    torch.manual_seed(0)
    if name == "mask-rcnn":
        return trainers.InstanceSegmentationTask(name, "resnet50", None, channels, num_classes=2)
    return trainers.ObjectDetectionTask(name, "resnet18", None, channels, num_classes=2)


def make_batch(channels):
    masks = torch.zeros(len(BOXES), 64, 64, dtype=torch.uint8)
    for mask, box in zip(masks, BOXES.int().tolist(), strict=True):
        mask[box[1] : box[3], box[0] : box[2]] = 1
    labels = torch.ones(len(BOXES), dtype=torch.int64)
    return {
        "image": torch.rand(1, channels, 64, 64),
        "bbox_xyxy": [BOXES],
        "label": [labels],
        "mask": [masks],
    }


def train(task, channels):
    loss = task.train().training_step(make_batch(channels), 0)
    loss.backward()
    assert math.isfinite(loss.detach())


@pytest.mark.parametrize("channels", [1, 3, 4, 13])
@pytest.mark.parametrize("name", DETECTORS)
def test_a_task_is_counted_patched_and_trained(name, channels):
    task = make_task(name, channels)
    estimate = estimate_alpha_for(task, [((64, 64), BOXES)])
    assert estimate_alpha_for(task.model, [((64, 64), BOXES)]) == estimate
    assert estimate.num_boxes == 3
    assert patch_detector(task, estimate) is task
    train(task, channels)
    assert task.model.backbone.fpn.alpha.tolist() == pytest.approx(list(estimate))
    fold_alpha(task)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_task_is_compared_and_adapted(name):
    task = make_task(name, 4)
    comparison = compare_anchors(task, [((64, 64), BOXES)])
    # TorchGeo's transform does not resize.
    assert {row.input_scale for row in comparison.rows} == {1}
    fit = next((row for row in comparison.rows if row.finer_level), comparison.rows[-1])
    adapt_detector(task, fit)
    assert estimate_alpha_for(task, [((64, 64), BOXES)]).counts == fit.estimate.counts
    train(task, 4)


def test_samples_are_items_of_a_data_set():
    batch = make_batch(13)
    sample = {key: value[0] for key, value in batch.items()} | {"crs": "EPSG:4326"}
    task = make_task("fcos", 13)
    expected = estimate_alpha_for(task, [((64, 64), BOXES)])
    assert estimate_alpha_for(task, [sample]) == expected
    assert estimate_alpha_for(task, [sample], category_ids=[1]) == expected
    with pytest.raises(ValueError, match="category_ids among 1, found 2"):
        estimate_alpha_for(task, [sample], category_ids=[2])
