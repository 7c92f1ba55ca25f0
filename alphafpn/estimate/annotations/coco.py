"""Turn what a user has into image sizes and boxes: a COCO file, an iterable, a torchvision dataset.

Knows no model. Boxes come out in the pixels of the original images, after the filters that
torchvision's references apply before training. Every step is float32, in their order of operations,
so that the boxes are those a detector would be trained on, to the last bit.
"""

from __future__ import annotations

import gc
import mmap
import operator
import os
import re
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import CocoDetection
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat
from tqdm import tqdm

_Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
# Beyond this, float32 can no longer tell one pixel from the next.
_MAX_SIDE = 2**24
_SIZE = f"(height, width), two ints from 1 to {_MAX_SIDE}"
# Why a box is left out, by code; the first that holds counts, and 0 means that it is kept.
_REASONS = ("", "other categories", "crowd", "ignore", "zero size", "outside the image")
_OTHER, _CROWD, _IGNORE, _ZERO, _OUTSIDE = range(1, 6)
_ITEM = "((height, width), boxes) or (image, target) with `boxes` in a target dict"


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
    """

    sizes: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float32]
    counts: npt.NDArray[np.int64]
    num_clipped: int
    left_out: dict[str, int]


def read_annotations(
    dataset: object, *, category_ids: Collection[int] | None = None, progress: bool = False
) -> Annotations:
    """Read image sizes and boxes, opening no image where the annotations hold the sizes.

    Args:
        dataset: One of

            - a path to a COCO-format JSON file. Crowd and `ignore` boxes are left out. Keys other
              than `images` (`id`, `width`, `height`), `annotations` (`image_id`, `category_id`,
              `bbox`, `iscrowd`, `ignore`) and `categories` (`id`) are skipped unchecked; ids of
              annotations appear in messages only and may repeat;
            - a `torchvision.datasets.CocoDetection`, also wrapped for `transforms.v2` or behind
              `Subset`s: read through its annotations as a file would be, for its `ids` only, as
              they are before any transform;
            - an iterable of `((height, width), boxes)`, boxes `[n, 4]` `xyxy` in original pixels as
              tensor, array or list;
            - an iterable or a map-style dataset of `(image, target)` with `target["boxes"]` as
              before or as `BoundingBoxes` of any unrotated format, in pixels of that image. Items
              are loaded; sizes come from the image or the boxes' `canvas_size`.
        category_ids: Take only boxes of these categories: COCO ids, or `target["labels"]`.
        progress: Show a progress bar on stderr while items are loaded.

    Returns:
        The columns. Images without boxes stay in. Boxes are clipped to their images; those of zero
        size and those wholly outside are left out and counted.

    Raises:
        TypeError: If `dataset` is none of these, or an item has the wrong types.
        ValueError: If the content is malformed (the message names the place in it, what was found
            and what was expected), a category is unknown, or no boxes are left.
        OSError: If the file cannot be read.
    """
    wanted = None if category_ids is None else _category_ids(category_ids)
    if isinstance(dataset, (str, os.PathLike)):
        name = os.fsdecode(dataset)
        annotations = _read_coco(_decode(dataset, name), None, name, wanted)
    elif (selected := _coco_selection(dataset)) is not None:
        name = type(dataset).__name__
        annotations = _read_coco(_convert(selected[0], name), selected[1], name, wanted)
    else:
        name = "dataset"
        annotations = _read_items(dataset, wanted, progress)
    if len(annotations.boxes) == 0:
        left_out = ", ".join(f"{n} {reason}" for reason, n in annotations.left_out.items())
        raise ValueError(
            f"{name}: expected boxes to count, found none in {len(annotations.sizes)} images"
            f" (left out: {left_out or 'none'})"
        )
    return annotations


class _Image(msgspec.Struct, gc=False):
    id: _Int64
    width: _Int64
    height: _Int64


class _Annotation(msgspec.Struct, gc=False):
    image_id: _Int64
    category_id: int
    bbox: tuple[float, float, float, float]
    id: int | str | None = None
    iscrowd: bool | int = 0
    ignore: bool | int = 0


class _Category(msgspec.Struct, gc=False):
    id: int


class _Coco(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category] = []


def _decode(path: str | os.PathLike[str], name: str) -> _Coco:
    """Decode a COCO file; the types hold the needed keys alone, so polygons are never built."""
    data: mmap.mmap | bytes
    with open(path, "rb") as file:
        try:
            # Decoding from the page cache spares a copy of the file.
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):  # a pipe, or an empty file
            data = file.read()
    if len(data) == 0:
        raise ValueError(f"{name}: expected COCO-format JSON, found an empty file")
    # Nothing decoded can be part of a cycle; looking for some takes longer than decoding.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return msgspec.json.decode(data, type=_Coco)
    except RecursionError:
        raise ValueError(f"{name}: expected COCO-format JSON, found it nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected UTF-8, found {error.object[:40]!r}") from error
    except msgspec.ValidationError as error:
        raise ValueError(f"{name}: {_explain(error)}") from error
    except msgspec.DecodeError as error:
        at = re.search(r"\(byte (\d+)\)", str(error))
        # The file may be one long line: quote what is there. Without a byte, it is the end.
        byte = int(at[1]) if at else len(data)
        near = data[max(0, byte - 20) : byte + 20]
        raise ValueError(f"{name}: {error}, near {near!r}") from error
    finally:
        if collecting:
            gc.enable()


def _convert(coco: Any, name: str) -> _Coco:
    """Convert the dicts that a pycocotools `COCO` holds."""
    try:
        return msgspec.convert(coco.dataset, type=_Coco)
    except msgspec.ValidationError as error:
        raise ValueError(f"{name}: {_explain(error)}") from error


def _explain(error: Exception) -> str:
    if "$" in str(error):
        return str(error)
    return f"{error}; expected a COCO-format object with `images` and `annotations`"


def _coco_selection(dataset: object) -> tuple[Any, list[int]] | None:
    """Return the `COCO` object and the image ids of a `CocoDetection`, or of a `Subset` of one."""
    if isinstance(dataset, CocoDetection):
        return dataset.coco, dataset.ids
    if isinstance(dataset, Subset):
        inner = _coco_selection(dataset.dataset)
        if inner is not None:
            return inner[0], [inner[1][index] for index in dataset.indices]
    return None


def _read_coco(
    coco: _Coco, image_ids: list[int] | None, name: str, wanted: set[int] | None
) -> Annotations:
    """Turn decoded annotations into columns, for all images or for those of `image_ids`."""
    images, annotations = coco.images, coco.annotations
    if not images:
        raise ValueError(f"{name}: expected images, found an empty list")
    if wanted is not None:
        known = {c.id for c in coco.categories} | {a.category_id for a in annotations}
        _check_categories(wanted, known, name)
    ids = _column(images, "id", np.int64)
    sizes = np.stack([_column(images, side, np.int64) for side in ("height", "width")], axis=1)
    _check_images(ids, sizes, name)

    owner = _column(annotations, "image_id", np.int64)
    boxes = _xywh(annotations, name)
    # Sorted by image, the annotations of an image are one range.
    ordered, order = (column.numpy() for column in torch.sort(torch.from_numpy(owner), stable=True))
    unique, inverse = np.unique(ids, return_inverse=True)
    first = np.searchsorted(ordered, unique, side="left")[inverse]
    counts = np.searchsorted(ordered, unique, side="right")[inverse] - first
    if counts.sum() != len(annotations):
        index = int(np.isin(owner, ids).argmin())
        raise ValueError(
            f"{name}: annotations[{index}] (id {annotations[index].id}): expected the id of one of"
            f" the {len(images)} images as image_id, found {owner[index]}"
        )
    if image_ids is not None:
        position = {image_id: index for index, image_id in enumerate(ids.tolist())}
        if missing := [image_id for image_id in image_ids if image_id not in position]:
            raise ValueError(
                f"{name}: ids: expected ids of the {len(images)} images, found {missing[0]!r}"
            )
        take = np.array([position[image_id] for image_id in image_ids], np.int64)
        sizes, first, counts = sizes[take], first[take], counts[take]
    start = np.cumsum(counts) - counts
    rows = order[np.repeat(first - start, counts) + np.arange(counts.sum())]

    flags = (_CROWD if a.iscrowd else _IGNORE if a.ignore else 0 for a in annotations)
    reasons = np.fromiter(flags, np.int8, len(annotations))
    if wanted is not None:
        others = np.fromiter((a.category_id not in wanted for a in annotations), np.bool_)
        reasons[others] = _OTHER
    boxes = boxes.take(rows, axis=0)
    with np.errstate(over="ignore"):
        boxes[:, 2:] += boxes[:, :2]
    return _clip(sizes, boxes, counts, reasons.take(rows))


def _xywh(annotations: list[_Annotation], name: str) -> npt.NDArray[np.float32]:
    """Return the boxes as they are in the file, `[A, 4]`."""
    values = chain.from_iterable(map(attrgetter("bbox"), annotations))
    numbers = np.fromiter(values, np.float64, 4 * len(annotations))
    with np.errstate(over="ignore"):
        boxes = numbers.astype(np.float32).reshape(-1, 4)
    good = np.isfinite(boxes).all(axis=1) & (boxes[:, 2] >= 0) & (boxes[:, 3] >= 0)
    if not good.all():
        index = int(good.argmin())
        raise ValueError(
            f"{name}: annotations[{index}] (id {annotations[index].id}): expected a bbox"
            " [x, y, width, height] that is finite in float32 and has no negative size, found"
            f" {list(annotations[index].bbox)}"
        )
    return boxes


def _column(structs: list[Any], field: str, dtype: type[np.generic]) -> npt.NDArray[Any]:
    return np.fromiter(map(attrgetter(field), structs), dtype, len(structs))


def _check_images(ids: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], name: str) -> None:
    bad = ((sizes < 1) | (sizes > _MAX_SIDE)).any(axis=1)
    if bad.any():
        index = int(bad.argmax())
        raise ValueError(
            f"{name}: images[{index}] (id {ids[index]}): expected {_SIZE}, found"
            f" {tuple(sizes[index].tolist())}"
        )
    unique, occurrences = np.unique(ids, return_counts=True)
    if len(unique) != len(ids):
        repeated = unique[occurrences.argmax()]
        first, second = np.flatnonzero(ids == repeated)[:2]
        raise ValueError(
            f"{name}: images[{second}]: expected an id of its own, found {repeated}, which"
            f" images[{first}] has"
        )


def _read_items(dataset: object, wanted: set[int] | None, progress: bool) -> Annotations:
    """Turn the items of an iterable or of a map-style dataset into columns."""
    sizes, boxes, labels = [], [], []
    total = len(dataset) if isinstance(dataset, Sized) else None
    bar = tqdm(_items(dataset), total=total, unit="image", disable=not progress)
    for index, item in enumerate(bar):
        where = f"dataset[{index}]"
        size, box, target = _read_item(item, where)
        sizes.append(size)
        boxes.append(box)
        if wanted is not None:
            labels.append(_labels(target, len(box), where))
    if not sizes:
        raise ValueError("dataset: expected images, found none")
    counts = np.array([len(box) for box in boxes], np.int64)
    reasons = np.zeros(counts.sum(), np.int8)
    if wanted is not None:
        label = np.concatenate(labels)
        _check_categories(wanted, set(np.unique(label).tolist()), "dataset")
        reasons[~np.isin(label, list(wanted))] = _OTHER
    return _clip(np.array(sizes, np.int64), np.concatenate(boxes), counts, reasons)


def _items(dataset: object) -> Iterator[object]:
    if isinstance(dataset, (Mapping, bytes, torch.Tensor, np.ndarray, DataLoader)):
        pass
    elif isinstance(dataset, Iterable):
        return iter(dataset)
    elif isinstance(dataset, Sized) and hasattr(dataset, "__getitem__"):
        # Without `__iter__`, Python would go on until an IndexError that datasets need not raise.
        return map(dataset.__getitem__, range(len(dataset)))
    raise TypeError(
        "dataset: expected a path to a COCO-format JSON, an iterable of ((height, width), boxes) or"
        f" a torchvision-style dataset, found {_describe(dataset)}"
        + "; give its `.dataset`"
        * isinstance(dataset, DataLoader)
    )


def _read_item(
    item: object, where: str
) -> tuple[tuple[int, int], npt.NDArray[np.float32], Mapping[Any, Any]]:
    """Return size, `xyxy` boxes and target (empty where there is none) of an item."""
    if not (isinstance(item, (tuple, list)) and len(item) == 2):
        raise TypeError(f"{where}: expected {_ITEM}, found {_describe(item)}")
    image, target = item
    if not isinstance(target, Mapping):
        return _size(image, where), _boxes(target, where), {}
    if "boxes" not in target:
        raise ValueError(
            f"{where}: expected `boxes` in the target, found {reprlib.repr(list(target))} (datasets"
            " of torchvision have them after torchvision.datasets.wrap_dataset_for_transforms_v2)"
        )
    boxes = target["boxes"]
    sizes = [_size(size, where) for size in (_image_size(image), _canvas_size(boxes)) if size]
    if not sizes:
        raise TypeError(f"{where}: expected a PIL image or a tensor, found {_describe(image)}")
    if sizes[0] != sizes[-1]:
        raise ValueError(
            f"{where}: expected boxes on a canvas of the image's (height, width) {sizes[0]}, found"
            f" canvas_size {sizes[1]}"
        )
    return sizes[0], _boxes(boxes, where), target


def _image_size(image: Any) -> tuple[int, ...] | None:
    if isinstance(image, torch.Tensor):
        return tuple(image.shape[-2:])
    if hasattr(image, "height") and hasattr(image, "width"):
        return image.height, image.width
    return None


def _canvas_size(boxes: object) -> tuple[int, ...] | None:
    return boxes.canvas_size if isinstance(boxes, BoundingBoxes) else None


def _size(value: Any, where: str) -> tuple[int, int]:
    try:
        height, width = map(operator.index, value)
        if min(height, width) >= 1 and max(height, width) <= _MAX_SIDE:
            return height, width
    except (TypeError, ValueError):
        raise TypeError(f"{where}: expected {_ITEM}, found {_describe(value)} first") from None
    raise ValueError(f"{where}: expected {_SIZE}, found {(height, width)}")


def _boxes(value: Any, where: str) -> npt.NDArray[np.float32]:
    """Return boxes as float32 `xyxy` `[n, 4]`."""
    array = _array(_xyxy(value, where), where)
    if array.size == 0 and array.ndim <= 2 and array.shape[-1] in (0, 4):
        return np.empty((0, 4), dtype=np.float32)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{where}: expected boxes of floats or ints, found {array.dtype}")
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(f"{where}: expected boxes of shape (n, 4), found {array.shape}")
    with np.errstate(over="ignore"):
        boxes = array.astype(np.float32)
    good = np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] >= boxes[:, :2]).all(axis=1)
    if not good.all():
        index = int(good.argmin())
        raise ValueError(
            f"{where}: boxes[{index}]: expected [x1, y1, x2, y2] finite in float32 with x1 <= x2"
            f" and y1 <= y2, found {array[index].tolist()}"
        )
    return boxes


def _xyxy(value: Any, where: str) -> Any:
    if not isinstance(value, BoundingBoxes) or value.format is BoundingBoxFormat.XYXY:
        return value
    if value.numel() == 0:  # `BoundingBoxes([], ...)` has shape [1, 0], which cannot be converted
        return value
    if value.format not in (BoundingBoxFormat.XYWH, BoundingBoxFormat.CXCYWH):
        raise ValueError(f"{where}: expected unrotated boxes, found {value.format.value}")
    # Few need it, and it is slow to import.
    from torchvision.transforms.v2.functional import convert_bounding_box_format

    return convert_bounding_box_format(
        value.as_subclass(torch.Tensor).float(), value.format, BoundingBoxFormat.XYXY
    )


def _labels(target: Mapping[Any, Any], count: int, where: str) -> npt.NDArray[np.int64]:
    if "labels" not in target:
        raise ValueError(f"{where}: expected `labels` to choose category_ids by, found none")
    labels = _array(target["labels"], where)
    if labels.shape != (count,) or (count and labels.dtype.kind not in "iu"):
        raise ValueError(
            f"{where}: expected one integer label for each of {count} boxes, found"
            f" {_describe(labels)}"
        )
    return labels.astype(np.int64)


def _array(value: Any, where: str) -> npt.NDArray[Any]:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return np.asarray(value.float() if value.is_floating_point() else value)
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{where}: expected a tensor, an array or a regular list, found {_describe(value)}"
        ) from error


def _clip(
    sizes: npt.NDArray[np.int64],
    boxes: npt.NDArray[np.float32],
    counts: npt.NDArray[np.int64],
    reasons: npt.NDArray[np.int8],
) -> Annotations:
    """Clip `xyxy` boxes to their images, in place, and drop those with a reason or without area."""
    reasons[(reasons == 0) & ~_has_area(boxes)] = _ZERO
    limits = np.repeat(np.tile(sizes[:, ::-1], 2).astype(np.float32), counts, axis=0)
    # Beyond what rounding in a labelling tool explains.
    beyond = (boxes < -1).any(axis=1) | (boxes > limits + 1).any(axis=1)
    np.clip(boxes, 0, limits, out=boxes)
    reasons[(reasons == 0) & ~_has_area(boxes)] = _OUTSIDE
    keep = reasons == 0
    image = np.repeat(np.arange(len(sizes)), counts)
    totals = np.bincount(reasons, minlength=len(_REASONS)).tolist()
    left_out = {r: n for r, n in zip(_REASONS, totals, strict=True) if r and n}
    counts = np.bincount(image[keep], minlength=len(sizes))
    num_clipped = int((beyond & keep).sum())
    return Annotations(sizes, boxes.compress(keep, axis=0), counts, num_clipped, left_out)


def _has_area(boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def _category_ids(category_ids: Collection[int]) -> set[int]:
    try:
        return {operator.index(category) for category in category_ids}
    except TypeError:
        raise TypeError(
            f"category_ids: expected a collection of ints, found {_describe(category_ids)}"
        ) from None


def _check_categories(wanted: set[int], known: set[int], name: str) -> None:
    if unknown := wanted - known:
        raise ValueError(
            f"{name}: expected category_ids among {_listed(known)}, found {_listed(unknown)}"
        )


def _listed(numbers: set[int]) -> str:
    shown = sorted(numbers)
    if len(shown) > 100:
        return f"{', '.join(map(str, shown[:100]))}, ... ({len(shown)} in all)"
    return ", ".join(map(str, shown)) or "none"


def _describe(value: object) -> str:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{type(value).__name__} of shape {tuple(value.shape)} and dtype {value.dtype}"
    if isinstance(value, (tuple, list, int, float, str, type(None))):
        # On one line: a tensor inside would bring its own.
        return f"{type(value).__name__} {' '.join(reprlib.repr(value).split())}"
    return type(value).__name__
