"""Run what is planned and not on record yet; several processes may do so side by side.

    python -m benchmarks.adapting run [--studies main starts ...] [--seeds 0 1 2] [--minutes 60]
    python -m benchmarks.adapting list
    python -m benchmarks.adapting report [--page docs/adapting-results.md]

The environment variable `ALPHAFPN_DATA` names the folder of the real images. Each finished run is a
line of `results.jsonl`; an interrupted one starts again from its first step.
"""

from __future__ import annotations

import argparse
import functools
import math
from pathlib import Path

import torch

from benchmarks import records
from benchmarks.adapting.plan import STUDIES

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def main() -> None:
    """Does what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("run", "list", "report"))
    parser.add_argument("--studies", nargs="+", choices=list(STUDIES), default=["main"])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "adapting")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "adapting-results.md")
    given = parser.parse_args()
    if given.what == "report":
        # Only here: it draws, and needs more libraries than a run.
        from benchmarks.adapting.report import write

        write(records.read([given.results]), given.page)
        return
    todo = [
        config for seed in given.seeds for study in given.studies for config in STUDIES[study](seed)
    ]
    if given.what == "list":
        done = {record["key"] for record in records.read([given.results])}
        left = sum(records.key_of(config) not in done for config in todo)
        print(f"{len(todo)} runs, {left} of them not on record")
        return
    from benchmarks.adapting.experiment import run

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    records.work(
        todo,
        functools.partial(run, folder=given.folder),
        given.results,
        given.folder,
        given.minutes,
    )


if __name__ == "__main__":
    main()
