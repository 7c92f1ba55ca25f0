"""The tables of docs/paper-systems.md: the paper's detectors, and data at several sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.paper.pairs import Mean, mean_of

COLUMNS = ("50_tiny", "50_tiny1", "50_tiny2", "50_tiny3", "50_small", "25_tiny", "75_tiny")
NAMES = {
    "fcos": "FCOS",
    "retinanet_p3p7": "RetinaNet",
    "retinanet": "Adaptive RetinaNet",
    "freeanchor": "Adaptive FreeAnchor",
    "librarcnn": "Libra R-CNN",
    "gridrcnn": "Grid R-CNN",
    "fasterrcnn": "Faster R-CNN-FPN",
}
# On TinyPerson's test set, from the read-me file of the authors' code, in the order of COLUMNS.
PUBLISHED: dict[tuple[str, str], tuple[tuple[float, ...], tuple[float, ...]]] = {
    ("fcos", "1"): (
        (3.26, 0.99, 2.82, 6.20, 20.19, 13.28, 0.14),
        (99.00, 99.96, 99.77, 97.68, 95.49, 97.24, 99.89),
    ),
    ("retinanet_p3p7", "1"): (
        (33.53, 12.24, 38.79, 47.38, 48.26, 61.51, 2.28),
        (92.66, 94.52, 88.24, 86.52, 82.84, 81.95, 99.13),
    ),
    ("retinanet", "1"): (
        (46.56, 27.08, 52.63, 57.88, 59.97, 69.60, 4.49),
        (88.31, 89.65, 81.03, 81.08, 74.05, 76.33, 98.76),
    ),
    ("retinanet", "s-alpha"): (
        (48.34, 28.61, 54.69, 59.38, 61.73, 71.18, 5.34),
        (87.73, 89.51, 81.11, 79.49, 72.82, 74.85, 98.57),
    ),
    ("freeanchor", "1"): (
        (41.41, 25.13, 47.41, 52.77, 59.61, 63.38, 4.58),
        (89.63, 88.93, 80.75, 83.63, 74.38, 78.21, 98.77),
    ),
    ("fasterrcnn", "1"): (
        (47.35, 30.25, 51.58, 58.95, 63.18, 68.43, 5.83),
        (87.57, 87.86, 82.02, 78.78, 72.56, 76.59, 98.39),
    ),
    ("fasterrcnn", "s-alpha"): (
        (48.39, 31.68, 52.20, 60.01, 65.15, 69.32, 5.78),
        (87.29, 87.69, 81.76, 78.57, 70.75, 76.58, 98.42),
    ),
}
_FACTORS = {"1": "1", "s-alpha": "S-alpha"}
_ROW = ("detector", "init", "alpha", "start", "seed")
_CELL = ("train_json", "val_json", "size", "crop", "alpha", "start", "seed")


def tables34(records: Sequence[dict[str, Any]]) -> list[str]:
    """Tables 3 and 4 for every data set that several detectors were trained on."""
    good = [r for r in records if r["config"]["scale_match"] == "none"]
    lines = []
    for group in _grouped(good, _ROW):
        if len({r["config"]["detector"] for r in group}) < 2:
            continue
        lines += [_set_up(group), ""]
        for index, kind in enumerate(("AP", "MR")):
            lines += [*_figures(group, kind, index), ""]
    return lines


def _figures(group: Sequence[dict[str, Any]], kind: str, index: int) -> list[str]:
    """One of the two tables: ours in the mean over seeds, and what the authors publish."""
    heads = [f"{kind}{column}" for column in COLUMNS]
    lines = [
        f"| detector | weights | factors | figures | {' | '.join(heads)} |",
        "|---" * (4 + len(heads)) + "|",
    ]

    def row(runs: Sequence[dict[str, Any]]) -> tuple[int, bool, bool]:
        config = runs[0]["config"]
        return (
            list(NAMES).index(config["detector"]),
            bool(config["init"]),
            config["alpha"] != "1",
        )

    for runs in sorted(_grouped(group, ("seed",)), key=row):
        config = runs[0]["config"]
        detector, alpha = config["detector"], config["alpha"]
        published = PUBLISHED.get((detector, alpha))
        if published and not config["init"]:
            cells = [NAMES[detector], "ImageNet", _FACTORS.get(alpha, alpha), "authors'"]
            cells += [f"{value:.2f}" for value in published[index]]
            lines.append(f"| {' | '.join(cells)} |")
        fine = [run for run in runs if run["diverged_at"] is None]
        weights = "Scale Match" if config["init"] else "none"
        seeds = f"here, {len(fine)} seeds" + f", {len(runs) - len(fine)} diverged" * (fine != runs)
        cells = [f"**{NAMES[detector]}**", weights, _FACTORS.get(alpha, alpha), seeds]
        cells += [_shown(mean_of([100 * run["figures"][head] for run in fine])) for head in heads]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def sizes(records: Sequence[dict[str, Any]]) -> list[str]:
    """AP50_all by size and amount of data, and how far the factors spread it."""
    lines = []
    for group in _grouped(records, _CELL):
        cells = _grouped(group, ("alpha", "start", "seed"))
        if len(cells) < 2:
            continue
        cells.sort(key=_size_of)
        lines += [_set_up(group), "", *_spread(cells, "AP50_all", _title), ""]
        for cell in sorted(cells, key=_size_of):
            counts = cell[0]["counts"].get("categories", {})
            names = sorted(counts, key=lambda name: counts[name])
            if names:
                lines += [f"Categories, {_title(cell)}:", "", *_by_category(cell, names), ""]
    return lines


def _by_category(cell: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    counts = cell[0]["counts"]["categories"]
    lines: list[str] = []
    for name in names:
        figure, title = f"AP50_all/{name}", f"{name}: {counts[name]}"
        head, rule, row = _spread([cell], figure, lambda _, title=title: title)
        lines += [row] if lines else [head.replace("| data", "| boxes", 1), rule, row]
    return lines


def _spread(
    cells: Sequence[Sequence[dict[str, Any]]],
    figure: str,
    title: Callable[[Sequence[dict[str, Any]]], str],
) -> list[str]:
    """A row for each cell: a figure under each factor, and its range over them seed by seed."""
    every = {run["config"]["alpha"] for cell in cells for run in cell}
    alphas = sorted(every, key=lambda a: (a != "1", a != "s-alpha", a))
    lines = [
        f"| data | S-alpha | seeds | {' | '.join(_FACTORS.get(a, a) for a in alphas)} "
        "| range of the means | range in a seed |",
        "|---" * (5 + len(alphas)) + "|",
    ]
    for cell in cells:
        by_seed: dict[int, dict[str, float]] = {}
        for run in cell:
            if run["diverged_at"] is None:
                found = by_seed.setdefault(run["config"]["seed"], {})
                found[run["config"]["alpha"]] = 100 * run["figures"][figure]
        whole = {seed: found for seed, found in by_seed.items() if len(found) == len(alphas)}
        if not whole:
            continue
        means = [mean_of([found[a] for found in whole.values()]) for a in alphas]
        ranges = [max(found.values()) - min(found.values()) for found in whole.values()]
        factors = next((r["alpha"] for r in cell if r["config"]["alpha"] == "s-alpha"), [])
        parts = [title(cell), " ".join(f"{f:.2f}" for f in factors), str(len(whole))]
        parts += [_shown(mean) for mean in means]
        span = np.ptp([mean.mean for mean in means])
        parts += [f"{span:.2f}", _shown(mean_of(ranges))]
        lines.append(f"| {' | '.join(parts)} |")
    return lines


def _title(cell: Sequence[dict[str, Any]]) -> str:
    height, width = cell[0]["config"]["size"]
    counts = cell[0]["counts"]
    return f"{width}x{height}, {counts['train_images']} images ({counts['train_boxes']} boxes)"


def _size_of(cell: Sequence[dict[str, Any]]) -> tuple[int, int]:
    return -min(cell[0]["config"]["size"]), -cell[0]["counts"]["train_images"]


def _grouped(
    records: Iterable[dict[str, Any]], changed: Sequence[str]
) -> list[list[dict[str, Any]]]:
    """Records that differ in nothing but the parts of their configuration named `changed`."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        common = {k: v for k, v in record["config"].items() if k not in changed}
        found.setdefault(repr(sorted(common.items())), []).append(record)
    return list(found.values())


def _set_up(group: Sequence[dict[str, Any]]) -> str:
    config, run = group[0]["config"], group[0]
    crops = f"crops of {config['crop']} pixels" if config["crop"] else "whole images"
    devices = ", ".join(sorted({record["device"] for record in group}))
    return (
        f"Backbone {config['backbone']}, {config['channels']} channels, {config['steps']} steps of "
        f"{config['batch']} {crops}, {config['optimizer']} at {config['lr']:g}; judged on "
        f"{run['counts']['val_images']} images ({run['counts']['val_boxes']} boxes); on {devices}; "
        f"torch {run['versions']['torch']}."
    )


def _shown(main: Mean) -> str:
    if not main.count:
        return ""
    return f"{main.mean:.2f}" + ("" if math.isnan(main.half) else f" ± {main.half:.2f}")
