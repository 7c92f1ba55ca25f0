"""Scenes for the demo: drawn, or cut from a user's images, and written as a COCO data set."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alphafpn.estimate.annotations.read import read_annotations
from alphafpn.tiny import cut_dataset, read_tile

Pixels: TypeAlias = NDArray[np.uint8]  # [H, W, 3]
Marks: TypeAlias = list[dict[str, Any]]  # COCO annotations: `bbox`, and `ignore` where it is set
Scene: TypeAlias = tuple[Pixels, Marks]
Tensors: TypeAlias = tuple[Tensor, Tensor]  # image [3, H, W] from 0 to 1, boxes [N, 4] as xyxy

_MEDIAN_SIZE = 10.0  # to which a user's objects are scaled, in pixels
_LARGEST_SCALE = 2.0
_HELD_OUT = 4  # one image in so many


def drawn_scenes(count: int, side: int, seed: int) -> Iterator[Scene]:
    """Square scenes with figures, in about TinyPerson's sizes, among things that look like them."""
    for index in range(count):
        yield _draw(np.random.default_rng((seed, index)), side)


def _draw(rng: np.random.Generator, side: int) -> Scene:
    image = np.full((side, side, 3), 0.45)
    for cells in (3, 8, 20, 48):
        image += rng.normal(0, 0.05, 3) + 0.06 * _cloud(rng, cells, side)[..., None]
    count = 2 * int(rng.integers(8, 17))
    sizes = np.exp(rng.normal(np.log(8.5), 1.05, 20 * count))
    sizes = sizes[(sizes >= 4) & (sizes <= 0.6 * side)][:count]
    marks: Marks = []
    for size in sorted(sizes.tolist(), reverse=True):
        is_figure = rng.random() < 0.5
        aspect = math.sqrt(rng.uniform(1.2, 2.2))
        w, h = size / aspect, size * aspect
        if not is_figure and rng.random() < 0.5:
            w, h = h, w
        left, top = rng.uniform(0, side - w), rng.uniform(0, side - h)
        rows, columns = (slice(int(a), int(a + n) + 1) for a, n in ((top, h), (left, w)))
        region = image[rows, columns]
        y, x = np.mgrid[rows, columns][:, : region.shape[0], : region.shape[1]] + 0.5
        u, v = (x - left) / w * 2 - 1, (y - top) / h * 2 - 1
        # A figure is light above and dark below, or the reverse; other things are of one tone, or
        # split from left to right.
        if is_figure:
            shade = np.tanh(3 * v + 0.6)
            marks.append({"bbox": [left, top, w, h]})
        else:
            shade = np.tanh(3 * u) if rng.random() < 0.5 else np.ones_like(u)
        tone = rng.choice([-1, 1]) * rng.uniform(0.14, 0.3) + rng.normal(0, 0.03, 3)
        edge = (1 - np.abs(u) ** 2.5 - np.abs(v) ** 2.5) * min(w, h) / 4
        cover = np.clip(edge + 0.5, 0, 1)[..., None]
        region += cover * (shade[..., None] * tone + rng.normal(0, 0.05, region.shape))
    image += rng.normal(0, 0.035, image.shape)
    return (image.clip(0, 1) * 255).astype(np.uint8), marks


def _cloud(rng: np.random.Generator, cells: int, side: int) -> NDArray[np.float64]:
    """Noise [side, side]: `cells` random values to a side, linear between them."""
    nodes = rng.normal(size=(cells + 2, cells + 2))
    position = np.linspace(0, cells, side)
    low = position.astype(int)
    part = position - low
    rows = nodes[low] * (1 - part[:, None]) + nodes[low + 1] * part[:, None]
    cloud: NDArray[np.float64] = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    return cloud


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
        factors = np.tile(np.divide((width, height), whole.size), 2)
        marks = [mark | {"bbox": (mark["bbox"] * factors).tolist()} for mark in tile["marks"]]
        for mark in marks:
            if paint and "ignore" in mark:
                x, y, w, h = mark["bbox"]
                region = pixels[int(y) : math.ceil(y + h), int(x) : math.ceil(x + w)]
                region[:] = region.mean((0, 1))
        yield pixels, marks


def as_coco(name: str, scenes: list[Scene]) -> dict[str, Any]:
    """A COCO data set of the scenes, with files in the folder `name`."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, (pixels, marks) in enumerate(scenes):
        height, width = pixels.shape[:2]
        file = {"file_name": f"{name}/{index:04}.png", "width": width, "height": height}
        images.append({"id": index} | file)
        for mark in marks:
            ids = {"id": len(annotations) + 1, "image_id": index, "category_id": 1}
            annotations.append(ids | mark)
    categories = [{"id": 1, "name": "object"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def as_tensors(scenes: list[Scene]) -> list[Tensors]:
    """The scenes as the detector takes them, without boxes to ignore."""
    tensors = []
    for pixels, marks in scenes:
        found = [mark["bbox"] for mark in marks if "ignore" not in mark]
        boxes = torch.tensor(found, dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        tensors.append((torch.from_numpy(pixels).permute(2, 0, 1) / 255, boxes))
    return tensors


def write_scenes(folder: Path, name: str, scenes: list[Scene]) -> Path:
    """Writes the images, and then the annotations as `name.json`, whose path it returns."""
    from PIL import Image

    (folder / name).mkdir(parents=True, exist_ok=True)
    coco = as_coco(name, scenes)
    for entry, (pixels, _) in zip(coco["images"], scenes, strict=True):
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "PNG")
        write(folder / entry["file_name"], png.getvalue())
    write(folder / f"{name}.json", json.dumps(coco).encode())
    return folder / f"{name}.json"


def write(path: Path, content: bytes) -> None:
    """Writes a file so that it is never half there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
