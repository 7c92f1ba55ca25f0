"""Scenes to train on and to be judged on, and drawn ones with two dials.

The dials: how sizes are distributed, and where it is seen what counts. A drawn scene holds figures
of two kinds, light above dark and dark above light, and one landmark, a disc that is red or blue.
Where the answer is *near*, every figure of the first kind is an object. Where it is *far*, the
landmark decides whether they are, from 64 pixels away or more for all that are tiny. Nothing else
differs: both families show the same images with other labels.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Marks: TypeAlias = list[dict[str, Any]]  # COCO annotations of one image, without ids
Marked: TypeAlias = tuple[tuple[int, int], Marks]  # an image's (height, width) and marks

SIDE = 128
FAR = 64  # pixels between the landmark's centre and every tiny figure's
_TINY = 20.0
_FINEST = 4.8  # smallest size on the finest level; each level ends where the next one begins
_LARGEST = 52.0
_RADIUS = 18.0
_KINDS = np.array([[0.75, 0.2, 0.2], [0.2, 0.25, 0.8]])  # of landmarks


@dataclass(frozen=True)
class Family:
    """Both dials.

    Attributes:
        ratios: Objects on a level over those on the next finer one, finest edge first.
        far: Whether the landmark decides what counts.
    """

    ratios: tuple[float, float, float]
    far: bool

    @property
    def name(self) -> str:
        """Names it in results: `far .2/.2/.2`."""
        ratios = "/".join(f"{ratio:g}".lstrip("0") for ratio in self.ratios)
        return f"{'far' if self.far else 'near'} {ratios}"


@dataclass(frozen=True)
class Scene:
    """An image with what is to be found in it.

    Attributes:
        pixels: Uint8 [3, H, W].
        boxes: Objects, float32 xyxy [N, 4] in pixels.
        labels: Their classes from 1, int64 [N].
        ignored: Regions that count neither for nor against a detector, as `boxes` are.
    """

    pixels: Tensor
    boxes: Tensor
    labels: Tensor
    ignored: Tensor = field(default_factory=lambda: torch.zeros(0, 4))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.pixels.shape[-2:]
        return height, width

    def mirrored(self) -> Scene:
        """The scene from left to right."""
        pixels = self.pixels.flip(-1)
        boxes, ignored = (
            torch.stack([self.size[1] - x2, y1, self.size[1] - x1, y2], 1)
            for x1, y1, x2, y2 in (part.unbind(1) for part in (self.boxes, self.ignored))
        )
        return Scene(pixels, boxes, self.labels, ignored)

    def marked(self) -> Marked:
        """Annotates the scene as COCO does."""
        kinds: list[dict[str, Any]] = [{"category_id": label} for label in self.labels.tolist()]
        kinds += [{"category_id": 1, "ignore": 1}] * len(self.ignored)
        marks: Marks = [
            {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0} | kind
            for (x1, y1, x2, y2), kind in zip(
                torch.cat([self.boxes, self.ignored]).tolist(), kinds, strict=True
            )
        ]
        return self.size, marks


def draw(family: Family, count: int, seed: int) -> list[Scene]:
    """Draws `count` scenes; the same for the same seed, whatever the labels depend on."""
    return [_draw(family, np.random.default_rng((seed, index))) for index in range(count)]


def _draw(family: Family, rng: np.random.Generator) -> Scene:
    image = np.full((SIDE, SIDE, 3), 0.45)
    for cells in (3, 8, 20):
        image += 0.05 * cloud(rng, cells, SIDE)[..., None]
    kind = int(rng.integers(2))
    corner = rng.uniform(_RADIUS, 1.5 * _RADIUS, 2)
    centre = np.where(rng.random(2) < 0.5, corner, SIDE - corner)
    _disc(image, centre, _KINDS[kind])
    boxes = []
    sizes = _sizes(family, rng, int(rng.integers(12, 20)))
    for size in sorted(sizes.tolist(), reverse=True):
        aspect = np.sqrt(rng.uniform(1.2, 2.2))
        w, h = size / aspect, size * aspect
        place = _place(rng, w, h, centre, FAR if size < _TINY else _RADIUS + size / 2)
        polarity = int(rng.integers(2))
        tone = rng.uniform(0.16, 0.3)
        if place is None:
            continue
        _figure(image, *place, w, h, (1 - 2 * polarity) * tone)
        if polarity == 0 and not (family.far and kind):
            boxes.append([place[0], place[1], place[0] + w, place[1] + h])
    image += rng.normal(0, 0.03, image.shape)
    pixels = torch.from_numpy((image.clip(0, 1) * 255).astype(np.uint8)).permute(2, 0, 1)
    found = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Scene(pixels.contiguous(), found, torch.ones(len(found), dtype=torch.int64))


def _sizes(family: Family, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    share = np.cumprod([1.0, *family.ratios])
    level = rng.choice(len(share), count, p=share / share.sum())
    low = _FINEST * 2.0**level
    high = np.minimum(2 * low, _LARGEST)
    sizes: NDArray[np.float64] = np.exp(rng.uniform(np.log(low), np.log(high)))
    return sizes


def _place(
    rng: np.random.Generator, w: float, h: float, centre: NDArray[np.float64], distance: float
) -> tuple[float, float] | None:
    """A random left and top, so far from the landmark; None where there is hardly any."""
    for _ in range(30):
        left, top = rng.uniform(0, SIDE - w), rng.uniform(0, SIDE - h)
        if np.hypot(left + w / 2 - centre[0], top + h / 2 - centre[1]) >= distance:
            return left, top
    return None


def _figure(
    image: NDArray[np.float64], left: float, top: float, w: float, h: float, tone: float
) -> None:
    rows, columns = slice(int(top), int(top + h) + 1), slice(int(left), int(left + w) + 1)
    region = image[rows, columns]
    y, x = np.mgrid[rows, columns][:, : region.shape[0], : region.shape[1]] + 0.5
    u, v = (x - left) / w * 2 - 1, (y - top) / h * 2 - 1
    cover = ((1 - np.abs(u) ** 2.5 - np.abs(v) ** 2.5) * min(w, h) / 4 + 0.5).clip(0, 1)
    region -= (cover * np.tanh(3 * v) * tone)[..., None]


def _disc(
    image: NDArray[np.float64], centre: NDArray[np.float64], colour: NDArray[np.float64]
) -> None:
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    cover = (_RADIUS - np.hypot(x - centre[0], y - centre[1])).clip(0, 1)[..., None]
    image += cover * (colour - image)


def cloud(rng: np.random.Generator, cells: int, side: int) -> NDArray[np.float64]:
    """Noise [side, side]: `cells` random values to a side, linear between them."""
    nodes = rng.normal(size=(cells + 2, cells + 2))
    position = np.linspace(0, cells, side)
    low = position.astype(int)
    part = position - low
    rows = nodes[low] * (1 - part[:, None]) + nodes[low + 1] * part[:, None]
    noise: NDArray[np.float64] = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    return noise


def as_coco(
    name: str, scenes: Iterable[Marked], categories: Sequence[str] = ("object",)
) -> dict[str, Any]:
    """Makes a COCO data set of marked scenes, whose files are in the folder `name`."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, ((height, width), marks) in enumerate(scenes):
        file = {"file_name": f"{name}/{index:04}.png", "width": width, "height": height}
        images.append({"id": index} | file)
        for mark in marks:
            ids = {"id": len(annotations) + 1, "image_id": index, "category_id": 1}
            annotations.append(ids | mark)
    kinds = [{"id": label, "name": kind} for label, kind in enumerate(categories, 1)]
    return {"images": images, "annotations": annotations, "categories": kinds}


def as_pngs(name: str, scenes: Iterable[Scene]) -> dict[str, bytes]:
    """Makes the files that `as_coco` names."""
    from PIL import Image

    files = {}
    for index, scene in enumerate(scenes):
        png = io.BytesIO()
        Image.fromarray(scene.pixels.permute(1, 2, 0).numpy()).save(png, "PNG")
        files[f"{name}/{index:04}.png"] = png.getvalue()
    return files
