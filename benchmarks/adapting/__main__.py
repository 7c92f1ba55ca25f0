"""Run what is planned and not on record yet; several processes may do so side by side.

    python -m benchmarks.adapting run [--studies main long ...] [--seeds 0 1 2] [--minutes 60]
    python -m benchmarks.adapting list

The environment variable `ALPHAFPN_DATA` names the folder of the real images. Each finished run is a
line of `benchmarks/results/adapting.jsonl`; an interrupted one starts again from its first step.
`python -m benchmarks.tables` makes tables and pictures.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from benchmarks import records
from benchmarks.adapting.experiment import run
from benchmarks.adapting.plan import STUDIES

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Does what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("run", "list"))
    parser.add_argument("--studies", nargs="+", choices=list(STUDIES), default=["main"])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--results", type=Path, default=records.FOLDER / "adapting.jsonl")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "adapting")
    given = parser.parse_args()
    todo = [
        config for seed in given.seeds for study in given.studies for config in STUDIES[study](seed)
    ]
    if given.what == "list":
        done = {record["key"] for record in records.read([given.results])}
        left = sum(records.key_of(config) not in done for config in todo)
        print(f"{len(todo)} runs, {left} of them not on record")
        return
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    records.work(todo, run, given.results, given.folder, given.minutes)


if __name__ == "__main__":
    main()
