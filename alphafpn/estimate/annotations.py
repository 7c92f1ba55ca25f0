"""`read_annotations`: image sizes and boxes as columns, from a COCO file or any kind of data set.

Knows no model. Boxes are in pixels of the original images, after the filters that torchvision's
references apply before training, in float32 and in their order of operations: they are the boxes
that a detector would be trained on, to the last bit.
"""

from __future__ import annotations

import operator
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import CocoDetection
from torchvision.tv_tensors import BoundingBoxes
from tqdm import tqdm

from alphafpn.estimate.checks import to_xyxy
from alphafpn.estimate.coco import (
    MAX_SIDE,
    OTHER,
    OUTSIDE,
    REASONS,
    SIZE,
    ZERO,
    Id,
    as_id,
    read_coco,
    show,
)

_ITEM = (
    "((height, width), boxes), (image, target) with `boxes` in a target dict, or a dict with"
    " `image` and `boxes` or `bbox_xyxy`"
)


@dataclass(frozen=True, eq=False)
class Annotations:
    """Image sizes and ground-truth boxes as columns, in pixels of the original images.

    Attributes:
        image_sizes: (height, width) of each image, int64 `[M, 2]`.
        boxes: `xyxy`, float32 `[G, 4]`, clipped to their images, in the order of the images.
        boxes_per_image: int64 `[M]`.
        num_clipped: Boxes that reached beyond their image by more than a pixel.
        num_fit_swapped: Of these, and of those outside their image, how many would fit it if its
            width and height were swapped.
        left_out: Boxes that were left out, by the first of their `coco.REASONS`.
        notes: What else a user should know, with the number of boxes it is about.
        files: Name and number of images of each file that was read.
    """

    image_sizes: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float32]
    boxes_per_image: npt.NDArray[np.int64]
    num_clipped: int = 0
    num_fit_swapped: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    files: tuple[tuple[str, int], ...] = ()

    def place(self, image: int) -> str:
        """Returns the words by which a message names an image."""
        first = 0
        for name, count in self.files:
            if image < first + count:
                return f"{name}: images[{image - first}]"
            first += count
        return f"image {image}"


def read_annotations(
    dataset: object,
    *,
    category_ids: Collection[Id] | None = None,
    progress: bool = False,
    allow_empty: bool = False,
) -> Annotations:
    """Reads the data sets that `estimate_alpha_for` takes, and their errors are its errors.

    No image is opened if the annotations hold the sizes. Images without boxes stay; boxes of zero
    size, those wholly outside their image and broken annotations are left out and counted. With
    `allow_empty` there may be no images, no boxes or no box of a category, as in one process's
    share of a data set.
    """
    wanted = _wanted(category_ids)
    known: dict[Id, str] = {}
    if sources := _coco_sources(dataset):
        name = sources[0][0] + (f" and {len(sources) - 1} more" if len(sources) > 1 else "")
        # One after the other: another process takes longer to start than a file to read.
        annotations = _concatenate(
            [_from_coco(name, source, ids, wanted, known) for name, source, ids in sources]
        )
    else:
        name = "dataset"
        annotations = _from_items(dataset, wanted, known, progress)
    if allow_empty:
        return annotations
    if unknown := (wanted or set()) - known.keys():
        found = _listing(dict.fromkeys(unknown, ""))
        raise ValueError(f"{name}: expected category_ids among {_listing(known)}, found {found}")
    if len(annotations.boxes) == 0:
        reasons = ", ".join(f"{n} {reason}" for reason, n in annotations.left_out.items())
        raise ValueError(
            f"{name}: expected boxes to count, found none in {len(annotations.image_sizes)} images"
            + (f"; left out were {reasons}" if reasons else "")
        )
    return annotations


def _wanted(category_ids: Any) -> set[Id] | None:
    if category_ids is None:
        return None
    if isinstance(category_ids, Iterable) and not isinstance(category_ids, str | bytes):
        ids = [as_id(category_id) for category_id in category_ids]
        if None not in ids:
            return set(ids)  # type: ignore[arg-type]
    raise TypeError(
        f"category_ids: expected a collection of ints or strings, found {describe(category_ids)}"
    )


def _listing(categories: dict[Id, str]) -> str:
    """Lists ids in order, each with its name if it has one."""
    pairs = sorted(categories.items(), key=lambda pair: (isinstance(pair[0], str), pair[0]))
    shown = [show(i) + (f" {show(name)}" if name else "") for i, name in pairs]
    if len(shown) > 100:
        return f"{', '.join(shown[:100])}, ... ({len(shown)} in all)"
    return ", ".join(shown) or "none"


def _coco_sources(dataset: object) -> list[tuple[str, Any, Sequence[Any] | None]]:
    """Returns name, content and chosen image ids of each COCO file; nothing if there is none."""
    if isinstance(dataset, str | os.PathLike):
        dataset = [dataset]
    if isinstance(dataset, Mapping) and ("images" in dataset or "annotations" in dataset):
        return [("dataset", dataset, None)]
    if (selected := _coco_selection(dataset)) is not None:
        return [(type(dataset).__name__, *selected)]
    if not (
        isinstance(dataset, Sequence) and dataset and isinstance(dataset[0], str | os.PathLike)
    ):
        return []
    for index, path in enumerate(dataset):
        if not isinstance(path, str | os.PathLike):
            found = describe(path)
            raise TypeError(f"dataset[{index}]: expected a path like dataset[0], found {found}")
    return [(path, path, None) for path in map(os.fsdecode, dataset)]


def _coco_selection(dataset: object) -> tuple[Any, list[Any]] | None:
    """Returns content and image ids of a `CocoDetection`, or of a `Subset` of one."""
    if isinstance(dataset, CocoDetection):
        return dataset.coco.dataset, dataset.ids
    if isinstance(dataset, Subset) and (inner := _coco_selection(dataset.dataset)) is not None:
        return inner[0], [inner[1][index] for index in dataset.indices]
    return None


def _from_coco(
    name: str,
    source: Any,
    image_ids: Sequence[Any] | None,
    wanted: set[Id] | None,
    known: dict[Id, str],
) -> Annotations:
    """Reads all images of a COCO file, or those of `image_ids`; adds its categories to `known`."""
    coco = read_coco(source, name)
    reasons, sizes = coco.reasons, coco.image_sizes
    used = {category for category in set(coco.category_ids) if category is not None}
    known.update({**dict.fromkeys(used, ""), **coco.listed})
    if wanted is not None:
        reasons[np.array([c not in wanted for c in coco.category_ids], np.bool_)] = OTHER
    # Sorted by image, the annotations of an image are one range; those on no image come first.
    # Sorting keys without equals is several times as fast as a stable argsort.
    order = np.sort(coco.image_index << 32 | np.arange(len(coco.image_index))) & 0xFFFFFFFF
    per_image = np.bincount(coco.image_index + 1, minlength=len(sizes) + 1)
    first, counts = np.cumsum(per_image)[:-1], per_image[1:]
    nowhere = reasons[order[: per_image[0]]]
    rows = order[per_image[0] :]
    if image_ids is not None:
        position: dict[Id | None, int] = {image: i for i, image in enumerate(coco.image_ids)}
        if missing := [image_id for image_id in image_ids if as_id(image_id) not in position]:
            raise ValueError(
                f"{name}: ids: expected ids of the {len(sizes)} images, found {show(missing[0])}"
            )
        take = np.array([position[as_id(image_id)] for image_id in image_ids], np.int64)
        if len(np.unique(take)) < len(sizes):
            nowhere = nowhere[:0]  # they belong to the whole
        sizes, first, counts = sizes[take], first[take], counts[take]
        start = np.cumsum(counts) - counts
        rows = order[np.repeat(first - start, counts) + np.arange(counts.sum())]
    unlisted = used - coco.listed.keys() if coco.listed else set()
    notes = {"annotations have polygons but no box, and were left out": coco.num_polygons}
    for text, ids in (
        ("boxes are of category 0, which torchvision's R-CNNs take for the background", {0}),
        ("boxes are of a category that `categories` does not list", unlisted),
    ):
        if not used.isdisjoint(ids):
            notes[text] = sum(coco.category_ids[i] in ids for i in rows[reasons[rows] == 0])
    with np.errstate(over="ignore", invalid="ignore"):  # in boxes that are left out
        boxes = coco.boxes.astype(np.float32).take(rows, axis=0)
        boxes[:, 2:] += boxes[:, :2]
    reasons = reasons.take(rows)
    return replace(
        clip(sizes, boxes, counts, reasons),
        left_out=_by_reason(np.append(nowhere, reasons)),
        notes={text: n for text, n in notes.items() if n},
        files=((name, len(sizes)),) if isinstance(source, str) else (),
    )


def _concatenate(parts: Sequence[Annotations]) -> Annotations:
    """Puts the images of all parts in a row, as if they had been read together."""
    left_out = sum((Counter(part.left_out) for part in parts), Counter[str]())
    return Annotations(
        image_sizes=np.concatenate([part.image_sizes for part in parts]),
        boxes=np.concatenate([part.boxes for part in parts]),
        boxes_per_image=np.concatenate([part.boxes_per_image for part in parts]),
        num_clipped=sum(part.num_clipped for part in parts),
        num_fit_swapped=sum(part.num_fit_swapped for part in parts),
        left_out={reason: left_out[reason] for reason in REASONS if reason in left_out},
        notes=dict(sum((Counter(part.notes) for part in parts), Counter[str]())),
        files=tuple(file for part in parts for file in part.files),
    )


def clip(
    image_sizes: npt.NDArray[np.int64],
    boxes: npt.NDArray[np.float32],
    boxes_per_image: npt.NDArray[np.int64],
    reasons: npt.NDArray[np.int8],
) -> Annotations:
    """Clips `xyxy` boxes to their images and drops those with a reason or without area.

    Changes `boxes` and `reasons` in place.
    """
    reasons[(reasons == 0) & ~_has_area(boxes)] = ZERO
    limits = np.repeat(np.tile(image_sizes[:, ::-1], 2).astype(np.float32), boxes_per_image, axis=0)
    # One pixel is what rounding in a labelling tool explains.
    beyond = (boxes < -1).any(axis=1) | (boxes > limits + 1).any(axis=1)
    far = np.flatnonzero(beyond & (reasons == 0))
    fit_swapped = (boxes[far] >= -1) & (boxes[far] <= limits[far][:, [1, 0, 3, 2]] + 1)
    np.clip(boxes, 0, limits, out=boxes)
    reasons[(reasons == 0) & ~_has_area(boxes)] = OUTSIDE
    keep = reasons == 0
    image = np.repeat(np.arange(len(image_sizes)), boxes_per_image)
    return Annotations(
        image_sizes=image_sizes,
        boxes=boxes.compress(keep, axis=0),
        boxes_per_image=np.bincount(image[keep], minlength=len(image_sizes)),
        num_clipped=int((beyond & keep).sum()),
        num_fit_swapped=int(fit_swapped.all(axis=1).sum()),
        left_out=_by_reason(reasons),
    )


def _has_area(boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def _by_reason(reasons: npt.NDArray[np.int8]) -> dict[str, int]:
    totals = np.bincount(reasons, minlength=len(REASONS)).tolist()
    return {reason: n for reason, n in zip(REASONS, totals, strict=True) if reason and n}


def _from_items(
    dataset: object, wanted: set[Id] | None, known: dict[Id, str], progress: bool
) -> Annotations:
    """Reads the items of an iterable or of a map-style data set; adds their labels to `known`."""
    sizes, boxes, labels = [], [np.empty((0, 4), np.float32)], [np.empty(0, np.int64)]
    total = len(dataset) if isinstance(dataset, Sized) else None
    bar = tqdm(_items(dataset), total=total, unit="image", disable=not progress)
    for index, item in enumerate(bar):
        where = f"dataset[{index}]"
        size, box, target = _read_item(item, where)
        sizes.append(size)
        boxes.append(box)
        if wanted is not None:
            labels.append(_labels(target, len(box), where))
    counts = np.array([len(box) for box in boxes[1:]], np.int64)
    reasons = np.zeros(counts.sum(), np.int8)
    if wanted is not None:
        label = np.concatenate(labels)
        known.update(dict.fromkeys(np.unique(label).tolist(), ""))
        reasons[~np.isin(label, [i for i in wanted if isinstance(i, int)])] = OTHER
    image_sizes = np.array(sizes, np.int64).reshape(len(sizes), 2)
    return clip(image_sizes, np.concatenate(boxes), counts, reasons)


def _items(dataset: object) -> Iterator[object]:
    if isinstance(dataset, Mapping | bytes | torch.Tensor | np.ndarray | DataLoader):
        pass
    elif isinstance(dataset, Iterable):
        return iter(dataset)
    elif isinstance(dataset, Sized) and hasattr(dataset, "__getitem__"):
        # Without `__iter__`, Python would go on until an IndexError that data sets need not raise.
        return map(dataset.__getitem__, range(len(dataset)))
    hint = "; give its `.dataset`" if isinstance(dataset, DataLoader) else ""
    raise TypeError(
        f"dataset: expected a path to a COCO JSON file, such a file as a dictionary, or items that"
        f" are {_ITEM}; found {describe(dataset)}{hint}"
    )


def _read_item(
    item: object, where: str
) -> tuple[tuple[int, int], npt.NDArray[np.float32], Mapping[Any, Any]]:
    """Returns size, `xyxy` boxes and target of an item; an empty target if it is a pair."""
    if isinstance(item, Mapping):
        image, target = item.get("image"), item
    elif not isinstance(item, tuple | list) or len(item) < 2:
        raise TypeError(f"{where}: expected {_ITEM}; found {describe(item)}")
    elif isinstance(item[1], Mapping):
        image, target = item[:2]
    elif len(item) == 2:
        return _size(item[0], where), _boxes(item[1], where), {}
    else:
        raise TypeError(f"{where}: expected {_ITEM}; found {describe(item)}")
    key = next((key for key in ("boxes", "bbox_xyxy") if key in target), None)
    if key is None:
        raise ValueError(
            f"{where}: expected `boxes` in the target, found {show(list(target))} (data sets of"
            " torchvision have them after torchvision.datasets.wrap_dataset_for_transforms_v2)"
        )
    boxes = target[key]
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
        raise TypeError(f"{where}: expected {_ITEM}; found {describe(value)} first") from None
    raise ValueError(f"{where}: expected {SIZE}, found {(height, width)}")


def _boxes(value: Any, where: str) -> npt.NDArray[np.float32]:
    """Returns boxes as float32 `xyxy` `[n, 4]`."""
    # `BoundingBoxes([], ...)` has shape [1, 0], which cannot be converted.
    if isinstance(value, BoundingBoxes) and value.numel():
        value = to_xyxy(value, where)
    array = _array(value, where)
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


def _labels(target: Mapping[Any, Any], count: int, where: str) -> npt.NDArray[np.int64]:
    key = next((key for key in ("labels", "label") if key in target), None)
    if key is None:
        raise ValueError(f"{where}: expected `labels` to choose category_ids by, found none")
    labels = _array(target[key], where)
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


def describe(value: object) -> str:
    """Says on one line what was found, for an error message."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{type(value).__name__} of shape {tuple(value.shape)} and dtype {value.dtype}"
    if isinstance(value, (tuple, list, int, float, str, type(None))):
        return f"{type(value).__name__} {show(value)}"
    return type(value).__name__
