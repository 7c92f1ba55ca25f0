"""Large images in tiles: cut a COCO dataset, and bring detections back onto the whole images.

Tiles, boxes and merging follow the TinyPerson protocol. Boxes are COCO's `xywh` in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import nms

from alphafpn.tiny import _coco
from alphafpn.tiny._tile_files import read_tile, write_tiles

__all__ = ["cut_dataset", "merge_detections", "read_tile"]

# Whatever else lies in the original's pixels would be wrong in a tile's.
_NOT_CUT = frozenset({"segmentation", "keypoints", "num_keypoints"})
# torchvision suppresses above its threshold, the protocol from its own on.
_JUST_BELOW_HALF = math.nextafter(0.5, 0.0)

_Length = Annotated[int, msgspec.Meta(gt=0)]


class _Image(msgspec.Struct):
    id: int
    width: _Length
    height: _Length
    file_name: str | None = None
    corner: Any = None


class _Annotation(msgspec.Struct):
    id: int
    image_id: int
    bbox: _coco.Box


class _Dataset(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]


class _Tile(msgspec.Struct):
    id: int
    original_image_id: int
    corner: tuple[int, int, int, int]


class _Tiles(msgspec.Struct):
    images: list[_Tile]


class _Detection(msgspec.Struct):
    image_id: int
    bbox: _coco.Box
    score: float


def cut_dataset(
    dataset: _coco.Source | Mapping[str, Any],
    *,
    tile_size: tuple[int, int] = (640, 512),
    overlap: tuple[int, int] = (50, 50),
    min_size_ratio: float = 0.7,
    keep_empty: bool = True,
    images: _coco.Source | None = None,
    out: _coco.Source | None = None,
) -> dict[str, Any]:
    """Cuts the images of a COCO dataset into overlapping tiles.

    Tiles lie side by side from the upper left corner; the last of a row or column is shifted back
    to end at the border. An image smaller than a tile gives one tile of its own size.

    A box is clipped to each tile, and is there in those that leave it at least `min_size_ratio` of
    its size, the square root of its area; being marked `ignore` makes no difference to that.

    By default nothing is written, and the tiles keep the `file_name` of their image: `read_tile`
    reads the region. With `images` and `out`, the tiles are also written, as PNG files in
    `out/images`, and last of all `out/annotations.json`. Files appear complete or not at all; none
    is overwritten. A call that was interrupted is resumed by making it again; several at once
    share the folder in peace. One that was killed may leave a folder `.partial-*`, to be deleted.

    Args:
        dataset: COCO dict with `images` and `annotations`, or the path to one as JSON.
        tile_size: (width, height) of a tile in pixels.
        overlap: Pixels that neighbours share, (in x, in y).
        min_size_ratio: Smallest part of its size that a box may keep, from 0 to 1.
        keep_empty: Whether tiles without a box are kept (for testing, they must be).
        images: Folder that the dataset's `file_name`s start from.
        out: Folder to write to.

    Returns:
        The same dataset with tiles for images. A tile is its image's entry with a new `id`,
        `width` and `height`, and with `corner` (`[x1, y1, x2, y2]` in the image) and
        `original_image_id`; where files are written, also with the file's name. An annotation has
        a new `id`, `image_id`, `bbox`, `area` (of the box) and `size` (its square root), the old
        id as `original_annotation_id`, and every other key as it was, except `segmentation` and
        keypoints, which are dropped.

    Raises:
        FileExistsError: If there is another file where one would be written.
        TypeError: If the dataset holds what JSON cannot.
        ValueError: If an option makes no sense; if an entry of the dataset is incomplete, mistyped,
            not finite, negative in size, there twice, or a tile already; if an annotation's image
            is not there; or if a file is no image, or not as large as the dataset has it.

    Examples:
        >>> person = {"id": 1, "image_id": 7, "bbox": [600, 10, 20, 30], "ignore": True}
        >>> image = {"id": 7, "width": 1280, "height": 512}
        >>> tiles = cut_dataset({"images": [image], "annotations": [person]})
        >>> [tile["corner"] for tile in tiles["images"]]
        [[0, 0, 640, 512], [590, 0, 1230, 512], [640, 0, 1280, 512]]
        >>> [(a["image_id"], a["bbox"], a["ignore"]) for a in tiles["annotations"]]
        [(1, [600.0, 10.0, 20.0, 30.0], True), (2, [10.0, 10.0, 20.0, 30.0], True)]
    """
    _check_options(tile_size, overlap, min_size_ratio)
    if (images is None) != (out is None):
        raise ValueError(f"images is {images!r} and out {out!r}, expected both or neither")

    name, coco, found = _coco.read(dataset, _Dataset, "dataset")
    known = _coco.positions(f"{name}.images", (image.id for image in found.images))
    _coco.positions(f"{name}.annotations", (annotation.id for annotation in found.annotations))
    where = f"{name}.annotations"
    owners = _coco.references(where, [a.image_id for a in found.annotations], known)
    boxes = _coco.boxes(where, found.annotations)
    by_image = np.argsort(owners, kind="stable")
    edges = np.searchsorted(owners[by_image], np.arange(len(found.images) + 1))

    tiles: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, (image, entry) in enumerate(zip(found.images, coco["images"], strict=True)):
        if image.corner is not None:
            raise ValueError(f"{name}.images[{index}]: has a corner, expected no tile but an image")
        corners = _corners((image.width, image.height), tile_size, overlap)
        own = by_image[edges[index] : edges[index + 1]]
        clipped, kept = _clip(boxes[own], corners, min_size_ratio)
        for corner, tile_boxes, tile_kept in zip(corners.tolist(), clipped, kept, strict=True):
            if not (keep_empty or tile_kept.any()):
                continue
            x1, y1, x2, y2 = corner
            tile = {"id": len(tiles) + 1, "width": x2 - x1, "height": y2 - y1, "corner": corner}
            tiles.append({**entry, **tile, "original_image_id": image.id})
            for position in np.flatnonzero(tile_kept).tolist():
                original = coco["annotations"][own[position]]
                box = tile_boxes[position].tolist()
                area = box[2] * box[3]
                annotations.append(
                    {key: value for key, value in original.items() if key not in _NOT_CUT}
                    | {"id": len(annotations) + 1, "image_id": tile["id"], "bbox": box}
                    | {"area": area, "size": math.sqrt(area)}
                    | {"original_annotation_id": original["id"]}
                )
    result: dict[str, Any] = {**coco, "images": tiles, "annotations": annotations}
    if images is not None and out is not None:
        sizes = {image.id: (image.width, image.height) for image in found.images}
        write_tiles(result, sizes, Path(images), Path(out), name)
    return result


def merge_detections(
    detections: _coco.Source | Sequence[Mapping[str, Any]],
    tiles: _coco.Source | Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Brings detections on tiles onto the whole images, each object once.

    Boxes are shifted by their tile's corner; then one non-maximum suppression for each image, over
    all of its tiles and all categories, removes every box that overlaps a better one by half. The
    overlap is the protocol's: IoU with one pixel added to every side and every overlap, which for
    tiny boxes is more than the true one. Of equal scores the first wins.

    Args:
        detections: COCO results on tiles: dicts with `image_id`, `bbox` and `score`, or the path
            to a JSON file of them.
        tiles: What `cut_dataset` returned, or the path to it as JSON.

    Returns:
        The detections that are left, in their order, with the original's `image_id` and a `bbox`
        in its pixels, and every other key as it was, except `segmentation` and keypoints.

    Raises:
        TypeError: If an argument holds what JSON cannot.
        ValueError: If an entry is incomplete, mistyped, not finite or negative in size, or if a
            detection's tile is not there.

    Examples:
        >>> image = {"id": 7, "width": 1230, "height": 512}
        >>> tiles = cut_dataset({"images": [image], "annotations": []})
        >>> left = {"image_id": 1, "bbox": [600, 10, 20, 30], "score": 0.7}
        >>> right = {"image_id": 2, "bbox": [10, 12, 20, 30], "score": 0.8}
        >>> merge_detections([left, right], tiles)
        [{'image_id': 7, 'bbox': [600.0, 12.0, 20.0, 30.0], 'score': 0.8}]
    """
    tiles_name, _, cut = _coco.read(tiles, _Tiles, "tiles")
    known = _coco.positions(f"{tiles_name}.images", (tile.id for tile in cut.images))
    name, results, found = _coco.read(detections, list[_Detection], "detections")
    owners = _coco.references(name, [detection.image_id for detection in found], known)
    boxes = _coco.boxes(name, found)
    scores = np.array([detection.score for detection in found], np.float64)
    if not np.isfinite(scores).all():
        index = int(np.argmin(np.isfinite(scores)))
        raise ValueError(f"{name}[{index}]: score {scores[index]}, expected a finite number")

    boxes[:, :2] += np.array([t.corner[:2] for t in cut.images], np.float64).reshape(-1, 2)[owners]
    image = np.array([tile.original_image_id for tile in cut.images], np.int64)[owners]
    # IoU with one pixel added is the plain IoU of boxes whose far corners are one pixel further.
    grown = torch.from_numpy(np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:] + 1]))
    by_image = np.argsort(image, kind="stable")
    kept = np.zeros(len(found), np.bool_)
    for own in np.split(by_image, np.flatnonzero(np.diff(image[by_image])) + 1):
        best = nms(grown[own], torch.from_numpy(scores[own]), _JUST_BELOW_HALF)
        kept[own[best.numpy()]] = True
    for result, image_id, box in zip(results, image.tolist(), boxes.tolist(), strict=True):
        result.update(image_id=image_id, bbox=box)
        for key in _NOT_CUT & result.keys():
            del result[key]
    return list(compress(results, kept.tolist()))


def _check_options(
    tile_size: tuple[int, int], overlap: tuple[int, int], min_size_ratio: float
) -> None:
    if not all(0 <= shared < side for shared, side in zip(overlap, tile_size, strict=True)):
        raise ValueError(
            f"overlap {overlap}, expected 0 or more and less than tile_size {tile_size}"
        )
    if not 0 <= min_size_ratio <= 1:
        raise ValueError(f"min_size_ratio {min_size_ratio}, expected a number from 0 to 1")


def _corners(
    image_size: tuple[int, int], tile_size: tuple[int, int], overlap: tuple[int, int]
) -> NDArray[np.int64]:
    """The tiles of an image, `[T, 4]` as `xyxy`, row by row."""
    spans = []
    for length, side, shared in zip(image_size, tile_size, overlap, strict=True):
        count = max(1, math.ceil((length - shared) / (side - shared)))
        starts = np.minimum(np.arange(count) * (side - shared), max(0, length - side))
        spans.append(np.stack([starts, np.minimum(starts + side, length)]))
    (left, right), (top, bottom) = spans
    y1, x1 = np.meshgrid(top, left, indexing="ij")
    y2, x2 = np.meshgrid(bottom, right, indexing="ij")
    return np.stack([x1, y1, x2, y2], -1).reshape(-1, 4)


def _clip(
    boxes: NDArray[np.float64], corners: NDArray[np.int64], min_size_ratio: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Boxes in each tile's pixels, `[T, N, 4]` as `xywh`, and whether enough is left, `[T, N]`."""
    low = np.maximum(boxes[:, :2], corners[:, None, :2])
    high = np.minimum(boxes[:, :2] + boxes[:, 2:], corners[:, None, 2:])
    inside = (low == boxes[:, :2]) & (high == boxes[:, :2] + boxes[:, 2:])
    # A side that isn't cut stays what it was to the last digit.
    sides = np.where(inside, boxes[:, 2:], np.maximum(high - low, 0))
    size, whole = np.sqrt(sides.prod(-1)), np.sqrt(boxes[:, 2:].prod(-1))
    left = np.divide(size, whole, out=np.zeros_like(size), where=size > 0)
    kept = (left > 0) & (left >= min_size_ratio)
    return np.concatenate([low - corners[:, None, :2], sides], -1), kept
