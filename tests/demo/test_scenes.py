"""Scenes: what is drawn, mirrored, and written as a COCO data set."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import torch
from PIL import Image

from alphafpn.demo.scenes import Family, Scene, as_coco, as_pngs, draw


def test_drawn_scenes_stay_as_they_are():
    # All records of benchmarks/scenes were made on scenes that are drawn like this one.
    (scene,) = draw(Family((0.4, 0.4, 0.4), far=True), 1, 11)
    assert len(scene.boxes) == 8
    content = scene.pixels.numpy().tobytes() + scene.boxes.numpy().tobytes()
    assert hashlib.sha256(content).hexdigest().startswith("f5a414779f1c1878")


def test_mirrored_twice_is_the_scene():
    scene = draw(Family((0.4, 0.4, 0.4), far=False), 1, 0)[0]
    scene = Scene(scene.pixels, scene.boxes, scene.labels, scene.boxes[:2] + 1)
    once = scene.mirrored()
    assert torch.equal(once.pixels, scene.pixels.flip(2))
    x1, y1, x2, y2 = scene.boxes[0].tolist()
    torch.testing.assert_close(once.boxes[0], torch.tensor([128 - x2, y1, 128 - x1, y2]))
    twice = once.mirrored()
    torch.testing.assert_close(twice.boxes, scene.boxes)
    torch.testing.assert_close(twice.ignored, scene.ignored)
    assert torch.equal(twice.pixels, scene.pixels)


def test_scenes_are_a_coco_data_set():
    pixels = torch.arange(3 * 8 * 6, dtype=torch.uint8).reshape(3, 8, 6)
    boxes = torch.tensor([[1.0, 2.0, 4.0, 7.0]])
    scene = Scene(pixels, boxes, torch.tensor([2]), boxes + 1)
    empty = Scene(pixels, boxes[:0], torch.zeros(0, dtype=torch.int64))
    coco = as_coco("val", (scene.marked() for scene in (empty, scene)), ["a", "b"])
    shape = {"width": 6, "height": 8}
    assert coco["images"] == [{"id": i, "file_name": f"val/000{i}.png"} | shape for i in (0, 1)]
    ids = {"image_id": 1, "area": 15, "iscrowd": 0}
    assert coco["annotations"] == [
        {"id": 1, "category_id": 2, "bbox": [1, 2, 3, 5]} | ids,
        {"id": 2, "category_id": 1, "bbox": [2, 3, 3, 5], "ignore": 1} | ids,
    ]
    assert [entry["name"] for entry in coco["categories"]] == ["a", "b"]
    files = as_pngs("val", [empty, scene])
    assert set(files) == {entry["file_name"] for entry in coco["images"]}
    image = Image.open(io.BytesIO(files["val/0001.png"]))
    assert np.array_equal(np.array(image), pixels.permute(1, 2, 0).numpy())
