"""Cluttered scenes: figures among things that look like them, each seen from itself alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from alphafpn.demo.scenes import Marks, cloud

Scene: TypeAlias = tuple[NDArray[np.uint8], Marks]  # pixels [H, W, 3]


def drawn_scenes(count: int, side: int, seed: int) -> Iterator[Scene]:
    """Square scenes with figures, in about TinyPerson's sizes, among things that look like them."""
    for index in range(count):
        yield _draw(np.random.default_rng((seed, index)), side)


def _draw(rng: np.random.Generator, side: int) -> Scene:
    image = np.full((side, side, 3), 0.45)
    for cells in (3, 8, 20, 48):
        image += rng.normal(0, 0.05, 3) + 0.06 * cloud(rng, cells, side)[..., None]
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
