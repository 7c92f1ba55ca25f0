"""COCO annotations and detections with every key that they have, read by `estimate`'s rules."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from alphafpn.estimate.coco import (
    CROWD,
    REASONS,
    CocoColumns,
    Id,
    as_id,
    open_file,
    parse,
    read_plain,
    reading,
    show,
)

Source: TypeAlias = "str | os.PathLike[str]"


class Detections(NamedTuple):
    """Detections as they were given, and as columns."""

    entries: list[dict[str, Any]]
    image_index: NDArray[np.int64]
    boxes: NDArray[np.float64]  # [D, 4], xywh
    scores: NDArray[np.float64]


class _Detection(msgspec.Struct, gc=False):
    image_id: int | float | str
    bbox: tuple[float, float, float, float]
    score: float


def read(
    source: Any, name: str, *, need_sizes: bool = True
) -> tuple[dict[str, Any], CocoColumns, NDArray[np.int64]]:
    """Reads a COCO data set: a path, or a dict whose numbers may be numpy's or torch's.

    Returns a copy of the data, its columns, and the positions of the annotations that have a valid
    box on one of the images. A warning says how many have none. `name` is what messages call it.
    """
    name, data = _load(source, name)
    with reading(name):
        columns = read_plain(data, need_sizes=need_sizes)
    broken = (columns.reasons > 0) & (columns.reasons < CROWD)
    if broken.any():
        totals = np.bincount(columns.reasons[broken], minlength=CROWD)
        reasons = ", ".join(f"{n} {REASONS[i]}" for i, n in enumerate(totals.tolist()) if n)
        warnings.warn(f"{name}: annotations left out: {reasons}", stacklevel=3)
    return data, columns, np.flatnonzero(~broken)


def read_detections(source: Any, name: str, image_ids: Sequence[Id]) -> tuple[str, Detections]:
    """Reads COCO results, detections on images of these ids; the name gets the file's path."""
    name, entries = _load(source, name)
    try:
        found = msgspec.convert(entries, list[_Detection])
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$")
        raise ValueError(f"{name}{place.rstrip('`')}: {message}") from error
    position: dict[Id | None, int] = {image_id: index for index, image_id in enumerate(image_ids)}
    detections = Detections(
        entries,
        np.array([position.get(as_id(d.image_id), -1) for d in found], np.int64),
        np.array([detection.bbox for detection in found], np.float64).reshape(-1, 4),
        np.array([detection.score for detection in found], np.float64),
    )
    valid = np.isfinite(detections.boxes).all(1) & (detections.boxes[:, 2:] >= 0).all(1)
    for key, good, expected in (
        ("image_id", detections.image_index >= 0, "the id of an image"),
        ("bbox", valid, "four finite numbers and no negative size"),
        ("score", np.isfinite(detections.scores), "a finite number"),
    ):
        if not good.all():
            index = int(np.argmin(good))
            value = show(entries[index][key])
            raise ValueError(f"{name}[{index}]: expected as {key} {expected}, found {value}")
    return name, detections


def _load(source: Any, name: str) -> tuple[str, Any]:
    """Returns the name with the file's path, and a copy of the data as plain Python objects."""
    if isinstance(source, str | os.PathLike):
        name = f"{os.fspath(source)}: {name}"
        with reading(name), open_file(source) as file:
            return name, parse(file.read())
    return name, msgspec.to_builtins(source, enc_hook=_plain)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"COCO data: expected what JSON can hold, found a {type(value).__name__}")
