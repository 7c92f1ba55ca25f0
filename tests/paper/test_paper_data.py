"""Batches: boxes stay on their objects, and nothing but seed and step decides them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from alphafpn.tiny import ScaleMatch
from benchmarks.paper.config import Config
from benchmarks.paper.data import Batches, Split


@pytest.fixture
def config(data):
    return Config(
        train_json=str(data / "train.json"),
        images=str(data / "images"),
        size=(240, 320),
        crop=96,
        batch=4,
    )


@pytest.fixture
def split(config, tmp_path):
    return Split(config, config.train_json, str(tmp_path), erase=True)


def test_boxes_stay_on_their_objects(config, split):
    images = split.open()
    seen = 0
    for step in range(10):
        pixels, boxes, labels = Batches(split, config)(images, step)
        assert pixels.shape == (4, 96, 96, 3)
        for crop, found, kinds in zip(pixels, boxes, labels, strict=True):
            assert kinds.tolist() == [1] * len(found)
            for x1, y1, x2, y2 in found.round().int().tolist():
                inside = crop[y1:y2, x1:x2].float().mean()
                # Objects are bright on dark ground; the resize blurs their edges.
                assert inside > 110 or overlaps_an_erased_region(crop[y1:y2, x1:x2])
                seen += 1
    assert seen > 20


def overlaps_an_erased_region(part):
    return len(part.reshape(-1, 3).unique(dim=0)) < 0.9 * part.shape[0] * part.shape[1]


def test_enough_of_every_box_is_left_and_enough_is_kept(config, split):
    whole = {
        round(float(w * h), 1)
        for boxes in split.boxes
        for w, h in (boxes[:, 2:] - boxes[:, :2]).tolist()
    }
    areas = []
    for size, boxes in Batches(split, config).boxes_alone(100):
        assert size == (96, 96)
        assert (boxes >= 0).all()
        assert (boxes <= 96).all()
        sides = boxes[:, 2:] - boxes[:, :2]
        assert (sides > 1).all()
        areas += sides.prod(1).tolist()
    assert min(areas) >= 0.49 * min(whole)
    assert np.mean([round(area, 1) in whole for area in areas]) > 0.6


def test_every_image_comes_once_per_epoch_whatever_the_alpha(config, split):
    images = split.open()
    batches = Batches(split, dataclasses.replace(config, batch=5, crop=0, alpha="s-alpha"))
    first, again = (batches(images, 3)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, batches(images, 4)[0])
    known = {int(image.long().sum()) for image in images}
    assert {int(image.long().sum()) for image in first} == known


def test_devices_share_a_batch(config, split):
    images, batches = split.open(), Batches(split, config)
    whole = batches(images, 2)
    shares = [batches(images, 2, rank, 2) for rank in range(2)]
    for place in range(4):
        share = shares[place % 2]
        assert torch.equal(share[0][place // 2], whole[0][place])
        assert torch.equal(share[1][place // 2], whole[1][place])


def test_regions_to_ignore_are_painted_over_in_training_only(config, split, data, tmp_path):
    judged = Split(config, config.train_json, str(tmp_path), erase=False)
    coco = json.loads((data / "train.json").read_text())
    x, y, w, h = (2 * v for v in coco["annotations"][0]["bbox"])
    assert coco["annotations"][0]["ignore"]
    erased, kept = (
        part.open()[0, y + 2 : y + h - 2, x + 2 : x + w - 2].float().mean((0, 1))
        for part in (split, judged)
    )
    assert not torch.equal(erased, kept)
    assert [len(boxes) for boxes in split.boxes] == [5] * 5
    assert sum(bool(a["ignore"]) for a in judged.coco["annotations"]) == 5


def test_dense_images_are_left_out_unless_asked_for(config, split, tmp_path):
    dense = dataclasses.replace(config, dense=True)
    assert len(Split(dense, config.train_json, str(tmp_path), erase=True)) == len(split) + 1


def test_scale_match_makes_objects_as_small_as_the_target(config, split):
    batches = Batches(split, config, ScaleMatch([4.0] * 10, scale_range=(0.1, 1.0)))
    pixels, boxes, _ = batches(split.open(), 0)
    assert pixels.shape == (4, 96, 96, 3)
    sides = torch.cat(boxes)
    sizes = (sides[:, 2:] - sides[:, :2]).prod(1).sqrt()
    assert 3 < sizes.mean() < 5
