"""COCO data at one size: images in one array, boxes in the pixels that the network sees.

Every batch is a function of seed and step alone, so that a run can go on from any step.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F  # noqa: N812
from tqdm import tqdm

from alphafpn.tiny import EraseIgnored
from benchmarks.paper.config import Config, digest, hash_of

_KEPT_SHARE = 0.49  # of a box's area; what is left of others is background
_TRIES = 10
_FLAGS = ("ignore", "uncertain", "iscrowd")
PADDING = 114


class Split:
    """The images and boxes of one annotation file, resized to one size.

    Attributes:
        coco: the annotations at that size, regions to ignore included: what to judge against.
        boxes: per image [n, 4] (xyxy, float32), without ignored ones and those of at most a pixel.
        labels: per image int64 [n], from 1.
    """

    def __init__(self, config: Config, path: str, runs: str, *, erase: bool) -> None:
        self.size = config.size
        self.coco = _resized(json.loads(Path(path).read_bytes()), config)
        self.categories = sorted(category["id"] for category in self.coco["categories"])
        label = {category: n for n, category in enumerate(self.categories, start=1)}
        by_image: dict[int, list[Any]] = {image["id"]: [] for image in self.coco["images"]}
        for annotation in self.coco["annotations"]:
            by_image[annotation["image_id"]].append(annotation)
        self.boxes, self.labels = [], []
        for image in self.coco["images"]:
            own = [a for a in by_image[image["id"]] if not any(a.get(flag) for flag in _FLAGS)]
            clipped = _clipped(_xyxy(own), *self.size)
            usable = (clipped[:, 2:] - clipped[:, :2] > 1).all(1)
            self.boxes.append(clipped[usable])
            labels = np.array([label[a["category_id"]] for a in own], np.int64)
            self.labels.append(labels[usable])
        files = [image["file_name"] for image in self.coco["images"]]
        content = {"files": files, "size": self.size, "images": str(config.images)}
        if erase:
            content["json"] = digest(path)
        self._cache = Path(runs) / "cache" / f"{Path(path).stem}-{hash_of(content)}.npy"
        if not self._cache.exists():
            self._decode(by_image if erase else {}, Path(config.images))

    def __len__(self) -> int:
        return len(self.boxes)

    def boxes_by_category(self) -> dict[str, dict[str, int]]:
        """How many boxes there are of each category, by name, where there are several."""
        if len(self.categories) == 1:
            return {}
        names = {c["id"]: c.get("name", str(c["id"])) for c in self.coco["categories"]}
        counts = np.bincount(np.concatenate(self.labels), minlength=1 + len(self.categories))
        pairs = zip(self.categories, counts[1:].tolist(), strict=True)
        return {"categories": {names[category]: count for category, count in pairs}}

    def open(self) -> Tensor:
        """The images, uint8 [N, H, W, 3], mapped to memory."""
        # Copy on write: torch wants arrays that it may write to. Nobody does.
        return torch.from_numpy(np.load(self._cache, mmap_mode="c"))

    def _decode(self, erase: dict[int, list[Any]], folder: Path) -> None:
        """Write the cache: whoever reads it sees all of it or nothing."""
        self._cache.parent.mkdir(parents=True, exist_ok=True)
        partial = self._cache.with_suffix(f".{os.getpid()}.partial")
        shape = (len(self), *self.size, 3)
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
                ignored = [any(a.get(flag) for flag in _FLAGS) for a in own]
                target = {"boxes": boxes, "ignore": ignored}
                erased, _ = EraseIgnored()(tv_tensors.Image(pixels), target)
                array[index] = erased.permute(1, 2, 0).numpy()

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            indices = range(len(self))
            for _ in tqdm(pool.map(one, indices), f"decoding {self._cache.stem}", len(self)):
                pass
        array.flush()
        os.replace(partial, self._cache)


class Batches:
    """Random crops and flips of a split.

    Args:
        split: the images and boxes.
        config: its seed, batch size and crop size.
        resize: a v2 transform to resize each image by, such as Scale Match, or None.
    """

    def __init__(self, split: Split, config: Config, resize: Any = None) -> None:
        self.split = split
        self.config = config
        self.crop = (config.crop, config.crop) if config.crop else config.size
        self.resize = resize

    def __call__(
        self, images: Tensor, step: int, rank: int = 0, world: int = 1
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """One rank's share of a step's batch.

        Args:
            images: what the split's `open` returned, on any device.
            step: from 0.
            rank: of this process.
            world: number of processes.

        Returns:
            Pixels uint8 [B, h, w, 3] on the device of `images`; boxes float32 [n, 4] (xyxy) and
            labels int64 [n] per image, on the CPU.
        """
        pixels, boxes, labels = [], [], []
        for place in range(rank, self.config.batch, world):
            crop, found, kind = self._sample(images, step, place)
            pixels.append(crop)
            boxes.append(torch.from_numpy(found))
            labels.append(torch.from_numpy(kind))
        return torch.stack(pixels), boxes, labels

    def boxes_alone(self, count: int) -> list[tuple[tuple[int, int], Tensor]]:
        """((height, width), boxes) of the first `count` samples, as the network sees them."""
        blank = torch.zeros(1, 1, 1, 3, dtype=torch.uint8)
        blank = blank.expand(len(self.split), *self.split.size, 3)
        samples = (divmod(n, self.config.batch) for n in range(count))
        found = (self._sample(blank, step, place)[1] for step, place in samples)
        return [(self.crop, torch.from_numpy(boxes)) for boxes in found]

    def _sample(
        self, images: Tensor, step: int, place: int
    ) -> tuple[Tensor, NDArray[np.float32], NDArray[np.int64]]:
        seed, total = self.config.seed, len(self.split)
        epoch, offset = divmod(step * self.config.batch + place, total)
        index = int(np.random.default_rng([seed, 0, epoch]).permutation(total)[offset])
        rng = np.random.default_rng([seed, 1, step, place])
        image, boxes, labels = images[index], self.split.boxes[index], self.split.labels[index]
        if self.resize is not None:
            torch.manual_seed(int(rng.integers(2**63)))
            image, boxes, labels = self._matched(image, boxes, labels)
        height, width = self.crop
        # As the paper leaves out tiles without objects: look for a place that has one.
        for _ in range(_TRIES):
            y, x = (
                int(rng.integers(a - b + 1)) for a, b in zip(image.shape, self.crop, strict=False)
            )
            clipped = _clipped(boxes - np.array([x, y, x, y], np.float32), height, width)
            sides, whole = clipped[:, 2:] - clipped[:, :2], boxes[:, 2:] - boxes[:, :2]
            kept = (sides > 1).all(1) & (sides.prod(1) >= _KEPT_SHARE * whole.prod(1))
            if kept.any():
                break
        crop, found = image[y : y + height, x : x + width], clipped[kept]
        if rng.random() < 0.5:
            crop = crop.flip(1)
            found = found[:, [2, 1, 0, 3]]
            found[:, [0, 2]] = width - found[:, [0, 2]]
        return crop, found, labels[kept]

    def _matched(
        self, image: Tensor, boxes: NDArray[np.float32], labels: NDArray[np.int64]
    ) -> tuple[Tensor, NDArray[np.float32], NDArray[np.int64]]:
        """A sample after `resize`, padded to the crop's size where it has become smaller."""
        canvas = (image.shape[0], image.shape[1])
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=canvas),
            "labels": torch.from_numpy(labels),
        }
        resized, target = self.resize(tv_tensors.Image(image.permute(2, 0, 1)), target)
        missing = [max(0, a - b) for a, b in zip(self.crop, resized.shape[1:], strict=True)]
        padded = F.pad(resized.as_subclass(Tensor), [0, 0, missing[1], missing[0]], fill=PADDING)
        found = target["boxes"].as_subclass(Tensor).numpy().astype(np.float32)
        return padded.permute(1, 2, 0), found, target["labels"].numpy()


def _resized(coco: dict[str, Any], config: Config) -> dict[str, Any]:
    """Annotations at the size that the network sees."""
    height, width = config.size
    images = [i for i in coco["images"] if config.dense or not i.get("dense")]
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


def _xyxy(annotations: list[Any]) -> NDArray[np.float32]:
    boxes = np.array([a["bbox"] for a in annotations], np.float32).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def _clipped(boxes: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    limit = np.array([width, height, width, height], np.float32)
    return np.clip(boxes, 0, limit)
