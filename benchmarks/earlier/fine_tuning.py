"""What a change of factors does to a detector that is trained already."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.intervals import mean_of, paired
from benchmarks.markdown import fold, table
from benchmarks.records import Record, by_seed

_STAY, _JUMP = "stay at 1", "jump"
_WHEN = {"before": "before", "after": "after the change", "ramped": "after 100 steps"}


def section(records: Sequence[Record]) -> str:
    """A foldable table for each optimizer and learning rate."""
    by_rate: dict[tuple[str, float], list[Record]] = {}
    for record in records:
        config = record["config"]
        by_rate.setdefault((config["optimizer"], config["rate"]), []).append(record)
    return "\n\n".join(
        fold(f"{optimizer}, learning rate {rate:g}", by_way(by_rate[optimizer, rate]))
        for optimizer, rate in sorted(by_rate)
    )


def by_way(records: Sequence[Record]) -> str:
    """A row for each target and way; differences are paired by seed."""
    runs = {kind: [*found.values()] for kind, found in by_seed(records, "target", "way").items()}
    ends = {kind: _values(found, "end") for kind, found in runs.items()}
    rows = []
    for (target, way), found in runs.items():
        end = ends[target, way]
        seeds = f"{len(end)}" + f" ({len(found) - len(end)} diverged)" * (len(end) < len(found))
        against = [
            "" if skipped or other not in ends else mean_of(paired(end, ends[other])).text(1, "+")
            for other, skipped in (
                (("1", _STAY), way == _STAY),
                ((target, _JUMP), way in (_STAY, _JUMP)),
            )
        ]
        means = [_mean(list(_values(found, when).values())) for when in _WHEN]
        last = [run["loss"][-1] for run in found if run["diverged_at"] is None]
        loss = f"{np.mean(last):.3f}" if last else ""
        rows.append([target, way, seeds, *means, _mean(list(end.values())), *against, loss])
    header = ["target", "way", "seeds", *_WHEN.values(), "end"]
    return table([*header, "over staying at 1", "over jumping", "last loss"], rows)


def _values(runs: Sequence[Record], when: str) -> dict[int, float]:
    """AP50_tiny in percent by seed, of the runs that got so far."""
    return {
        run["config"]["seed"]: 100 * run["figures"][when] for run in runs if when in run["figures"]
    }


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.1f}" if values else ""
