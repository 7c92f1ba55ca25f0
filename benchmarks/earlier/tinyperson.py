"""TinyPerson's whole images at 960 x 1706."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.intervals import mean_of, paired
from benchmarks.markdown import fold, table
from benchmarks.records import Record, by_seed, settings

_MAIN = "AP50_tiny"
_BASELINE = ("1", "")
_NAMES = {"1": "alpha = 1", "s-alpha": "S-alpha"}
_CHANGED = ("alpha", "start", "seed")


def section(records: Sequence[Record]) -> str:
    """A foldable table for each setting, those with the most runs first."""
    found = sorted(settings(records, _CHANGED), key=lambda runs: -len(runs))
    return "\n\n".join(fold(title(runs[0]["config"]), facts(runs), by_kind(runs)) for runs in found)


def title(config: dict[str, Any]) -> str:
    """What the runs of a setting have in common, in a line."""
    size = "x".join(map(str, config["size"]))
    return (
        f"{config['detector']}, {config['backbone']}, {size}, {config['steps']} steps of "
        f"{config['batch']}, {config['optimizer']}"
    )


def facts(runs: Sequence[Record]) -> str:
    """What else there is to know of a setting."""
    config, counts = runs[0]["config"], runs[0]["counts"]
    devices = ", ".join(sorted({run["device"] for run in runs}))
    return (
        f"Trained on crops of {config['crop']} px from {counts['train_images']} images "
        f"({counts['train_boxes']} objects), evaluated on {counts['val_images']} whole images "
        f"({counts['val_boxes']} objects). {config['channels']} channels, learning rate "
        f"{config['lr']:g}, {config['warmup']} steps of warm-up, gradients clipped to "
        f"{config['clip']:g}, {config['precision']}; {devices}; "
        f"torch {runs[0]['versions']['torch']}."
    )


def by_kind(runs: Sequence[Record]) -> str:
    """A row for each kind of factors; differences to factors of 1 are paired by seed."""
    kinds = by_seed(runs, "alpha", "start")
    good = {
        kind: {seed: run for seed, run in sorted(found.items()) if run["diverged_at"] is None}
        for kind, found in kinds.items()
    }
    baseline = _values(good.get(_BASELINE, {}))
    rows = []
    for kind in sorted(good, key=lambda kind: (kind != _BASELINE, kind[0] != "s-alpha", kind)):
        values, diverged = _values(good[kind]), len(kinds[kind]) - len(good[kind])
        against = mean_of([] if kind == _BASELINE else paired(values, baseline))
        factors = np.mean([run["alpha"] for run in good[kind].values()], axis=0) if values else []
        rows.append(
            [
                _name(*kind),
                " ".join(f"{factor:.3g}" for factor in factors),
                f"{len(values)} ({diverged} diverged)" if diverged else len(values),
                mean_of(list(values.values())).text(2),
                against.text(2, "+"),
                f"{against.detectable:.2f}" if against.count > 1 else "",
            ]
        )
    header = ["factors", "at the end", "seeds", _MAIN, "over alpha = 1", "detectable"]
    return table(header, rows)


def _name(alpha: str, start: str) -> str:
    name = _NAMES.get(alpha, f"alpha = {alpha}")
    return f"{name}, first function of {_NAMES[start]}" if start else name


def _values(runs: dict[int, Record]) -> dict[int, float]:
    return {seed: 100 * run["figures"][_MAIN] for seed, run in runs.items()}
