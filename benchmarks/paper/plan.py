"""Train TinyPerson in the paper's regime, the most informative runs first, for as long as there is.

    python -m benchmarks.paper.plan --minutes 25 [--out FOLDER] [--jobs 2] [--cache device] ...

    0. pilot: the baseline with three rates and a seed of its own, for an eighth of the steps
    1. the paper's regime: SGD, 12 epochs' number of tiles, its schedule, pretrained normalisation
       frozen; alpha = 1, S-alpha, .5, and alpha = 1 from the first function of S-alpha
    2. the same with AdamW
    3. the other constants of Fig. 1, with SGD

Seeds are the outer loop of each part, and the parts come again with more seeds. Finished runs are
lines of OUT/plan.jsonl, and interrupted ones are checkpoints in RUNS: with both folders brought to
another machine, the same command goes on there; with OUT alone it repeats what was interrupted.
Images and annotations are those of `$ALPHAFPN_DATA/tinyperson640`, or of the options of `train`,
whose other options may make it smaller.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.paper import results
from benchmarks.paper.config import Config, Execution, add_options, from_options
from benchmarks.paper.pairs import settings
from benchmarks.paper.report import table, title
from benchmarks.paper.sweep import sweep

# The paper's recipe for RetinaNet: steps of 2 tiles of 640 x 512 pixels at this rate.
_STEPS, _BATCH, _RATE, _WARMUP = 19_236, 2, 0.005, 500
# Squares of as many pixels as its tiles; larger batches, with the rate in proportion.
_REGIME: dict[str, Any] = {
    "size": (960, 1706),
    "crop": 576,
    "batch": 16,
    "clip": 10.0,
    "precision": "bf16-mixed",
}
_ADAMW_RATE = (
    2.5e-4  # for 16 tiles: what pilots found for 8 crops of 320 pixels, by the square root
)
_PILOT_SEED, _PILOT_SHARE = 100, 8
_RATES = (1.0, 0.5, 0.25)  # of the scaled rate
_FEW = ({"alpha": "1"}, {"alpha": "s-alpha"}, {"alpha": "0.5"}, {"alpha": "1", "start": "s-alpha"})
_CONSTANTS = tuple({"alpha": alpha} for alpha in ("0.2", "0.35", "0.7", "0", "1.4"))
_SEEDS = 4  # of a part, before the next one has its turn
_ROUNDS = 3


def pilots(base: Config) -> list[Config]:
    """The baseline at several rates, for a part of the schedule."""
    steps = max(1, base.steps // _PILOT_SHARE)
    warmup = min(base.warmup, steps)
    return [
        replace(base, seed=_PILOT_SEED, lr=share * base.lr, steps=steps, warmup=warmup)
        for share in _RATES
    ]


def best_rate(configs: Sequence[Config], records: Sequence[dict[str, Any]]) -> float | None:
    """The rate of the pilot with the best figure; None while not all of them are there."""
    found = {record["key"]: record for record in records}
    tried = [(found[c.key()], c.lr) for c in configs if c.key() in found]
    if len(tried) < len(configs):
        return None
    good = [(r["figures"]["AP50_tiny"], lr) for r, lr in tried if r["diverged_at"] is None]
    return max(good)[1] if good else min(lr for _, lr in tried)


def runs(base: Config, rate: float) -> Iterator[Config]:
    """All runs after the pilots, in the order to run them."""
    adamw = {"optimizer": "adamw", "lr": _ADAMW_RATE * math.sqrt(base.batch / _REGIME["batch"])}
    parts = [(_FEW, {"lr": rate}), (_FEW, adamw), (_CONSTANTS, {"lr": rate})]
    for turn in range(_ROUNDS):
        for variants, how in parts:
            for seed in range(turn * _SEEDS, (turn + 1) * _SEEDS):
                for variant in variants:
                    yield replace(base, seed=seed, **how, **variant)


def parse(arguments: Sequence[str] | None = None) -> tuple[Config, Execution, argparse.Namespace]:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--out", type=Path, default=Path("runs/plan"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a process each")
    add_options(parser, Config)
    add_options(parser, Execution)
    parser.set_defaults(**_REGIME, steps=0, warmup=-1, lr=0.0, runs="", results="")
    options = parser.parse_args(arguments)
    data = os.environ.get("ALPHAFPN_DATA")
    if data and not options.train_json:
        folder = Path(data) / "tinyperson640"
        options.train_json, options.val_json = (
            str(folder / f"{name}.json") for name in ("train", "val")
        )
        options.images = str(folder / "images")
    if not options.train_json:
        parser.error("set ALPHAFPN_DATA, or give --train-json, --val-json and --images")
    # As many tiles as in the paper, whatever the batch.
    options.steps = options.steps or round(_STEPS * _BATCH / options.batch)
    if options.warmup < 0:
        options.warmup = max(1, round(_WARMUP / _STEPS * options.steps))
    options.lr = options.lr or _RATE * options.batch / _BATCH
    options.runs = options.runs or str(options.out / "runs")
    options.results = options.results or str(options.out / "plan.jsonl")
    execution = replace(from_options(Execution, options), quiet=True)
    return from_options(Config, options), execution, options


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is left of the plan, and return how many runs failed."""
    base, execution, options = parse(arguments)
    deadline = time.time() + 60 * options.minutes
    first = pilots(base)
    failed = sweep(first, execution, options.jobs, deadline)
    rate = best_rate(first, results.read([execution.results, *execution.done]))
    if rate is None:
        print("the pilots are not finished: the rest waits for the rate", file=sys.stderr)
        return failed
    planned = list(runs(base, rate))
    failed += sweep(planned, execution, options.jobs, deadline)
    keys = {config.key() for config in planned}
    known = results.read([execution.results, *execution.done])
    print(f"learning rate {rate:g}, chosen on the baseline with seed {_PILOT_SEED}")
    for setting in settings([record for record in known if record["key"] in keys]):
        print(f"\n{title(setting)}\n\n{table(setting)}")
    return failed


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
