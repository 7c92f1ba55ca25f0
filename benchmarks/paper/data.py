"""COCO data at one size: images in one array, boxes in the pixels that the network sees.

Every batch follows from seed and step alone, so that a training can go on from any step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from tqdm import tqdm

from alphafpn.tiny import EraseIgnored
from benchmarks.records import digest, key_of

_KEPT_SHARE = 0.49  # of a box's area; what is left of others is background
_TRIES = 10
_FLAGS = ("ignore", "uncertain", "iscrowd")


class Split:
    """The images and boxes of a COCO file, resized to (height, width), without dense images.

    `cache` keeps the decoded images. With `erase`, regions to ignore are painted over.

    Attributes:
        coco: The annotations at that size, with the regions to ignore: what to evaluate against.
        boxes: For each image [n, 4] (xyxy, float32), without ignored ones and those of at most a
            pixel.
        pixels: The images, uint8 [N, H, W, 3], mapped to memory.
    """

    def __init__(
        self, path: Path, images: Path, size: tuple[int, int], cache: Path, *, erase: bool
    ) -> None:
        self.size = size
        self.coco = _resized(json.loads(path.read_bytes()), size)
        by_image: dict[int, list[Any]] = {image["id"]: [] for image in self.coco["images"]}
        for annotation in self.coco["annotations"]:
            by_image[annotation["image_id"]].append(annotation)
        self.boxes: list[NDArray[np.float32]] = []
        for own in by_image.values():
            clipped = _clipped(_xyxy([a for a in own if not _ignored(a)]), *size)
            self.boxes.append(clipped[(clipped[:, 2:] - clipped[:, :2] > 1).all(1)])
        content = {"json": digest(path), "size": size, "images": str(images), "erase": erase}
        file = cache / f"{path.stem}-{key_of(content)}.npy"
        if not file.exists():
            self._decode(file, by_image if erase else {}, images)
        # Copy on write: torch wants arrays that it may write to. Nothing does.
        self.pixels = torch.from_numpy(np.load(file, mmap_mode="c"))

    def _decode(self, file: Path, erase: dict[int, list[Any]], folder: Path) -> None:
        """Writes the cache: whoever reads it sees all of it or nothing."""
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.partial")
        shape = (len(self.boxes), *self.size, 3)
        array = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)

        def one(index: int) -> None:
            image = self.coco["images"][index]
            with Image.open(folder / image["file_name"]) as opened:
                picture = opened.convert("RGB").resize(self.size[::-1], Image.Resampling.BILINEAR)
            array[index] = np.asarray(picture)
            own = erase.get(image["id"], [])
            if own:
                pixels = torch.from_numpy(array[index]).permute(2, 0, 1)
                boxes = tv_tensors.BoundingBoxes(
                    _xyxy(own), format="XYXY", canvas_size=self.size, dtype=torch.float32
                )
                target = {"boxes": boxes, "ignore": [_ignored(a) for a in own]}
                erased, _ = EraseIgnored()(tv_tensors.Image(pixels), target)
                array[index] = erased.permute(1, 2, 0).numpy()

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            indices = range(len(self.boxes))
            for _ in tqdm(pool.map(one, indices), f"decoding {file.stem}", len(indices)):
                pass
        array.flush()
        os.replace(partial, file)


@dataclass(frozen=True)
class Batches:
    """Random squares of a split's images, `batch` at a time, mirrored half of the time."""

    split: Split
    crop: int  # side of the squares
    batch: int
    seed: int

    def __iter__(self) -> Iterator[int]:
        """The numbers of the batches, without end."""
        step = 0
        while True:
            yield step
            step += 1

    def at(self, step: int, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """A batch: uint8 [B, crop, crop, 3], and of each image float32 [n, 4] (xyxy) on the CPU.

        `pixels` are the split's images, on any device.
        """
        samples = [self._sample(pixels, step, place) for place in range(self.batch)]
        return torch.stack([crop for crop, _ in samples]), [boxes for _, boxes in samples]

    def items(self, count: int) -> list[tuple[tuple[int, int], Tensor]]:
        """((height, width), boxes) of the first `count` samples, as the network sees them."""
        blank = torch.zeros(1, 1, 1, 3, dtype=torch.uint8)
        blank = blank.expand(len(self.split.boxes), *self.split.size, 3)
        samples = (divmod(number, self.batch) for number in range(count))
        size = (self.crop, self.crop)
        return [(size, self._sample(blank, step, place)[1]) for step, place in samples]

    def _sample(self, pixels: Tensor, step: int, place: int) -> tuple[Tensor, Tensor]:
        total, side = len(self.split.boxes), self.crop
        epoch, offset = divmod(step * self.batch + place, total)
        index = int(np.random.default_rng([self.seed, 0, epoch]).permutation(total)[offset])
        rng = np.random.default_rng([self.seed, 1, step, place])
        image, boxes = pixels[index], self.split.boxes[index]
        # The paper leaves out tiles without objects: look for a place that has one.
        for _ in range(_TRIES):
            y, x = (int(rng.integers(length - side + 1)) for length in image.shape[:2])
            clipped = _clipped(boxes - np.array([x, y, x, y], np.float32), side, side)
            sides, whole = clipped[:, 2:] - clipped[:, :2], boxes[:, 2:] - boxes[:, :2]
            kept = (sides > 1).all(1) & (sides.prod(1) >= _KEPT_SHARE * whole.prod(1))
            if kept.any():
                break
        crop, found = image[y : y + side, x : x + side], clipped[kept]
        if rng.random() < 0.5:
            crop = crop.flip(1)
            found = found[:, [2, 1, 0, 3]]
            found[:, [0, 2]] = side - found[:, [0, 2]]
        return crop, torch.from_numpy(found)


def _resized(coco: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Annotations at the size that the network sees."""
    height, width = size
    images = [image for image in coco["images"] if not image.get("dense")]
    scale = {i["id"]: (width / i["width"], height / i["height"]) for i in images}
    annotations = []
    for annotation in coco["annotations"]:
        if annotation["image_id"] in scale:
            across, down = scale[annotation["image_id"]]
            x, y, w, h = annotation["bbox"]
            bbox = [x * across, y * down, w * across, h * down]
            annotations.append({**annotation, "bbox": bbox, "area": bbox[2] * bbox[3]})
    images = [{**i, "height": height, "width": width} for i in images]
    return {**coco, "images": images, "annotations": annotations}


def _ignored(annotation: dict[str, Any]) -> bool:
    return any(annotation.get(flag) for flag in _FLAGS)


def _xyxy(annotations: list[Any]) -> NDArray[np.float32]:
    boxes = np.array([a["bbox"] for a in annotations], np.float32).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def _clipped(boxes: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    limit = np.array([width, height, width, height], np.float32)
    return np.clip(boxes, 0, limit)
