"""What a change of factors does to a detector that is trained already."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.intervals import mean_of, paired
from benchmarks.markdown import table
from benchmarks.records import Record, by_seed

_STAY, _JUMP = "stay at 1", "jump"
_WAYS = (_STAY, _JUMP, "ramp", "rescale, then patch")


def section(records: Sequence[Record]) -> str:
    """A row for each optimizer and way to S-alpha; differences are paired by seed."""
    some = [record for record in records if record["config"]["target"] in ("1", "S-alpha")]
    runs = by_seed(some, "optimizer", "rate", "way")
    rows = []
    for optimizer, rate in dict.fromkeys(key[:2] for key in sorted(runs)):
        ends = {way: _values(runs[optimizer, rate, way], "end") for way in _WAYS}
        for way in _WAYS:
            means = [
                np.mean([*_values(runs[optimizer, rate, way], when).values()])
                for when in ("before", "after", "end")
            ]
            against = [
                mean_of(paired(ends[way], ends[other])).text(1, "+") if way not in skipped else ""
                for other, skipped in ((_STAY, {_STAY}), (_JUMP, {_STAY, _JUMP}))
            ]
            rows.append(
                [f"{optimizer} at {rate:g}", way, *(f"{mean:.1f}" for mean in means), *against]
            )
    header = ["optimizer", "way", "before", "after the change", "end"]
    return table([*header, "over staying at 1", "over jumping"], rows)


def _values(runs: dict[int, Record], when: str) -> dict[int, float]:
    """AP50_tiny in percent by seed, of the runs that got so far."""
    return {seed: 100 * r["figures"][when] for seed, r in runs.items() if when in r["figures"]}
