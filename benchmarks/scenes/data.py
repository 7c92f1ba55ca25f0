"""Data sets of the experiments: drawn scenes, real blood cells at several sizes, real people."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alphafpn.demo.detector import DEVIATION, DRAWN_RATIOS, DRAWN_SIZES, MEAN, Levels
from alphafpn.demo.scenes import Family, Scene, as_coco, draw

DATA = "ALPHAFPN_DATA"
TRAIN, VAL = 320, 160  # scenes of a drawn data set
_VAL_SEED = 1_000_000
_MULTIPLE = 32
CROPS, VAL_CROPS = 640, 200  # of people
_PEOPLE_WIDTH, _PEOPLE_HEIGHT = 1706, 960
_LEFT = 0.49  # of a box's area, for it to be kept; else it is painted over, as ignored ones are

CELL_SIZES: Levels = tuple(
    tuple(size * 2 ** (octave / 3) for octave in range(3)) for size in (8, 16, 32, 64, 128)
)


@dataclass(frozen=True)
class DataSet:
    """What a run trains on and is judged on.

    Attributes:
        name: What results call it.
        train: To train on. All are of one size.
        val: To be judged on.
        truth: The objects of `val` in COCO format.
        classes: How many there are.
        sizes: Anchor sizes by level.
        ratios: Aspect ratios of the anchors, height over width.
    """

    name: str
    train: Sequence[Scene]
    val: Sequence[Scene]
    truth: dict[str, Any]
    classes: int
    sizes: Levels
    ratios: tuple[float, ...]

    @functools.cached_property
    def images(self) -> Tensor:
        """Pixels as the network sees them: each image, then each mirrored, padded [2N, 3, H, W]."""
        pixels = torch.stack([scene.pixels for scene in self.train])
        both = torch.cat([pixels, pixels.flip(-1)])
        height, width = (-(-side // _MULTIPLE) * _MULTIPLE for side in both.shape[-2:])
        images = torch.zeros(len(both), 3, height, width)
        images[..., : both.shape[-2], : both.shape[-1]] = (both / 255 - MEAN) / DEVIATION
        return images.contiguous(memory_format=torch.channels_last)

    @functools.cached_property
    def boxes(self) -> list[Tensor]:
        """Objects of `images`, xyxy [G_i, 4] each."""
        mirrored = (scene.mirrored() for scene in self.train)
        return [scene.boxes for scene in (*self.train, *mirrored)]

    @functools.cached_property
    def labels(self) -> list[Tensor]:
        """Classes of `boxes`, from 1."""
        return 2 * [scene.labels for scene in self.train]

    def items(self) -> list[tuple[tuple[int, int], Tensor]]:
        """What S-alpha is counted from: sizes and boxes of the images to train on."""
        return [(scene.size, scene.boxes) for scene in self.train]


def load(name: str, seed: int) -> DataSet:
    """Makes the data set of a name.

    Args:
        name: `near .2/.2/.2` or `far .2/.8/.8`, see `Family`; or `cells /5` for all three classes
            at a fifth of their size, `cells /5 one class` for all as one; or `people 160` for
            crops of that side from TinyPerson's images.
        seed: Of the drawn scenes, or of the crops, to train on. Those to be judged on are the
            same for all seeds.

    Raises:
        ValueError: If there is none of that name, or real images are asked for without the
            folder that holds them in `ALPHAFPN_DATA`.
    """
    kind, _, rest = name.partition(" ")
    try:
        if kind == "people":
            return _people(name, int(rest), seed)
        if kind == "cells":
            divisor, _, merged = rest.removeprefix("/").partition(" ")
            return _cells(name, int(divisor), one_class=bool(merged))
        far = {"near": False, "far": True}[kind]
        a, b, c = (float(ratio) for ratio in rest.split("/"))
    except (KeyError, ValueError) as error:
        if DATA in str(error):
            raise
        raise ValueError(f"no data set is named {name!r}") from None
    return _drawn(Family((a, b, c), far), seed)


def _drawn(family: Family, seed: int) -> DataSet:
    val = draw(family, VAL, _VAL_SEED)
    truth = _coco(val, 1)
    train = draw(family, TRAIN, seed)
    return DataSet(family.name, train, val, truth, 1, DRAWN_SIZES, DRAWN_RATIOS)


def _cells(name: str, divisor: int, *, one_class: bool) -> DataSet:
    from alphafpn.tiny import read_tile  # noqa: F401  (names the extra where pillow is missing)

    splits = [
        _read_cells(_real(name) / "bccd", part, divisor, one_class) for part in ("train", "val")
    ]
    classes = 1 if one_class else 3
    return DataSet(name, *splits, _coco(splits[1], classes), classes, CELL_SIZES, (0.5, 1.0, 2.0))


def _real(name: str) -> Path:
    folder = os.environ.get(DATA)
    if not folder:
        raise ValueError(f"{name}: expected the folder of the real data in {DATA}, found none")
    return Path(folder)


def _people(name: str, side: int, seed: int) -> DataSet:
    folder = _real(name) / "tinyperson640"
    train = _crops(folder, "train", side, CROPS, seed)
    # Twice as wide: more background around the people, as whole images have.
    val = _crops(folder, "val", 2 * side, VAL_CROPS, _VAL_SEED)
    return DataSet(name, train, val, _coco(val, 1), 1, CELL_SIZES, (0.5, 1.0, 2.0))


def _crops(folder: Path, part: str, side: int, count: int, seed: int) -> list[Scene]:
    """Squares that hold at least one person, of images brought back to their proportions."""
    import json

    from PIL import Image

    coco = json.loads((folder / f"{part}.json").read_text())
    marks: dict[int, list[dict[str, Any]]] = {}
    for mark in coco["annotations"]:
        marks.setdefault(mark["image_id"], []).append(mark)
    entries = [
        entry
        for entry in coco["images"]
        if not entry["dense"] and any(not mark["ignore"] for mark in marks.get(entry["id"], []))
    ]
    rng = np.random.default_rng(seed)
    scale = np.array([_PEOPLE_WIDTH / 640, _PEOPLE_HEIGHT / 640] * 2)
    scenes: list[Scene] = []
    while len(scenes) < count:
        entry = entries[rng.integers(len(entries))]
        found = marks[entry["id"]]
        boxes = np.array([mark["bbox"] for mark in found]) * scale
        boxes[:, 2:] += boxes[:, :2]
        ignored = np.array([mark["ignore"] for mark in found])
        x1, y1, x2, y2 = boxes[rng.choice(np.flatnonzero(~ignored))]
        at = np.array([(x1 + x2) / 2, (y1 + y2) / 2]) - rng.uniform(0, side, 2)
        left, top = np.clip(at, 0, [_PEOPLE_WIDTH - side, _PEOPLE_HEIGHT - side])
        inside = np.clip(boxes - [left, top, left, top], 0, side)
        share = np.prod(inside[:, 2:] - inside[:, :2], axis=1) / np.prod(
            boxes[:, 2:] - boxes[:, :2], axis=1
        )
        keep = ~ignored & (share >= _LEFT)
        if not keep.any():
            continue
        corners = np.array([left, top, left + side, top + side]) / scale
        with Image.open(folder / "images" / entry["file_name"]) as file:
            crop = file.convert("RGB").resize(
                (side, side), Image.Resampling.BILINEAR, tuple(corners.tolist())
            )
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous()
        for a, b, c, d in inside[~keep].round().astype(int).tolist():
            pixels[:, b:d, a:c] = round(255 * MEAN)
        kept = torch.tensor(inside[keep], dtype=torch.float32)
        scenes.append(Scene(pixels, kept, torch.ones(len(kept), dtype=torch.int64)))
    return scenes


def _read_cells(folder: Path, part: str, divisor: int, one_class: bool) -> list[Scene]:
    import json

    from PIL import Image

    coco = json.loads((folder / f"{part}.json").read_text())
    scenes = []
    for entry in coco["images"]:
        with Image.open(folder / "images" / entry["file_name"]) as file:
            size = (entry["width"] // divisor, entry["height"] // divisor)
            small = np.array(file.convert("RGB").resize(size, Image.Resampling.BOX))
        marks = [mark for mark in coco["annotations"] if mark["image_id"] == entry["id"]]
        boxes = torch.tensor([mark["bbox"] for mark in marks], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes *= torch.tensor([size[0] / entry["width"], size[1] / entry["height"]]).repeat(2)
        boxes = torch.minimum(boxes.clamp_(min=0), torch.tensor([*size, *size]))
        labels = torch.tensor([1 if one_class else mark["category_id"] for mark in marks])
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        pixels = torch.from_numpy(small).permute(2, 0, 1).contiguous()
        scenes.append(Scene(pixels, boxes[keep], labels[keep].long()))
    return scenes


def _coco(scenes: Sequence[Scene], classes: int) -> dict[str, Any]:
    names = [str(label) for label in range(1, classes + 1)]
    return as_coco("val", (scene.marked() for scene in scenes), names)
