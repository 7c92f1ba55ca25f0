"""Scenes cut from a user's images."""

from __future__ import annotations

import json
import math

import numpy as np
from PIL import Image

from alphafpn.demo.own import own_scenes


def test_scenes_show_the_images_regions_at_the_common_scale(own):
    images, path, data = own
    for entry in data["images"]:
        shade = 100 + entry["id"]
        Image.new("RGB", (600, 400), (shade, 0, 0)).save(images / entry["file_name"])
    scale, train, val = own_scenes(images, path, 64, (100, 100))
    shades = []
    for part in (train, val):
        scenes = list(part)
        shades.append({round(float(s.pixels[0].float().mean())) // 10 for s in scenes})
        for scene in scenes:
            height, width = scene.size
            assert max(height, width) <= 64
            for x1, y1, x2, y2 in scene.boxes.tolist():
                assert -1e-4 <= x1 <= x2 <= width + 1e-4
                assert -1e-4 <= y1 <= y2 <= height + 1e-4
                assert x2 - x1 <= 32 * scale + 1e-4
    # No image is on both sides.
    assert len(shades[0] & shades[1]) == 0
    assert len(shades[1]) == 1


def test_small_objects_are_enlarged_but_at_most_doubled(own):
    images, path, data = own
    for annotation in data["annotations"]:
        annotation["bbox"][2:] = [3, 3]
    path.write_text(json.dumps(data))
    scale, _, val = own_scenes(images, path, 64, (100, 100))
    assert scale == 2
    assert all((scene.boxes[:, 2] - scene.boxes[:, 0] <= 6 + 1e-4).all() for scene in val)


def test_flagged_regions_are_painted_over_to_train_and_kept_to_evaluate(own):
    images, path, data = own
    for annotation in data["annotations"][::3]:
        annotation[("iscrowd", "ignore", "uncertain")[annotation["id"] % 3]] = 1
    path.write_text(json.dumps(data))
    _, train, val = own_scenes(images, path, 64, (100, 100))
    for scenes, painted in ((list(train), True), (list(val), False)):
        assert all(len(scene.boxes) for scene in scenes)
        flags = [m.get("ignore", 0) for scene in scenes for m in scene.marked()[1]]
        assert sum(flags) == sum(len(scene.ignored) for scene in scenes) > 0
        regions = [
            scene.pixels[:, math.ceil(y1) : int(y2), math.ceil(x1) : int(x2)].float()
            for scene in scenes
            for x1, y1, x2, y2 in scene.ignored.tolist()
        ]
        flat = [region.flatten(1).std(1).max() == 0 for region in regions]
        # A region that another one overlaps is painted twice.
        assert np.mean(flat) > 0.6 if painted else not any(flat)
