"""Scenes cut from a user's images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alphafpn.demo.scenes import Marks, Scene
from alphafpn.estimate.annotations import read_annotations
from alphafpn.tiny import cut_dataset, read_tile

_MEDIAN_SIZE = 10.0  # to which a user's objects are scaled, in pixels
_LARGEST_SCALE = 2.0
_HELD_OUT = 4  # one image in so many


def own_scenes(
    images: Path, annotations: Path, side: int, counts: tuple[int, int]
) -> tuple[float, Iterator[Scene], Iterator[Scene]]:
    """Scenes cut from a user's images, those to train on and those to evaluate on.

    Args:
        images: Folder with the images that `annotations` names.
        annotations: COCO-format JSON.
        side: Of a scene, in pixels; scenes of small images are smaller.
        counts: Of the scenes, at most. Each holds an object, and no image is on both sides.

    Returns:
        How much images are scaled, and the scenes.

    Raises:
        ValueError: If the annotations are malformed or too few. Files are opened later, and raise
            what `read_tile` raises.
    """
    boxes = read_annotations(annotations).boxes
    median = float(np.median(np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1))))
    whole = math.ceil(side / min(_MEDIAN_SIZE / median, _LARGEST_SCALE))
    cut = cut_dataset(annotations, tile_size=(whole, whole), overlap=(0, 0), keep_empty=False)
    marks: dict[int, Marks] = {}
    for entry in cut["annotations"]:
        flagged = any(entry.get(flag) for flag in ("iscrowd", "ignore", "uncertain"))
        mark = {"bbox": entry["bbox"]} | ({"ignore": True} if flagged else {})
        marks.setdefault(entry["image_id"], []).append(mark)
    tiles: dict[int, list[dict[str, Any]]] = {}
    for tile in cut["images"]:
        if all("ignore" in mark for mark in marks[tile["id"]]):
            continue
        image = tile["original_image_id"]
        if not isinstance(tile.get("file_name"), str):
            raise ValueError(f"{annotations}: image {image}: expected a file_name, found none")
        tiles.setdefault(image, []).append(tile | {"marks": marks[tile["id"]]})
    if len(tiles) < 2:
        found = f"found {len(tiles)}"
        raise ValueError(f"{annotations}: expected at least 2 images with objects, {found}")

    rng = np.random.default_rng(0)
    order = rng.permutation(sorted(tiles)).tolist()
    val = max(1, len(order) // _HELD_OUT)
    chosen = []
    for part, count in zip((order[val:], order[:val]), counts, strict=True):
        pool = [tile for image in part for tile in tiles[image]]
        chosen.append([pool[i] for i in rng.permutation(len(pool))[:count].tolist()])
    scale = side / whole
    train, held_out = (
        _cut(part, images, scale, paint=paint)
        for part, paint in zip(chosen, (True, False), strict=True)
    )
    return scale, train, held_out


def _cut(
    tiles: list[dict[str, Any]], images: Path, scale: float, *, paint: bool
) -> Iterator[Scene]:
    from PIL import Image

    for tile in tiles:
        whole = read_tile(tile, images)
        width, height = (max(1, round(scale * length)) for length in whole.size)
        pixels = np.array(whole.resize((width, height), Image.Resampling.BILINEAR))
        factors = torch.tensor([width, height]) / torch.tensor(whole.size)
        boxes = torch.tensor([mark["bbox"] for mark in tile["marks"]]) * factors.repeat(2)
        boxes[:, 2:] += boxes[:, :2]
        flagged = torch.tensor(["ignore" in mark for mark in tile["marks"]])
        objects, ignored = boxes[~flagged], boxes[flagged]
        for x1, y1, x2, y2 in ignored.tolist() if paint else ():
            region = pixels[int(y1) : math.ceil(y2), int(x1) : math.ceil(x2)]
            region[:] = region.mean((0, 1))
        labels = torch.ones(len(objects), dtype=torch.int64)
        yield Scene(torch.from_numpy(pixels).permute(2, 0, 1), objects, labels, ignored)
