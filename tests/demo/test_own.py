"""Scenes cut from a user's images."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

from alphafpn.demo.own import own_scenes
from alphafpn.demo.scenes import SIDE


def test_scenes_show_the_images_regions_at_the_common_scale(own):
    images, path, data = own
    for entry in data["images"]:
        shade = 100 + entry["id"]
        Image.new("RGB", (600, 400), (shade, 0, 0)).save(images / entry["file_name"])
    scale, *parts = own_scenes(images, path, (100, 100))
    assert scale == 10 / 40
    shades = []
    for scenes in parts:
        shades.append({round(float(scene.pixels[..., 0].mean())) // 10 for scene in scenes})
        for scene in scenes:
            assert scene.pixels.shape == (SIDE, SIDE, 3)
            assert len(scene.boxes) > 0
            assert (scene.boxes[:, :2] >= 0).all()
            assert (scene.boxes <= SIDE).all()
            width, height = (scene.boxes[:, 2:] - scene.boxes[:, :2]).T
            np.testing.assert_allclose(width.max(), 32 * scale, rtol=0.02)
            np.testing.assert_allclose(height.max(), 50 * scale, rtol=0.02)
    # No image is on both sides.
    assert len(shades[0] & shades[1]) == 0
    assert len(shades[1]) == 1


def test_small_objects_are_enlarged_but_at_most_doubled(own):
    images, path, data = own
    for annotation in data["annotations"]:
        annotation["bbox"][2:] = [3, 3]
    path.write_text(json.dumps(data))
    scale, _, val = own_scenes(images, path, (100, 100))
    assert scale == 2
    assert all((scene.boxes[:, 2] - scene.boxes[:, 0] <= 6 + 1e-4).all() for scene in val)


def test_scenes_with_flagged_regions_are_left_out(own):
    images, path, data = own
    for image in data["images"]:
        number = image["id"] // 10
        colour = (200, 0, 0) if number < 3 else (0, 0, 200)
        Image.new("RGB", (600, 400), colour).save(images / image["file_name"])
    for annotation in data["annotations"]:
        number = annotation["image_id"] // 10
        if number < 3:
            annotation[("iscrowd", "ignore", "uncertain")[number]] = 1
    path.write_text(json.dumps(data))
    _, train, val = own_scenes(images, path, (100, 100))
    assert all(scene.pixels[0, 0, 2] > 190 for scene in (*train, *val))
    assert train
    assert val
