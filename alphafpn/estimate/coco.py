"""COCO-format JSON, and what torchvision's `CocoDetection` holds, as columns."""

from __future__ import annotations

import gc
import mmap
import os
import re
from itertools import chain
from operator import attrgetter
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Subset
from torchvision.datasets import CocoDetection

from alphafpn.estimate.columns import (
    CROWD,
    IGNORE,
    MAX_SIDE,
    OTHER,
    SIZE,
    Annotations,
    clip,
)

_Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


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


def decode(path: str | os.PathLike[str], name: str) -> _Coco:
    """Decodes a COCO file; the types hold the needed keys alone, so polygons are never built."""
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


def convert(coco: Any, name: str) -> _Coco:
    """Converts the dicts that a pycocotools `COCO` holds."""
    try:
        return msgspec.convert(coco.dataset, type=_Coco)
    except msgspec.ValidationError as error:
        raise ValueError(f"{name}: {_explain(error)}") from error


def _explain(error: Exception) -> str:
    if "$" in str(error):
        return str(error)
    return f"{error}; expected a COCO-format object with `images` and `annotations`"


def coco_selection(dataset: object) -> tuple[Any, list[int]] | None:
    """Returns the `COCO` object and the image ids of a `CocoDetection`, or of a `Subset` of one."""
    if isinstance(dataset, CocoDetection):
        return dataset.coco, dataset.ids
    if isinstance(dataset, Subset):
        inner = coco_selection(dataset.dataset)
        if inner is not None:
            return inner[0], [inner[1][index] for index in dataset.indices]
    return None


def categories(coco: _Coco) -> set[int]:
    """Returns the category ids that the file lists or uses."""
    return {c.id for c in coco.categories} | {a.category_id for a in coco.annotations}


def read_coco(
    coco: _Coco, image_ids: list[int] | None, name: str, wanted: set[int] | None
) -> Annotations:
    """Turns decoded annotations into columns, for all images or for those of `image_ids`."""
    images, annotations = coco.images, coco.annotations
    if annotations and not images:
        raise ValueError(f"{name}: expected images, found an empty list")
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

    flags = (CROWD if a.iscrowd else IGNORE if a.ignore else 0 for a in annotations)
    reasons = np.fromiter(flags, np.int8, len(annotations))
    if wanted is not None:
        others = np.fromiter((a.category_id not in wanted for a in annotations), np.bool_)
        reasons[others] = OTHER
    boxes = boxes.take(rows, axis=0)
    with np.errstate(over="ignore"):
        boxes[:, 2:] += boxes[:, :2]
    return clip(sizes, boxes, counts, reasons.take(rows))


def _xywh(annotations: list[_Annotation], name: str) -> npt.NDArray[np.float32]:
    """Returns the boxes as they are in the file, `[A, 4]`."""
    values = chain.from_iterable(map(attrgetter("bbox"), annotations))
    numbers = np.fromiter(values, np.float64, 4 * len(annotations))
    with np.errstate(over="ignore"):
        boxes = numbers.astype(np.float32).reshape(len(annotations), 4)
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
    bad = ((sizes < 1) | (sizes > MAX_SIDE)).any(axis=1)
    if bad.any():
        index = int(bad.argmax())
        raise ValueError(
            f"{name}: images[{index}] (id {ids[index]}): expected {SIZE}, found"
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
