"""COCO JSON as columns: a strict, fast pass, and a tolerant one for the files that it refuses.

A broken annotation is left out for a reason; a broken file raises ValueError.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from typing import Annotated, Any, BinaryIO, NoReturn, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

Id: TypeAlias = int | str
# Beyond this, float32 can no longer tell one pixel from the next.
MAX_SIDE = 2**24
SIZE = f"(height, width), two whole numbers from 1 to {MAX_SIDE}"
# Why a box is left out, by code. Of several reasons the first counts; 0 means that it is kept.
REASONS = (
    "",
    "other categories",
    "no box",
    "not four finite numbers",
    "negative size",
    "on no image of the file",
    "crowd",
    "ignore",
    "zero size",
    "outside the image",
)
OTHER, NO_BOX, NOT_FINITE, NEGATIVE, NO_IMAGE, CROWD, IGNORE, ZERO, OUTSIDE = range(1, 10)
_FLAGS = ("iscrowd", "ignore")
_LARGEST = float(np.finfo(np.float32).max)
_FILE = "expected a COCO JSON file, found"
_CONVERT = "; the recipe 'Convert annotations' in the documentation shows how to convert it"
# What a file that is no JSON may be, by how it begins.
_OTHER_FORMATS = (
    (rb"\s*$", "an empty file"),
    (rb"\x1f\x8b", "a gzip file: unpack it first"),
    (rb"PK\x03\x04", "a zip file: unpack it first"),
    (rb"\xff\xfe|\xfe\xff|\0{0,3}[{\[]\0", "UTF-16 or UTF-32 text: save it as UTF-8"),
    (rb"\s*<", "XML, such as Pascal VOC's" + _CONVERT),
    (rb"\d+([ \t]+[-+.\de]+){4,}\s*(\n|$)", "a YOLO label file" + _CONVERT),
    (rb"[^\n,{\[]*(,[^\n,{\[]*){3,}(\n|$)", "a CSV file" + _CONVERT),
)
# What the strict pass raises; a plain ValueError, with a place in the file, is final.
_UNUSUAL = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


@dataclass(frozen=True, eq=False)
class CocoColumns:
    """Images and annotations of a COCO file, in the order of the file.

    Attributes:
        image_ids: Id of each of the M images.
        image_sizes: (height, width) of each image, int64 `[M, 2]`.
        image_index: Which image each annotation is on, int64 `[A]`; -1 if it is none of them.
        boxes: `xywh`, float64 `[A, 4]`; whatever has a code below `CROWD` has no valid box.
        category_ids: Category of each annotation, or None.
        listed: Name of each id in `categories`; "" if it has none.
        reasons: Codes of `REASONS` up to `IGNORE`, int8 `[A]`.
        num_polygons: How many annotations without a box have a segmentation.
    """

    image_ids: list[Id]
    image_sizes: npt.NDArray[np.int64]
    image_index: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float64]
    category_ids: list[Id | None]
    listed: dict[Id, str]
    reasons: npt.NDArray[np.int8]
    num_polygons: int = 0


def read_coco(source: str | os.PathLike[str] | Mapping[str, Any], name: str) -> CocoColumns:
    """Reads a COCO file, or a mapping like it.

    Args:
        source: The path, or the mapping.
        name: What messages call it.

    Raises:
        ValueError: If there are no lists of images and annotations, an image has no id of its own
            or no usable size, or no annotation is on one of the images.
        OSError: If the file cannot be read.
    """
    with reading(name):
        if isinstance(source, Mapping):
            with contextlib.suppress(*_UNUSUAL):
                coco = msgspec.convert(source, type=_Coco)
                return _joined(coco, [_columns(coco.annotations)])
            return read_plain(source)
        with open_file(source) as file:
            with contextlib.suppress(*_UNUSUAL):
                return _read_strictly(file)
            file.seek(0)
            data = file.read()
        return read_plain(parse(data))


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Names the data in errors; collects no garbage: that takes longer than the decoding."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    except RecursionError:
        raise ValueError(f"{name}: {_FILE} it nested too deeply") from None
    except MemoryError:
        raise ValueError(
            f"{name}: expected a file that fits into memory, found none left"
        ) from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    finally:
        if collecting:
            gc.enable()


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a file, or what a pipe holds; a mapped file would end the process when it shrinks."""
    if os.path.isdir(path):
        raise ValueError(f"{_FILE} a folder{_CONVERT}")
    file = open(path, "rb")  # noqa: SIM115
    if file.seekable():
        return file
    with file:
        return BytesIO(file.read())


def parse(data: bytes) -> Any:
    """Parses JSON that may hold NaN and Infinity, a byte order mark and bytes that are no UTF-8."""
    text = data.decode("utf-8-sig", "surrogateescape")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        for pattern, found in _OTHER_FORMATS:
            if re.match(pattern, data[:2000]):
                raise ValueError(f"{_FILE} {found}") from None
        # The file may be one long line: quote what is there.
        before, after = text[max(0, error.pos - 20) : error.pos], text[error.pos :]
        if not after.strip():
            found, near = "one that ends too early,", f"after {before!r}"
        else:
            found, near = repr(error.msg), f"near {before + after[:20]!r}"
        raise ValueError(f"{_FILE} {found} at character {error.pos}, {near}") from None


class _Image(msgspec.Struct, gc=False):
    id: _Int64
    width: _Int64
    height: _Int64


class _Annotation(msgspec.Struct, gc=False):
    image_id: _Int64
    category_id: int
    bbox: tuple[float, float, float, float]
    iscrowd: bool | int = 0
    ignore: bool | int = 0


class _Coco(msgspec.Struct):
    """The needed keys alone: polygons are never built."""

    images: list[_Image] | msgspec.UnsetType = msgspec.UNSET
    annotations: list[_Annotation] | msgspec.UnsetType = msgspec.UNSET
    categories: Any = None


# Bytes that are decoded at once. This bounds temporary memory, and keeps it in the cache.
_BLOCK = 1_048_576
_START = re.compile(rb'"annotations"\s*:\s*\[')
_BETWEEN = re.compile(rb"\}\s*,\s*$")
_decode_coco = msgspec.json.Decoder(_Coco).decode
_decode_annotations = msgspec.json.Decoder(list[_Annotation]).decode
# Image ids, xywh, category ids, crowd and ignore of some annotations.
_Columns: TypeAlias = tuple[
    npt.NDArray[np.int64],
    npt.NDArray[np.float64],
    list[Id | None],
    npt.NDArray[np.bool_],
    npt.NDArray[np.bool_],
]


def _read_strictly(file: BinaryIO) -> CocoColumns:
    """Reads a file without anything unusual in it, block by block.

    The list of annotations is cut where one object seems to follow another. A piece that decodes
    as a list of annotations began and ended between two of them; else the rest is decoded whole.
    """
    head = bytearray()
    start = None
    while start is None:
        block = file.read(_BLOCK)
        if not block:
            raise msgspec.DecodeError("no list of annotations")
        searched = max(0, len(head) - 100)
        head += block
        start = _START.search(head, searched)
    first = _decode_coco(head[: start.start()] + b'"annotations":[]}')
    pieces = []
    rest = bytearray(b"[") + head[start.end() :]
    while block := file.read(_BLOCK):
        rest += block
        cut = _last_cut(rest)
        if cut is None:
            continue
        end, next_start = cut
        comma, rest[end] = rest[end], ord("]")
        try:
            with memoryview(rest) as view, view[: end + 1] as piece:
                pieces.append(_columns(_decode_annotations(piece)))
        except msgspec.MsgspecError:  # cut elsewhere: behind the annotations, or in one
            rest[end] = comma
            rest += file.read()
        else:
            rest[:next_start] = b"["
    last = _decode_coco(b'{"annotations":' + rest)
    pieces.append(_columns(last.annotations))
    if last.images is msgspec.UNSET:
        last.images = first.images
    last.categories = last.categories or first.categories
    return _joined(last, pieces)


def _last_cut(text: bytearray) -> tuple[int, int] | None:
    """Returns where the last but one object seems to end, and the last one to start."""
    start = text.rfind(b"{")
    while start > 0:
        if between := _BETWEEN.search(text, max(0, start - 100), start):
            return between.start() + 1, start
        start = text.rfind(b"{", 0, start)
    return None


def _columns(annotations: list[_Annotation] | msgspec.UnsetType) -> _Columns:
    if isinstance(annotations, msgspec.UnsetType):
        raise msgspec.ValidationError("no list of annotations")
    num = len(annotations)
    boxes = chain.from_iterable([a.bbox for a in annotations])
    return (
        np.fromiter([a.image_id for a in annotations], np.int64, num),
        np.fromiter(boxes, np.float64, 4 * num).reshape(num, 4),
        [a.category_id for a in annotations],
        np.fromiter([a.iscrowd for a in annotations], np.bool_, num),
        np.fromiter([a.ignore for a in annotations], np.bool_, num),
    )


def _joined(coco: _Coco, pieces: Sequence[_Columns]) -> CocoColumns:
    """Makes the columns of a file from its images and those of all annotations."""
    images = coco.images
    if isinstance(images, msgspec.UnsetType):
        raise msgspec.ValidationError("no list of images")
    ids = np.array([image.id for image in images], np.int64)
    image_sizes = np.array([(i.height, i.width) for i in images], np.int64).reshape(len(images), 2)
    bad = ((image_sizes < 1) | (image_sizes > MAX_SIDE)).any(axis=1)
    if bad.any():
        index = int(bad.argmax())
        _refuse_size(index, images[index].id, images[index].height, images[index].width)
    some_owners, boxes, categories, crowd, ignore = zip(*pieces, strict=True)
    owners = np.concatenate(some_owners)
    image_index = np.full(len(owners), -1)
    if len(ids):
        # Sorted first: a search in order is several times as fast.
        by_owner, by_id = np.argsort(owners), np.argsort(ids)
        found = np.searchsorted(ids[by_id], owners[by_owner])
        image_index[by_owner] = by_id[found.clip(max=len(ids) - 1)]
        image_index[ids[image_index] != owners] = -1
    columns = CocoColumns(
        image_ids=ids.tolist(),
        image_sizes=image_sizes,
        image_index=image_index,
        boxes=np.concatenate(boxes),
        category_ids=list(chain.from_iterable(categories)),
        listed=_listed(coco.categories),
        reasons=_flags(np.concatenate(crowd), np.concatenate(ignore)),
    )
    return _checked(columns, int(owners[0]) if len(owners) else None)


def read_plain(data: Any, *, need_sizes: bool = True) -> CocoColumns:
    """Makes columns of what `parse` returned or of a mapping like it, tolerantly.

    Args:
        data: The data; numbers may be numpy's or torch's.
        need_sizes: Whether images must have a size; if not, `image_sizes` has no rows.

    Raises:
        ValueError: As `read_coco` does, without the name.
    """
    if not isinstance(data, Mapping):
        found = "a list, such as detections" if isinstance(data, list) else show(data)
        raise ValueError(f"expected an object with `images` and `annotations`, found {found}")
    for key in ("images", "annotations"):
        if not isinstance(data.get(key), list | tuple):
            found = show(data[key]) if key in data else f"only {show(list(data))}"
            raise ValueError(f"expected a list of `{key}`, found {found}")
    images, annotations = (
        [entry if isinstance(entry, Mapping) else {} for entry in data[key]]
        for key in ("images", "annotations")
    )
    image_ids, image_sizes = [], []
    for index, image in enumerate(images):
        image_id = as_id(image.get("id"))
        if image_id is None:
            found = show(image.get("id"))
            raise ValueError(f"images[{index}]: expected an int or a string as id, found {found}")
        image_ids.append(image_id)
        if need_sizes:
            both = image.get("height"), image.get("width")
            size = tuple(map(as_id, both))
            if not all(isinstance(side, int) and 1 <= side <= MAX_SIDE for side in size):
                _refuse_size(index, image_id, *both)
            image_sizes.append(size)
    position: dict[Id | None, int] = {image_id: index for index, image_id in enumerate(image_ids)}
    boxes = [as_box(entry.get("bbox")) for entry in annotations]
    no_box = np.array([not box for box in boxes], np.bool_)
    reasons = _flags(
        *(np.array([as_flag(e.get(k)) for e in annotations], np.bool_) for k in _FLAGS)
    )
    reasons[no_box] = NO_BOX
    columns = CocoColumns(
        image_ids=image_ids,
        image_sizes=np.array(image_sizes, np.int64).reshape(len(image_sizes), 2),
        image_index=np.array(
            [position.get(as_id(entry.get("image_id")), -1) for entry in annotations], np.int64
        ),
        boxes=np.array([box or [0.0] * 4 for box in boxes]).reshape(len(boxes), 4),
        category_ids=[as_id(entry.get("category_id")) for entry in annotations],
        listed=_listed(data.get("categories")),
        reasons=reasons,
        num_polygons=sum(bool(annotations[i].get("segmentation")) for i in no_box.nonzero()[0]),
    )
    return _checked(columns, annotations[0].get("image_id") if annotations else None)


def _checked(columns: CocoColumns, first_owner: Any) -> CocoColumns:
    """Applies the rules that both passes share."""
    ids = columns.image_ids
    if len(set(ids)) != len(ids):
        first: dict[Id, int] = {}
        index = next(i for i, image_id in enumerate(ids) if first.setdefault(image_id, i) != i)
        raise ValueError(
            f"images[{index}]: expected an id of its own, found {show(ids[index])}, which"
            f" images[{first[ids[index]]}] has"
        )
    nowhere, boxes, reasons = columns.image_index < 0, columns.boxes, columns.reasons
    if len(nowhere) and nowhere.all():
        raise ValueError(
            "expected annotations on the images of the file, found none: image_id"
            f" {show(first_owner)} in annotations[0], "
            + (f"id {show(ids[0])} in images[0]" if ids else "no images")
        )
    # The last reason given is the one that counts.
    reasons[nowhere & (reasons != NO_BOX)] = NO_IMAGE
    reasons[(boxes[:, 2] < 0) | (boxes[:, 3] < 0)] = NEGATIVE
    finite = np.abs(boxes) <= _LARGEST  # NaN is not
    if not finite.all():  # a reduction by rows is slow
        reasons[~finite.all(axis=1)] = NOT_FINITE
    return columns


def _flags(crowd: npt.NDArray[np.bool_], ignore: npt.NDArray[np.bool_]) -> npt.NDArray[np.int8]:
    reasons = np.zeros(len(crowd), np.int8)
    reasons[ignore] = IGNORE
    reasons[crowd] = CROWD
    return reasons


def _refuse_size(index: int, image_id: Id, height: Any, width: Any) -> NoReturn:
    sides = {"height": height, "width": width}
    found = " and ".join(
        f"no {name}" if side is None else f"{name} {show(side)}" for name, side in sides.items()
    )
    raise ValueError(f"images[{index}] (id {show(image_id)}): expected {SIZE}, found {found}")


def _listed(categories: Any) -> dict[Id, str]:
    """Returns the ids that `categories` lists, with their names; it may also hold other things."""
    entries = categories if isinstance(categories, list | tuple) else []
    pairs = [(as_id(e.get("id")), e.get("name")) for e in entries if isinstance(e, Mapping)]
    return {i: name if isinstance(name, str) else "" for i, name in pairs if i is not None}


def as_box(value: Any) -> list[float]:
    """Returns the numbers of a box, infinite ones for anything else; none if there is no box."""
    value = plain(value)
    if value is None or value in ([], (), {}, ""):
        return []
    numbers = list(map(plain, value)) if isinstance(value, list | tuple) else []
    if len(numbers) == 4 and all(type(number) in (int, float) for number in numbers):
        with contextlib.suppress(OverflowError):
            return list(map(float, numbers))
    return [np.inf] * 4


def plain(value: Any) -> Any:
    """Returns Python's own value for numpy's or torch's, and None for NaN: pandas writes it so."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return None if isinstance(value, float) and value != value else value


def as_id(value: Any) -> Id | None:
    """Returns an id, a float such as 1.0 as an int; None for anything that is no id."""
    value = plain(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def as_flag(value: Any) -> bool:
    """Returns whether a flag is set; it may be missing, or a string."""
    value = plain(value)
    if isinstance(value, str):
        return value.strip().lower() not in ("", "0", "0.0", "false", "no", "none", "null")
    return bool(value)


def show(value: Any) -> str:
    """Returns a value as text that is short and on one line."""
    return " ".join(reprlib.repr(value).split())
