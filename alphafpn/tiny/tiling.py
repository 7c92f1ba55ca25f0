"""Large images in tiles: cut a COCO dataset, and bring detections back onto the whole images.

Tiles, boxes and merging follow the TinyPerson protocol. Boxes are COCO's `xywh` in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import nms

from alphafpn.estimate.coco import as_box, as_id, show
from alphafpn.tiny import _coco

if TYPE_CHECKING:
    from PIL import Image

# Whatever else lies in the original's pixels would be wrong in a tile's.
_NOT_CUT = frozenset({"segmentation", "keypoints", "num_keypoints"})
# torchvision suppresses above its threshold, the protocol from its own on.
_JUST_BELOW_HALF = math.nextafter(0.5, 0.0)


def cut_dataset(
    dataset: _coco.Source | Mapping[str, Any],
    *,
    tile_size: tuple[int, int] = (640, 512),
    overlap: tuple[int, int] = (50, 50),
    min_size_ratio: float = 0.7,
    keep_empty: bool = True,
) -> dict[str, Any]:
    """Cuts the images of a COCO dataset into overlapping tiles.

    Tiles lie side by side from the upper left corner; the last of a row or column is shifted back
    to end at the border. An image smaller than a tile gives one tile of its own size.

    A box is clipped to each tile, and is there in those that leave it at least `min_size_ratio` of
    its size, the square root of its area; being marked `ignore` makes no difference to that.

    Nothing is written, and the tiles keep the `file_name` of their image: `read_tile` reads the
    region.

    Args:
        dataset: COCO dict with `images` and `annotations`, or the path to one as JSON.
        tile_size: (width, height) of a tile in pixels.
        overlap: Pixels that neighbours share, (in x, in y).
        min_size_ratio: Smallest part of its size that a box may keep, from 0 to 1.
        keep_empty: Whether tiles without a box are kept (for testing, they must be).

    Returns:
        The same dataset with tiles for images. A tile is its image's entry with a new `id`,
        `width` and `height`, and with `corner` (`[x1, y1, x2, y2]` in the image) and
        `original_image_id`. An annotation has a new `id`, `image_id`, `bbox`, `area` (of the box)
        and `size` (its square root), the old id as `original_annotation_id` if it had one, and
        every other key as it was, except `segmentation` and keypoints, which are dropped. Broken
        annotations are left out, with a warning.

    Raises:
        TypeError: If the dataset holds what JSON cannot.
        ValueError: If an option makes no sense; if the data is no COCO data set, or an image has
            no usable size or is a tile already.

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
    coco, columns, rows = _coco.read(dataset, "dataset")
    owners, boxes = columns.image_index[rows], columns.boxes[rows]
    by_image = np.argsort(owners, kind="stable")
    edges = np.searchsorted(owners[by_image], np.arange(len(columns.image_ids) + 1))

    tiles: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, (size, entry) in enumerate(zip(columns.image_sizes, coco["images"], strict=True)):
        if entry.get("corner") is not None:
            raise ValueError(
                f"dataset: images[{index}]: expected an image, found a tile (`corner`)"
            )
        corners = _corners((size[1], size[0]), tile_size, overlap)
        own = by_image[edges[index] : edges[index + 1]]
        clipped, kept = _clip(boxes[own], corners, min_size_ratio)
        for corner, tile_boxes, tile_kept in zip(corners.tolist(), clipped, kept, strict=True):
            if not (keep_empty or tile_kept.any()):
                continue
            x1, y1, x2, y2 = corner
            tile = {"id": len(tiles) + 1, "width": x2 - x1, "height": y2 - y1, "corner": corner}
            tiles.append({**entry, **tile, "original_image_id": columns.image_ids[index]})
            for position in np.flatnonzero(tile_kept).tolist():
                original = coco["annotations"][rows[own[position]]]
                box = tile_boxes[position].tolist()
                area = box[2] * box[3]
                annotations.append(
                    {key: value for key, value in original.items() if key not in _NOT_CUT}
                    | {"id": len(annotations) + 1, "image_id": tile["id"], "bbox": box}
                    | {"area": area, "size": math.sqrt(area)}
                    | ({"original_annotation_id": original["id"]} if "id" in original else {})
                )
    return {**coco, "images": tiles, "annotations": annotations}


def read_tile(tile: Mapping[str, Any], images: _coco.Source) -> Image.Image:
    """Reads a tile's pixels: its region of the image's file, or the whole of a file of its size.

    Args:
        tile: An entry of `images` in what `cut_dataset` returned.
        images: Folder that its `file_name` starts from.

    Returns:
        The tile in RGB, as `torchvision.datasets.CocoDetection` would give it.

    Raises:
        OSError: If the file is missing or no complete image.
        ValueError: If the image is too small.

    Examples:
        >>> import tempfile
        >>> from PIL import Image
        >>> tile = {"id": 1, "width": 4, "height": 3, "corner": [5, 0, 9, 3], "file_name": "a.png"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (9, 6)).save(Path(folder, "a.png"))
        ...     read_tile(tile, folder).size
        (4, 3)
    """
    from PIL import Image

    path = Path(images) / tile["file_name"]
    with Image.open(path) as file:
        image = file.convert("RGB")
    if image.size == (tile["width"], tile["height"]):
        return image
    _, _, right, bottom = tile["corner"]
    if right > image.width or bottom > image.height:
        expected = f"at least {right} x {bottom} for tile {tile['id']}"
        raise ValueError(f"{path}: expected {expected}, found {image.width} x {image.height}")
    return image.crop(tile["corner"])


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
    cut, columns, _ = _coco.read(tiles, "tiles", need_sizes=False)
    _, found = _coco.read_detections(detections, "detections", columns.image_ids)
    originals, corners = [], np.empty((len(columns.image_ids), 2))
    for index, tile in enumerate(cut["images"]):
        originals.append(as_id(tile.get("original_image_id")))
        corner = as_box(tile.get("corner"))
        if originals[-1] is None or not np.isfinite(corner).all() or not corner:
            raise ValueError(
                f"tiles: images[{index}]: expected `corner` and `original_image_id`, as"
                f" cut_dataset gives them, found {show(tile)}"
            )
        corners[index] = corner[:2]
    boxes = found.boxes
    boxes[:, :2] += corners[found.image_index]
    first = {original: index for index, original in reversed(list(enumerate(originals)))}
    image = np.array([first[original] for original in originals], np.int64)[found.image_index]
    # IoU with one pixel added is the plain IoU of boxes whose far corners are one pixel further.
    grown = torch.from_numpy(np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:] + 1]))
    by_image = np.argsort(image, kind="stable")
    kept = np.zeros(len(boxes), np.bool_)
    for own in np.split(by_image, np.flatnonzero(np.diff(image[by_image])) + 1):
        best = nms(grown[own], torch.from_numpy(found.scores[own]), _JUST_BELOW_HALF)
        kept[own[best.numpy()]] = True
    for result, index, box in zip(found.entries, image.tolist(), boxes.tolist(), strict=True):
        result.update(image_id=originals[index], bbox=box)
        for key in _NOT_CUT & result.keys():
            del result[key]
    return list(compress(found.entries, kept.tolist()))


def _check_options(
    tile_size: tuple[int, int], overlap: tuple[int, int], min_size_ratio: float
) -> None:
    if not all(0 <= shared < side for shared, side in zip(overlap, tile_size, strict=True)):
        raise ValueError(
            f"overlap: expected 0 or more and less than tile_size {tile_size}, found {overlap}"
        )
    if not 0 <= min_size_ratio <= 1:
        raise ValueError(f"min_size_ratio: expected a number from 0 to 1, found {min_size_ratio}")


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
