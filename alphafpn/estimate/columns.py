"""`Annotations`: what all readers make, and the filters that boxes of every origin go through."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

# Beyond this, float32 can no longer tell one pixel from the next.
MAX_SIDE = 2**24
SIZE = f"(height, width), two ints from 1 to {MAX_SIDE}"
# Why a box is left out, by code; the first that holds counts, and 0 means that it is kept.
_REASONS = ("", "other categories", "crowd", "ignore", "zero size", "outside the image")
OTHER, CROWD, IGNORE, ZERO, OUTSIDE = range(1, 6)


@dataclass(frozen=True, eq=False)
class Annotations:
    """Image sizes and ground-truth boxes as columns, in pixels of the original images.

    Attributes:
        sizes: (height, width) of each image, int64 `[M, 2]`.
        boxes: `xyxy`, float32 `[G, 4]`, clipped to their images; grouped by image in the order of
            the images, and within an image in the order they were given.
        counts: Boxes of each image, int64 `[M]`; zero for an image without any.
        num_clipped: How many of the boxes reached beyond their image by more than a pixel.
        left_out: How many boxes were left out, by reason. A box with several reasons counts under
            the first of "other categories", "crowd", "ignore", "zero size", "outside the image".
        files: Name and number of images of each file that was read; empty where there is none.
    """

    sizes: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float32]
    counts: npt.NDArray[np.int64]
    num_clipped: int
    left_out: dict[str, int]
    files: tuple[tuple[str, int], ...] = ()

    def place(self, image: int) -> str:
        """Returns the words by which a message names an image."""
        first = 0
        for name, count in self.files:
            if image < first + count:
                return f"{name}: images[{image - first}]"
            first += count
        return f"image {image}"


def concatenate(parts: Sequence[Annotations]) -> Annotations:
    """Puts the images of all parts in a row, as if they had been read together."""
    left_out = {r: sum(part.left_out.get(r, 0) for part in parts) for r in _REASONS}
    return Annotations(
        sizes=np.concatenate([part.sizes for part in parts]),
        boxes=np.concatenate([part.boxes for part in parts]),
        counts=np.concatenate([part.counts for part in parts]),
        num_clipped=sum(part.num_clipped for part in parts),
        left_out={reason: n for reason, n in left_out.items() if n},
    )


def clip(
    sizes: npt.NDArray[np.int64],
    boxes: npt.NDArray[np.float32],
    counts: npt.NDArray[np.int64],
    reasons: npt.NDArray[np.int8],
) -> Annotations:
    """Clips `xyxy` boxes to their images, in place; drops those with a reason or no area."""
    reasons[(reasons == 0) & ~_has_area(boxes)] = ZERO
    limits = np.repeat(np.tile(sizes[:, ::-1], 2).astype(np.float32), counts, axis=0)
    # Beyond what rounding in a labelling tool explains.
    beyond = (boxes < -1).any(axis=1) | (boxes > limits + 1).any(axis=1)
    np.clip(boxes, 0, limits, out=boxes)
    reasons[(reasons == 0) & ~_has_area(boxes)] = OUTSIDE
    keep = reasons == 0
    image = np.repeat(np.arange(len(sizes)), counts)
    totals = np.bincount(reasons, minlength=len(_REASONS)).tolist()
    left_out = {r: n for r, n in zip(_REASONS, totals, strict=True) if r and n}
    counts = np.bincount(image[keep], minlength=len(sizes))
    num_clipped = int((beyond & keep).sum())
    return Annotations(sizes, boxes.compress(keep, axis=0), counts, num_clipped, left_out)


def _has_area(boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def check_categories(wanted: set[int], known: set[int], name: str) -> None:
    """Raises ValueError if a wanted category is not among the known ones."""
    if unknown := wanted - known:
        raise ValueError(
            f"{name}: expected category_ids among {_listed(known)}, found {_listed(unknown)}"
        )


def _listed(numbers: set[int]) -> str:
    shown = sorted(numbers)
    if len(shown) > 100:
        return f"{', '.join(map(str, shown[:100]))}, ... ({len(shown)} in all)"
    return ", ".join(map(str, shown)) or "none"


def describe(value: object) -> str:
    """Says on one line what was found, for an error message."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{type(value).__name__} of shape {tuple(value.shape)} and dtype {value.dtype}"
    if isinstance(value, (tuple, list, int, float, str, type(None))):
        # On one line: a tensor inside would bring its own.
        return f"{type(value).__name__} {' '.join(reprlib.repr(value).split())}"
    return type(value).__name__
