"""Scenes that the demo draws.

A scene holds figures of two kinds, light above dark and dark above light, and one disc that is red
or blue. In the *near* family every figure of the first kind is an object. In the *far* family the
figures of the first kind are objects only if the disc is red, and it is at least 64 pixels away
from all tiny figures. Both families have the same images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SIDE = 128  # of a scene, in pixels
FAR = 64  # least distance in pixels from the disc's centre to a tiny figure's
_TINY = 20.0
# Sizes by octave, in pixels, and how often they are drawn.
_OCTAVES = ((4.8, 9.6), (9.6, 19.2), (19.2, 38.4), (38.4, 52.0))
_SHARES = np.array([1, 0.2, 0.04, 0.008]) / 1.248
_RADIUS = 18.0
_BLUE, _RED = np.array([0.2, 0.25, 0.8]), np.array([0.75, 0.2, 0.2])


@dataclass(frozen=True)
class Scene:
    """An image with its objects.

    Attributes:
        pixels: Uint8 [SIDE, SIDE, 3].
        boxes: Objects, float32 xyxy [N, 4] in pixels.
    """

    pixels: NDArray[np.uint8]
    boxes: NDArray[np.float32]

    def mirrored(self) -> Scene:
        """Mirrors the scene from left to right."""
        x1, y1, x2, y2 = self.boxes.T
        boxes = np.stack([SIDE - x2, y1, SIDE - x1, y2], 1)
        return Scene(np.ascontiguousarray(self.pixels[:, ::-1]), boxes)


def draw(count: int, seed: int, *, far: bool) -> list[Scene]:
    """Draws `count` scenes; the same images for the same seed in both families."""
    return [_draw(np.random.default_rng((seed, index)), far) for index in range(count)]


def _draw(rng: np.random.Generator, far: bool) -> Scene:
    image = np.full((SIDE, SIDE, 3), 0.45)
    for cells in (3, 8, 20):
        image += 0.05 * _cloud(rng, cells)[..., None]
    is_blue = bool(rng.integers(2))
    corner = rng.uniform(_RADIUS, 1.5 * _RADIUS, 2)
    centre = np.where(rng.random(2) < 0.5, corner, SIDE - corner)
    _draw_disc(image, centre, _BLUE if is_blue else _RED)
    octaves = rng.choice(len(_OCTAVES), int(rng.integers(12, 20)), p=_SHARES)
    sizes = np.exp(rng.uniform(*np.log(_OCTAVES)[octaves].T))
    boxes = []
    for size in sorted(sizes.tolist(), reverse=True):
        aspect = np.sqrt(rng.uniform(1.2, 2.2))
        w, h = size / aspect, size * aspect
        place = _place(rng, w, h, centre, FAR if size < _TINY else _RADIUS + size / 2)
        is_second_kind = bool(rng.integers(2))
        tone = rng.uniform(0.16, 0.3)
        if place is None:
            continue
        _draw_figure(image, *place, w, h, -tone if is_second_kind else tone)
        if not is_second_kind and not (far and is_blue):
            boxes.append([place[0], place[1], place[0] + w, place[1] + h])
    image += rng.normal(0, 0.03, image.shape)
    pixels = (image.clip(0, 1) * 255).astype(np.uint8)
    return Scene(pixels, np.array(boxes, np.float32).reshape(-1, 4))


def _place(
    rng: np.random.Generator, w: float, h: float, centre: Floats, distance: float
) -> tuple[float, float] | None:
    """Draws a left and top so far from the disc; None if there is hardly such a place."""
    for _ in range(30):
        left, top = rng.uniform(0, SIDE - w), rng.uniform(0, SIDE - h)
        if np.hypot(left + w / 2 - centre[0], top + h / 2 - centre[1]) >= distance:
            return left, top
    return None


def _draw_figure(image: Floats, left: float, top: float, w: float, h: float, tone: float) -> None:
    rows, columns = slice(int(top), int(top + h) + 1), slice(int(left), int(left + w) + 1)
    region = image[rows, columns]
    y, x = np.mgrid[rows, columns][:, : region.shape[0], : region.shape[1]] + 0.5
    u, v = (x - left) / w * 2 - 1, (y - top) / h * 2 - 1
    cover = ((1 - np.abs(u) ** 2.5 - np.abs(v) ** 2.5) * min(w, h) / 4 + 0.5).clip(0, 1)
    region -= (cover * np.tanh(3 * v) * tone)[..., None]


def _draw_disc(image: Floats, centre: Floats, colour: Floats) -> None:
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    cover = (_RADIUS - np.hypot(x - centre[0], y - centre[1])).clip(0, 1)[..., None]
    image += cover * (colour - image)


def _cloud(rng: np.random.Generator, cells: int) -> Floats:
    """Makes noise [SIDE, SIDE]: `cells` random values to a side, linear between them."""
    nodes = rng.normal(size=(cells + 2, cells + 2))
    position = np.linspace(0, cells, SIDE)
    low = position.astype(int)
    part = position - low
    rows = nodes[low] * (1 - part[:, None]) + nodes[low + 1] * part[:, None]
    noise: Floats = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    return noise
