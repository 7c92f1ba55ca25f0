"""Real images as small crops of one size: the data sets of these experiments."""

from __future__ import annotations

import functools
import json
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

FOLDER = "ALPHAFPN_DATA"
_LEFT = 0.49  # of a box's area, for it to be kept; otherwise it is painted over, as ignored ones
_PAINT = 115  # grey value


@dataclass(frozen=True)
class Source:
    """Where a data set comes from, and what is cut from it.

    Attributes:
        folder: Below the folder of all real data.
        classes: Category ids that are learnt; others are painted over. They become 1, 2, ...
        train: Number of crops to train on.
        val: Number of crops to evaluate on.
        side: Of the crops, in pixels; 0: whole images.
        size: (width, height) that each image is resized to first; None: as it is.
        merged: Whether all classes become one.
    """

    folder: str
    classes: tuple[int, ...]
    train: int
    val: int
    side: int = 0
    size: tuple[int, int] | None = None
    merged: bool = False


SOURCES = {
    "cells4": Source("bccd", (1, 2, 3), 292, 72, size=(160, 120)),
    "cells8": Source("bccd", (1, 2, 3), 292, 72, size=(80, 60), merged=True),
    # At this size people have their proportions back, and are as large as in TinyPerson itself.
    "people": Source("tinyperson640", (1,), 240, 80, side=128, size=(1706, 960)),
    "hituav": Source("hituav", (1, 2, 3), 240, 80, side=128),
    "dots": Source("dots", (1, 2, 3, 4), 240, 80, side=128),
    "dsb2018": Source("dsb2018", (1,), 240, 80, side=128),
    "insects": Source("insects", (1,), 240, 80, side=128),
    # To train a detector on objects that stock anchors fit.
    "cells2": Source("bccd", (1, 2, 3), 292, 72, size=(320, 240)),
}


@dataclass(frozen=True)
class Part:
    """Images of one size with their objects.

    Attributes:
        pixels: Uint8 [N, 3, H, W].
        boxes: Of each image, float32 xyxy [G_i, 4] in pixels.
        labels: Of each image, int64 [G_i], from 1.
        ignored: Regions of each image that count neither for nor against a detector, as `boxes`.
    """

    pixels: Tensor
    boxes: list[Tensor]
    labels: list[Tensor]
    ignored: list[Tensor]

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
        """The objects and ignored regions in COCO format; an image's id is its place."""
        height, width = self.size
        annotations: list[dict[str, Any]] = []
        for index in range(len(self.boxes)):
            labels = self.labels[index].tolist()
            groups = [(self.boxes[index], labels, False)]
            # A region is ignored for every class.
            for label in range(1, classes + 1):
                regions = self.ignored[index]
                groups.append((regions, [label] * len(regions), True))
            for boxes, names, ignore in groups:
                for (x1, y1, x2, y2), label in zip(boxes.tolist(), names, strict=True):
                    annotations.append(
                        {
                            "id": len(annotations) + 1,
                            "image_id": index,
                            "category_id": label,
                            "bbox": [x1, y1, x2 - x1, y2 - y1],
                            "area": (x2 - x1) * (y2 - y1),
                            "ignore": ignore,
                            "iscrowd": 0,
                        }
                    )
        images = [{"id": i, "width": width, "height": height} for i in range(len(self.boxes))]
        names = [{"id": label, "name": str(label)} for label in range(1, classes + 1)]
        return {"images": images, "annotations": annotations, "categories": names}


@dataclass(frozen=True)
class DataSet:
    """What a run trains on, and what it is evaluated on.

    Attributes:
        name: What records call it.
        train: To train on: each image, then each mirrored.
        val: To evaluate on.
        classes: How many, without the background.
        truth: The objects of `val` in COCO format.
    """

    name: str
    train: Part
    val: Part
    classes: int
    truth: dict[str, Any]

    def items(self) -> list[tuple[tuple[int, int], Tensor]]:
        """What is counted: size and boxes of each image to train on."""
        return [(self.train.size, boxes) for boxes in self.train.boxes]


@functools.cache
def load(name: str) -> DataSet:
    """Reads a data set; its crops are the same for all seeds.

    Raises:
        ValueError: If there is none of that name, or the folder of the data is not known.
    """
    if name not in SOURCES:
        raise ValueError(f"data: expected one of {', '.join(SOURCES)}, found {name!r}")
    folder = os.environ.get(FOLDER)
    if not folder:
        raise ValueError(f"{FOLDER}: expected the folder of the real data, found nothing")
    source = SOURCES[name]
    train, val = (_read(Path(folder) / source.folder, part, source) for part in ("train", "val"))
    classes = 1 if source.merged else len(source.classes)
    return DataSet(name, train.with_mirrored(), val, classes, val.coco(classes))


def _read(folder: Path, part: str, source: Source) -> Part:
    coco = json.loads((folder / f"{part}.json").read_text())
    marks = defaultdict(list)
    for mark in coco["annotations"]:
        marks[mark["image_id"]].append(mark)
    label_of = {c: 1 if source.merged else i for i, c in enumerate(source.classes, 1)}
    rng = np.random.default_rng(part == "val")
    crops: list[tuple[NDArray[np.uint8], Tensor, Tensor, Tensor]] = []
    for index, corner in _places(coco["images"], marks, label_of, source, part, rng):
        entry = coco["images"][index]
        size = source.size or (entry["width"], entry["height"])
        scale = np.array([size[0] / entry["width"], size[1] / entry["height"]] * 2)
        found = marks[entry["id"]]
        boxes = np.array([mark["bbox"] for mark in found], np.float64).reshape(-1, 4) * scale
        boxes[:, 2:] += boxes[:, :2]
        window = (source.side, source.side) if source.side else size
        left, top = corner
        inside = np.clip(boxes - [left, top, left, top], 0, [*window, *window])
        area = np.prod(inside[:, 2:] - inside[:, :2], axis=1)
        share = area / np.maximum(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), 1e-9)
        learnt = np.array([_learnt(mark, label_of) for mark in found], bool)
        keep, lost = learnt & (share >= _LEFT), area > 0
        lost &= ~keep
        with Image.open(folder / "images" / entry["file_name"]) as file:
            edges = np.array([left, top, left + window[0], top + window[1]]) / scale
            crop = file.convert("RGB").resize(
                window, Image.Resampling.BILINEAR, tuple(edges.tolist())
            )
        pixels = np.array(crop)
        if part == "train":
            for a, b, c, d in _whole(inside[lost]):
                pixels[b:d, a:c] = _PAINT
        labels = [label_of[mark["category_id"]] for mark, k in zip(found, keep, strict=True) if k]
        kept, ignored = (torch.tensor(inside[rows], dtype=torch.float32) for rows in (keep, lost))
        crops.append((pixels, kept, torch.tensor(labels, dtype=torch.int64), ignored))
    pixels = torch.from_numpy(np.stack([crop[0] for crop in crops])).permute(0, 3, 1, 2)
    return Part(pixels.contiguous(), *([crop[i] for crop in crops] for i in (1, 2, 3)))


def _places(
    images: list[dict[str, Any]],
    marks: dict[Any, list[dict[str, Any]]],
    label_of: dict[int, int],
    source: Source,
    part: str,
    rng: np.random.Generator,
) -> list[tuple[int, tuple[float, float]]]:
    """Images and left upper corners of the crops: around a box each, every class as often."""
    if not source.side:
        return [(index, (0.0, 0.0)) for index in range(len(images))]
    candidates: dict[int, list[tuple[int, NDArray[np.float64], tuple[int, int]]]] = {}
    for index, entry in enumerate(images):
        size = source.size or (entry["width"], entry["height"])
        scale = np.array([size[0] / entry["width"], size[1] / entry["height"]])
        # Images with too many people to mark them all.
        for mark in [] if entry.get("dense") else marks[entry["id"]]:
            if _learnt(mark, label_of):
                x, y, width, height = mark["bbox"]
                centre = np.array([x + width / 2, y + height / 2]) * scale
                found = candidates.setdefault(label_of[mark["category_id"]], [])
                found.append((index, centre, size))
    places = []
    for number in range(source.train if part == "train" else source.val):
        group = candidates[sorted(candidates)[number % len(candidates)]]
        index, centre, (width, height) = group[rng.integers(len(group))]
        limits = [width - source.side, height - source.side]
        left, top = np.clip(centre - rng.uniform(0, source.side, 2), 0, limits).round()
        places.append((index, (float(left), float(top))))
    return places


def _learnt(mark: dict[str, Any], label_of: dict[int, int]) -> bool:
    return not mark.get("ignore") and mark["category_id"] in label_of and min(mark["bbox"][2:]) > 0


def _whole(boxes: NDArray[np.float64]) -> list[list[int]]:
    outer = np.concatenate([np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])], 1)
    found: list[list[int]] = outer.astype(int).tolist()
    return found
