"""Run what is planned and not on record yet; any number of processes may do so side by side.

    python -m benchmarks.scenes run [--parts main sgd ...] [--seeds 6] [--budget-minutes 60]
    python -m benchmarks.scenes pilot
    python -m benchmarks.scenes report

Each finished run is a line of `results.jsonl`. What was interrupted starts again from its first
step; a run takes ten seconds to four minutes on one thread of a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.paper import results
from benchmarks.scenes.experiment import Config, run
from benchmarks.scenes.plan import PARTS, PILOTS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RUNS = ROOT / "runs" / "scenes"


def work(todo: Sequence[Config], file: Path, folder: Path, minutes: float = math.inf) -> None:
    """Does what the file lacks, in order; starts nothing after so many minutes."""
    began = time.monotonic()
    known: set[str] = set()
    read = -1.0
    for config in todo:
        if time.monotonic() - began > 60 * minutes:
            return
        if file.exists() and file.stat().st_mtime != read:
            read = file.stat().st_mtime
            known = {record["key"] for record in results.read([file])}
        if config.key() in known:
            continue
        with _claim(folder / f"{config.key()}.lock") as mine:
            # Another process may have finished it between the look into the file and the claim.
            if mine and config.key() not in {r["key"] for r in results.read([file])}:
                record = run(config, folder)
                results.append(file, record)
                print(_line(config), record["figures"], record["seconds"], flush=True)


@contextlib.contextmanager
def _claim(path: Path) -> Iterator[bool]:
    """Whether this process may do a run; the claim ends with the process, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    path.unlink(missing_ok=True)


def _line(config: Config) -> str:
    kind = [config.alpha, config.start and f"from {config.start}", config.laterals]
    how = [config.weights, config.optimizer, f"{config.rate:g}"]
    return " | ".join([config.data, f"seed {config.seed}", *how, *filter(None, kind)])


def main() -> None:
    """Does what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("run", "pilot", "list", "report"))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(6)))
    parser.add_argument("--budget-minutes", type=float, default=math.inf)
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--folder", type=Path, default=RUNS)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "experiments.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "report":
        # Only here: it draws, and needs more libraries than a run.
        from benchmarks.scenes.report import write

        write(results.read([given.results]), given.page)
        return
    if given.what == "pilot":
        work(PILOTS, given.results.with_name("pilots.jsonl"), given.folder, given.budget_minutes)
        return
    todo = [config for seed in given.seeds for part in given.parts for config in PARTS[part](seed)]
    if given.what == "list":
        done = {record["key"] for record in results.read([given.results])}
        left = sum(config.key() not in done for config in todo)
        print(f"{len(todo)} runs, {left} of them not on record")
        return
    work(todo, given.results, given.folder, given.budget_minutes)


if __name__ == "__main__":
    main()
