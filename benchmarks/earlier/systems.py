"""The seven detectors of the paper, and data at several sizes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.intervals import mean_of
from benchmarks.markdown import table
from benchmarks.records import Record

_NAMES = {
    "fcos": "FCOS",
    "retinanet_p3p7": "RetinaNet (P3-P7)",
    "retinanet": "Adaptive RetinaNet",
    "freeanchor": "Adaptive FreeAnchor",
    "librarcnn": "Libra R-CNN",
    "gridrcnn": "Grid R-CNN",
    "fasterrcnn": "Faster R-CNN-FPN",
}
# AP50_tiny on TinyPerson's test set, from the read-me file of the authors' code.
_PUBLISHED = {
    ("fcos", "1"): 3.26,
    ("retinanet_p3p7", "1"): 33.53,
    ("retinanet", "1"): 46.56,
    ("retinanet", "s-alpha"): 48.34,
    ("freeanchor", "1"): 41.41,
    ("fasterrcnn", "1"): 47.35,
    ("fasterrcnn", "s-alpha"): 48.39,
}
_ALPHAS = {"1": "alpha = 1", "s-alpha": "S-alpha"}


def detectors(records: Sequence[Record]) -> str:
    """AP50_tiny of each detector with factors of 1 and with S-alpha, and what the authors state."""
    runs: dict[tuple[str, bool, str], list[Record]] = {}
    for record in _of(records, comparison=True):
        config = record["config"]
        key = (config["detector"], bool(config["init"]), config["alpha"])
        runs.setdefault(key, []).append(record)
    rows = []
    for detector, name in _NAMES.items():
        ours = [
            mean_of([100 * run["figures"]["AP50_tiny"] for run in runs[detector, loaded, alpha]])
            for loaded in (False, True)
            for alpha in _ALPHAS
        ]
        theirs = [_PUBLISHED.get((detector, alpha), "") for alpha in _ALPHAS]
        rows.append([name, *(mean.text(2) for mean in ours), *theirs])
    heads = ("{}", "{}, Scale Match", "authors' {}")
    return table(["detector", *(h.format(a) for h in heads for a in _ALPHAS.values())], rows)


def sizes(records: Sequence[Record]) -> str:
    """AP50_all at each size and with each number of images, and its range over the factors."""
    cells: dict[tuple[int, int], dict[str, dict[int, Record]]] = {}
    for record in _of(records, comparison=False):
        config = record["config"]
        key = (-config["size"][0], -record["counts"]["train_images"])
        cells.setdefault(key, {}).setdefault(config["alpha"], {})[config["seed"]] = record
    rows = []
    alphas = ("1", "s-alpha", "0.3")
    for _, cell in sorted(cells.items()):
        seeds = sorted(set.intersection(*(set(cell[alpha]) for alpha in alphas)))
        values = np.array(
            [[100 * cell[alpha][seed]["figures"]["AP50_all"] for seed in seeds] for alpha in alphas]
        )
        run = cell["s-alpha"][seeds[0]]
        side, counts = run["config"]["size"][0], run["counts"]
        rows.append(
            [
                f"{side}x{side}, {counts['train_images']} images ({counts['train_boxes']} boxes)",
                " ".join(f"{factor:.2f}" for factor in run["alpha"]),
                len(seeds),
                *(mean_of(row.tolist()).text(2) for row in values),
                f"{np.ptp(values.mean(1)):.2f}",
                mean_of(np.ptp(values, axis=0).tolist()).text(2),
            ]
        )
    header = ["data", "S-alpha's factors", "seeds", "alpha = 1", "S-alpha", "alpha = 0.3"]
    return table([*header, "range of the means", "range in a seed"], rows)


def _of(records: Sequence[Record], *, comparison: bool) -> list[Record]:
    """The finished runs on the data of the comparison of detectors, or on those of the sizes."""
    several = {r["config"]["train_json"] for r in records if r["config"]["detector"] == "fcos"}
    return [
        record
        for record in records
        if record["diverged_at"] is None
        and record["config"]["scale_match"] == "none"
        and (record["config"]["train_json"] in several) is comparison
    ]
