"""COCO data as written: checked where it is used, and complete with every key nobody asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

Source: TypeAlias = "str | os.PathLike[str]"
Box: TypeAlias = tuple[float, float, float, float]
Kind = TypeVar("Kind")


class _HasBox(Protocol):
    bbox: Box


def read(source: Any, kind: type[Kind], name: str) -> tuple[str, Any, Kind]:
    """Reads a JSON file or Python objects, twice: as they are and as what is needed of them.

    Args:
        source: Path to a JSON file, or dicts and lists (numbers may be numpy's or torch's).
        kind: What to look for and check: a `msgspec.Struct` or a list of them.
        name: What errors call the data.

    Returns:
        The name with the file's path, the plain data (a copy), and the same data as `kind`.

    Raises:
        TypeError: If the data holds objects that are no COCO data.
        ValueError: If the file is not JSON, or if an entry is missing or mistyped.
    """
    if isinstance(source, str | os.PathLike):
        name = f"{os.fspath(source)}: {name}"
        try:
            plain = json.loads(Path(source).read_bytes())
        except ValueError as error:
            raise ValueError(f"{name} is not valid JSON: {error}") from error
    else:
        plain = msgspec.to_builtins(source, enc_hook=_plain)
    try:
        return name, plain, msgspec.convert(plain, kind)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$")
        raise ValueError(f"{name}{place.rstrip('`')}: {message}") from error


def boxes(where: str, entries: Sequence[_HasBox]) -> NDArray[np.float64]:
    """Reads the boxes of all entries, `[N, 4]` as `xywh`, each finite and of no negative size.

    Raises:
        ValueError: Naming the first entry whose box is otherwise.
    """
    array = np.array([entry.bbox for entry in entries], np.float64).reshape(-1, 4)
    good = np.isfinite(array).all(1) & (array[:, 2:] >= 0).all(1)
    if not good.all():
        index = int(np.argmin(good))
        expected = "finite numbers and no negative size"
        raise ValueError(f"{where}[{index}]: bbox {entries[index].bbox}, expected {expected}")
    return array


def positions(where: str, ids: Iterable[int]) -> dict[int, int]:
    """Finds where each id stands.

    Raises:
        ValueError: If an id is there twice.
    """
    first: dict[int, int] = {}
    for index, identity in enumerate(ids):
        if first.setdefault(identity, index) != index:
            other = f"{where}[{first[identity]}]"
            raise ValueError(f"{where}[{index}]: id {identity}, expected another than {other} has")
    return first


def references(where: str, ids: Sequence[int], known: dict[int, int]) -> NDArray[np.int64]:
    """Finds the positions of the images that entries refer to.

    Raises:
        ValueError: If there is no such image.
    """
    found = np.array([known.get(identity, -1) for identity in ids], np.int64)
    if (found < 0).any():
        index = int(np.argmax(found < 0))
        raise ValueError(f"{where}[{index}]: image_id {ids[index]}, expected the id of an image")
    return found


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} in COCO data, expected what JSON can hold")
