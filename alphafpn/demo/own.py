"""Scenes cut from a user's images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from alphafpn.demo.scenes import SIDE, Scene
from alphafpn.estimate.annotations import read_annotations
from alphafpn.tiny import cut_dataset, read_tile

_MEDIAN_SIZE = 10.0  # to which a user's objects are scaled, in pixels
_LARGEST_SCALE = 2.0
_HELD_OUT = 4  # one image in so many


def own_scenes(
    images: Path, annotations: Path, counts: tuple[int, int]
) -> tuple[float, list[Scene], list[Scene]]:
    """Cuts at most `counts` scenes to train on and to evaluate on; returns their scale, too.

    All images are scaled by the same factor. Each scene holds an object and nothing that is
    `iscrowd`, `ignore` or `uncertain`; no image is on both sides. Errors name the file.
    """
    boxes = read_annotations(annotations).boxes
    median = float(np.median(np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1))))
    side = math.ceil(SIDE / min(_MEDIAN_SIZE / median, _LARGEST_SCALE))
    cut = cut_dataset(annotations, tile_size=(side, side), overlap=(0, 0), keep_empty=False)
    objects: dict[int, list[list[float]]] = {}
    flagged = set()
    for entry in cut["annotations"]:
        objects.setdefault(entry["image_id"], []).append(entry["bbox"])
        if any(entry.get(flag) for flag in ("iscrowd", "ignore", "uncertain")):
            flagged.add(entry["image_id"])
    tiles: dict[int, list[dict[str, Any]]] = {}
    for tile in cut["images"]:
        image = tile["original_image_id"]
        if not isinstance(tile.get("file_name"), str):
            raise ValueError(f"{annotations}: image {image}: expected a file_name, found none")
        if tile["id"] not in flagged:
            tiles.setdefault(image, []).append(tile)
    if len(tiles) < 2:
        raise ValueError(
            f"{annotations}: expected at least 2 images with objects, found {len(tiles)}"
        )

    rng = np.random.default_rng(0)
    order = rng.permutation(sorted(tiles)).tolist()
    num_held_out = max(1, len(order) // _HELD_OUT)
    scale, parts = SIDE / side, []
    for part, count in zip((order[num_held_out:], order[:num_held_out]), counts, strict=True):
        pool = [tile for image in part for tile in tiles[image]]
        chosen = [pool[i] for i in rng.permutation(len(pool))[:count].tolist()]
        parts.append([_scene(tile, objects[tile["id"]], images, scale) for tile in chosen])
    return scale, parts[0], parts[1]


def _scene(tile: dict[str, Any], objects: list[list[float]], images: Path, scale: float) -> Scene:
    """Scales a tile and pads it with its mean colour."""
    from PIL import Image

    part = read_tile(tile, images)
    width, height = (max(1, round(scale * length)) for length in part.size)
    scaled = np.asarray(part.resize((width, height), Image.Resampling.BILINEAR))
    pixels = np.empty((SIDE, SIDE, 3), np.uint8)
    pixels[:] = scaled.mean((0, 1))
    pixels[:height, :width] = scaled
    boxes = np.array(objects) * np.tile([width / part.width, height / part.height], 2)
    boxes[:, 2:] += boxes[:, :2]
    return Scene(pixels, boxes.astype(np.float32))
