"""The runs of each study, seeds as the outer loop.

Two studies are finished: `starts`, of the finer level's blocks, and `rates`. The code that ran them
is at commit c3f0e35.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from benchmarks.adapting.data import SOURCES
from benchmarks.adapting.rows import FACTORS, FITS, Row
from benchmarks.records import Record

DATA = ("cells4", "cells8", "people", "hituav", "dots", "dsb2018", "insects")
STEPS = {**dict.fromkeys(DATA, 150), "cells8": 200, "people": 200}
RATE, BATCH = 1e-3, 2


def configuration(data: str, row: str, seed: int, **changes: Any) -> Record:
    """What a run is: that of the main study with some values changed."""
    source = SOURCES[data]
    config = {
        "study": "main",
        "data": data,
        "row": row,
        "seed": seed,
        "detector": "retinanet",
        "start": "imagenet",
        "finer_start": "random",
        "steps": STEPS[data],
        "lr": RATE,
        "batch": BATCH,
        "crop": source.side or list(source.size or ()),
        "train": source.train,
        "val": source.val,
    }
    return {**config, **changes}


def _main(seed: int) -> Iterator[Record]:
    """All data sets and rows."""
    for data, row in itertools.product(DATA, (*FITS, *FACTORS)):
        yield configuration(data, row, seed)


def _factors(seed: int) -> Iterator[Record]:
    """Further seeds of the main study for the factors on people."""
    for row in (Row.ADAPTED, *FACTORS):
        yield configuration("people", row, 5 + seed)


def _order(seed: int) -> Iterator[Record]:
    """Factors on a detector that was not adapted."""
    for data, row in itertools.product(DATA, (Row.STOCK_HALF, Row.STOCK_ESTIMATED)):
        yield configuration(data, row, seed, study="order")


def _long(seed: int) -> Iterator[Record]:
    """Four times the steps."""
    for data, row in itertools.product(
        ("hituav", "dots"), (Row.STOCK, Row.ADAPTED, Row.HALF, Row.ESTIMATED)
    ):
        yield configuration(data, row, seed, study="long", steps=4 * STEPS[data])


def _heads(seed: int) -> Iterator[Record]:
    """Other detectors: FCOS with a finer level or a scale, Faster R-CNN with or without its RoIs'.

    A scale keeps FCOS's radius in pixels; with `radius`, in cells.
    """
    for data in ("people", "dsb2018"):
        for row in (Row.STOCK, Row.ADAPTED):
            yield configuration(data, row, seed, study="heads", detector="fcos")
            yield configuration(data, row, seed, study="heads", detector="fasterrcnn")
        yield configuration(
            data, Row.ADAPTED, seed, study="heads", detector="fasterrcnn", roi="scaled"
        )
        for changes in ({"scale": 0.5}, {"scale": 0.5, "radius": 1.5}):
            yield configuration(data, Row.SCALE, seed, study="heads", detector="fcos", **changes)


STUDIES = {
    "main": _main,
    "factors": _factors,
    "order": _order,
    "long": _long,
    "heads": _heads,
}
