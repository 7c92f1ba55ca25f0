"""Real images as small crops of one size: the data sets of these experiments."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from alphafpn.demo.training import as_coco

FOLDER = "ALPHAFPN_DATA"
_LEFT = 0.49  # of a box's area, for it to be kept; otherwise it is painted over, as ignored ones
_PAINT = 115  # grey value


@dataclass(frozen=True)
class Source:
    """Where a data set comes from, and what is cut from it."""

    folder: str  # below the folder of all real data
    classes: tuple[int, ...]  # category ids that become 1, 2, ...; others are painted over
    train: int  # number of crops
    val: int
    side: int = 0  # of the crops, in pixels; 0: whole images
    size: tuple[int, int] | None = None  # (width, height) that images are resized to first
    merged: bool = False  # all classes become one


SOURCES = {
    "cells4": Source("bccd", (1, 2, 3), 292, 72, size=(160, 120)),
    "cells8": Source("bccd", (1, 2, 3), 292, 72, size=(80, 60), merged=True),
    # At this size people have their proportions back, and are as large as in TinyPerson itself.
    "people": Source("tinyperson640", (1,), 240, 80, side=128, size=(1706, 960)),
    "hituav": Source("hituav", (1, 2, 3), 240, 80, side=128),
    "dots": Source("dots", (1, 2, 3, 4), 240, 80, side=128),
    "dsb2018": Source("dsb2018", (1,), 240, 80, side=128),
    "insects": Source("insects", (1,), 240, 80, side=128),
}


@dataclass(frozen=True)
class Part:
    """Images of one size with their objects."""

    pixels: Tensor  # uint8 [N, 3, H, W]
    boxes: list[Tensor]  # of each image, float32 xyxy [G_i, 4] in pixels
    labels: list[Tensor]  # of each image, int64 [G_i], from 1
    ignored: list[Tensor]  # regions that count neither for nor against a detector, as `boxes`

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of all images."""
        height, width = self.pixels.shape[-2:]
        return height, width

    def with_mirrored(self) -> Part:
        """The images, then each of them from left to right."""
        width = self.size[1]

        def both(boxes: list[Tensor]) -> list[Tensor]:
            edges = [part.unbind(1) for part in boxes]
            return boxes + [torch.stack([width - c, b, width - a, d], 1) for a, b, c, d in edges]

        pixels = torch.cat([self.pixels, self.pixels.flip(-1)])
        return Part(pixels, both(self.boxes), 2 * self.labels, both(self.ignored))

    def coco(self, classes: int) -> dict[str, Any]:
        """The objects in COCO format, and regions ignored for all classes; ids are places."""
        found: list[tuple[int, int, list[float], bool]] = []
        for image, labels in enumerate(self.labels):
            objects = zip(labels.tolist(), self.boxes[image].tolist(), strict=True)
            found += [(image, label, box, False) for label, box in objects]
            regions = itertools.product(self.ignored[image].tolist(), range(1, classes + 1))
            found += [(image, label, box, True) for box, label in regions]
        return as_coco(found, len(self.boxes), classes)


@dataclass(frozen=True)
class DataSet:
    """What a run trains on, and what it is evaluated on."""

    name: str
    train: Part  # each image, then each mirrored
    val: Part
    classes: int  # without the background
    truth: dict[str, Any]  # the objects of `val` in COCO format

    def items(self) -> list[tuple[tuple[int, int], Tensor]]:
        """What is counted: size and boxes of each image to train on."""
        return [(self.train.size, boxes) for boxes in self.train.boxes]


@functools.cache
def load(name: str) -> DataSet:
    """Reads a data set; its crops are the same for all seeds."""
    folder = os.environ.get(FOLDER)
    if not folder:
        raise ValueError(f"{FOLDER}: expected the folder of the real data, found nothing")
    source = SOURCES[name]
    classes = 1 if source.merged else len(source.classes)
    train, val = (_read(Path(folder) / source.folder, part, source) for part in ("train", "val"))
    return DataSet(name, train.with_mirrored(), val, classes, val.coco(classes))


@dataclass(frozen=True)
class _Entry:
    """An image of a file: boxes (xyxy), labels (0: not learnt) and size after the resize."""

    path: Path
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    size: tuple[int, int]
    scale: NDArray[np.float64]
    dense: bool


def _read(folder: Path, part: str, source: Source) -> Part:
    coco = json.loads((folder / f"{part}.json").read_text())
    marks = defaultdict(list)
    for mark in coco["annotations"]:
        marks[mark["image_id"]].append(mark)
    label_of = {c: 1 if source.merged else i for i, c in enumerate(source.classes, 1)}
    entries = []
    for image in coco["images"]:
        size = source.size or (image["width"], image["height"])
        scale = np.array([size[0] / image["width"], size[1] / image["height"]] * 2)
        found = marks[image["id"]]
        boxes = np.array([mark["bbox"] for mark in found], np.float64).reshape(-1, 4) * scale
        boxes[:, 2:] += boxes[:, :2]
        labels = [0 if m.get("ignore") else label_of.get(m["category_id"], 0) for m in found]
        path, dense = folder / "images" / image["file_name"], bool(image.get("dense"))
        entries.append(_Entry(path, boxes, np.array(labels, np.int64), size, scale, dense))
    crops = [_crop(*place, source, part) for place in _places(entries, source, part)]
    pixels = torch.from_numpy(np.stack([crop[0] for crop in crops])).permute(0, 3, 1, 2)
    return Part(pixels.contiguous(), *([crop[i] for crop in crops] for i in (1, 2, 3)))


def _places(entries: list[_Entry], source: Source, part: str) -> Iterator[tuple[_Entry, Any]]:
    """Images and left upper corners of the crops: around a box each, every class as often."""
    if not source.side:
        yield from ((entry, np.zeros(2)) for entry in entries)
        return
    rng = np.random.default_rng(part == "val")
    # Of dense images not all objects are marked.
    candidates = [
        (label, entry, (box[:2] + box[2:]) / 2)
        for entry in entries
        if not entry.dense
        for label, box in zip(entry.labels.tolist(), entry.boxes, strict=True)
        if label and min(box[2:] - box[:2]) > 0
    ]
    classes = sorted({label for label, _, _ in candidates})
    by_class = [[found for found in candidates if found[0] == label] for label in classes]
    for number in range(source.train if part == "train" else source.val):
        group = by_class[number % len(by_class)]
        _, entry, centre = group[rng.integers(len(group))]
        corner = centre - rng.uniform(0, source.side, 2)
        yield entry, np.clip(corner, 0, np.array(entry.size) - source.side).round()


def _crop(
    entry: _Entry, corner: Any, source: Source, part: str
) -> tuple[Any, Tensor, Tensor, Tensor]:
    """Pixels, boxes, labels and ignored regions of one crop."""
    window = (source.side, source.side) if source.side else entry.size
    inside = np.clip(entry.boxes - np.tile(corner, 2), 0, [*window, *window])
    area, whole = ((b[:, 2:] - b[:, :2]).prod(1) for b in (inside, entry.boxes))
    keep = (entry.labels > 0) & (area > 0) & (area >= _LEFT * whole)
    lost = (area > 0) & ~keep
    with Image.open(entry.path) as file:
        edges = tuple((np.concatenate([corner, corner + window]) / entry.scale).tolist())
        resized = file.convert("RGB").resize(window, Image.Resampling.BILINEAR, edges)
    pixels = np.array(resized)
    if part == "train":
        for a, b, c, d in inside[lost].tolist():
            pixels[int(b) : math.ceil(d), int(a) : math.ceil(c)] = _PAINT
    kept, ignored = (torch.tensor(inside[rows], dtype=torch.float32) for rows in (keep, lost))
    return pixels, kept, torch.from_numpy(entry.labels[keep]), ignored
