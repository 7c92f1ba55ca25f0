"""Images and boxes item by item: pairs of size and boxes, and torchvision-style data sets."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat
from tqdm import tqdm

from alphafpn.estimate.columns import (
    MAX_SIDE,
    OTHER,
    SIZE,
    Annotations,
    check_categories,
    clip,
    describe,
)

_ITEM = "((height, width), boxes) or (image, target) with `boxes` in a target dict"


def read_items(dataset: object, wanted: set[int] | None, progress: bool) -> Annotations:
    """Turns the items of an iterable or of a map-style dataset into columns."""
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
        check_categories(wanted, set(np.unique(label).tolist()), "dataset")
        reasons[~np.isin(label, list(wanted))] = OTHER
    return clip(np.array(sizes, np.int64), np.concatenate(boxes), counts, reasons)


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
        f" a torchvision-style dataset, found {describe(dataset)}"
        + "; give its `.dataset`"
        * isinstance(dataset, DataLoader)
    )


def _read_item(
    item: object, where: str
) -> tuple[tuple[int, int], npt.NDArray[np.float32], Mapping[Any, Any]]:
    """Returns size, `xyxy` boxes and target (empty where there is none) of an item."""
    if not (isinstance(item, (tuple, list)) and len(item) == 2):
        raise TypeError(f"{where}: expected {_ITEM}, found {describe(item)}")
    image, target = item
    if not isinstance(target, Mapping):
        return _size(image, where), _boxes(target, where), {}
    if "boxes" not in target:
        raise ValueError(
            f"{where}: expected `boxes` in the target, found {reprlib.repr(list(target))} (datasets"
            " of torchvision have them after torchvision.datasets.wrap_dataset_for_transforms_v2)"
        )
    boxes = target["boxes"]
    found = _image_size(image), boxes.canvas_size if isinstance(boxes, BoundingBoxes) else None
    sizes = [_size(size, where) for size in found if size]
    if not sizes:
        raise TypeError(f"{where}: expected a PIL image or a tensor, found {describe(image)}")
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


def _size(value: Any, where: str) -> tuple[int, int]:
    try:
        height, width = map(operator.index, value)
        if min(height, width) >= 1 and max(height, width) <= MAX_SIDE:
            return height, width
    except (TypeError, ValueError):
        raise TypeError(f"{where}: expected {_ITEM}, found {describe(value)} first") from None
    raise ValueError(f"{where}: expected {SIZE}, found {(height, width)}")


def _boxes(value: Any, where: str) -> npt.NDArray[np.float32]:
    """Returns boxes as float32 `xyxy` `[n, 4]`."""
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
    if not value.numel():  # `BoundingBoxes([], ...)` has shape [1, 0], which cannot be converted
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
            f" {describe(labels)}"
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
            f"{where}: expected a tensor, an array or a regular list, found {describe(value)}"
        ) from error
