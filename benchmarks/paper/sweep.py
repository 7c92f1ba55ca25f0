"""Run experiments: many configurations, each with many seeds, whatever of them is not done yet.

    python -m benchmarks.paper.sweep fig1 table1 --seeds 10 --jobs 8 --budget-minutes 9 ...

Experiments (any number of them; what they share runs once):
    pilot   baseline at several learning rates (`--lrs`), one seed: to choose one before the rest
    fig1    constants (`--grid`) between baseline and S-alpha
    table1  baseline, one-, three-, atten- and S-alpha; bf-alpha is the best constant of `--grid`
    table2  sigma-power initialisation with factors of 1, against factors
    start   what the factors do to the first function, apart from what they do to gradients:
            factors of 1 and S-alpha, each starting as itself and as the other
    table4  all of the paper's detectors (`--detectors`), with and without weights that were
            pre-trained with Scale Match on `--pretrain-json`: the rows of Tables 3 and 4
    table5  `--backbones`
    sizes   constants and S-alpha at each of `--sizes` with each of `--shares` of the images to
            train on: Figs. 5 and 7, Tables 6 and 7

Seeds are the outer loop, so that pairs complete first. All other options are those of `train`.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.paper import results
from benchmarks.paper.config import (
    BACKBONES,
    DETECTORS,
    Config,
    Execution,
    add_options,
    check,
    from_options,
)
from benchmarks.paper.sizes import derive
from benchmarks.paper.train import lacks_weights, run, splits, weights_path

PAIR = ("1", "s-alpha")
LEARNED = ("one", "three", "attention")


def variants(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What the configurations of an experiment change, in the order to run them."""
    constants = [{"alpha": alpha} for alpha in (*PAIR, *options.grid)]
    if name == "fig1":
        return constants
    if name == "table1":
        return [*constants, *({"alpha": alpha} for alpha in LEARNED)]
    if name == "table2":
        return [*({"alpha": alpha} for alpha in PAIR), {"alpha": "1", "start": options.sigma_power}]
    if name == "start":
        return [
            {"alpha": alpha, "start": start}
            for start in ("", *PAIR)
            for alpha in PAIR
            if start != alpha
        ]
    if name == "table4":
        return [
            {"detector": detector, "init": init, "alpha": alpha}
            for detector in options.detectors
            for init in ("", *filter(None, [options.inits.get(detector)]))
            for alpha in PAIR
        ]
    if name == "sizes":
        return [change | entry for change in _sizes(options) for entry in constants]
    if name == "table5":
        found = [entry.partition("=") for entry in options.backbones]
        return [
            {"backbone": backbone, "weights": weights or "default", "alpha": alpha}
            for backbone, _, weights in found
            for alpha in PAIR
        ]
    return [{"alpha": "1", "lr": lr} for lr in options.lrs]


def _sizes(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What a configuration changes at each size, with each share of the images."""
    files = options.train_json, options.val_json, options.images
    found = []
    for size in options.sizes:
        for share in options.shares:
            change = derive(*files, size, share, Path(options.runs) / "sizes")
            crop = min(options.crop, min(change["size"]) // 32 * 32)
            found.append({**change, "crop": crop})
    return found


def pretraining(options: argparse.Namespace) -> dict[str, Config]:
    """For each detector of `table4`, the run whose weights it may start from; often none."""
    if "table4" not in options.experiments or not options.pretrain_json:
        return {}
    base = from_options(Config, options)
    changes = {
        "train_json": options.pretrain_json,
        "match_json": options.train_json,
        "scale_match": options.pretrain_scale_match,
        "size": tuple(options.pretrain_size or options.size),
    }
    if options.pretrain_val_json:
        changes["val_json"] = options.pretrain_val_json
    return {name: replace(base, detector=name, **changes) for name in options.detectors}


def plan(options: argparse.Namespace) -> list[Config]:
    """All configurations that are asked for, each once, in the order to run them."""
    base = from_options(Config, options)
    changes = [change for name in options.experiments for change in variants(name, options)]
    configs: dict[str, Config] = {}
    for seed in range(options.seed, options.seed + options.seeds):
        for change in changes:
            config = replace(base, seed=seed, **change)
            configs.setdefault(config.key(), config)
    return list(configs.values())


def sweep(configs: list[Config], execution: Execution, jobs: int, deadline: float) -> int:
    """Run what is not done, `jobs` at a time, and return how many runs failed.

    After the deadline (in `time.time()`) nothing is started, and what runs stops at its next
    checkpoint, to go on when it is asked for again.
    """
    done = {record["key"] for record in results.read([execution.results, *execution.done])}
    pending = [c for c in configs if c.key() not in done or lacks_weights(c, execution)]
    before = len(configs) - len(pending)
    for config in pending:
        check(config, execution)
    for config in {(c.train_json, c.val_json, c.size, c.dense): c for c in pending}.values():
        splits(config, execution)
    failures = interrupted = 0
    if time.time() > deadline:
        pending, interrupted = [], len(pending)
    with (
        tqdm(total=len(configs), initial=before, file=sys.stderr) as bar,
        ProcessPoolExecutor(jobs, get_context("spawn"), _start, (jobs,)) as pool,
    ):
        futures = {pool.submit(_work, c, execution, deadline): c for c in pending}
        for future in as_completed(futures):
            config = futures[future]
            title = f"{config.detector} alpha {config.alpha} lr {config.lr} seed {config.seed}"
            error = future.exception()
            record = None if error else future.result()
            if error is not None:
                failures += 1
                bar.write(f"{title}: {''.join(traceback.format_exception(error))}", sys.stderr)
            elif record is None:
                interrupted += 1
            else:
                bar.update()
                figure, loss = record["figures"]["AP50_tiny"], record["loss"][-1:]
                text = f"{title}: AP50_tiny {100 * figure:.2f}, loss {loss}"
                bar.write(f"{text}, {record['seconds']} s, {record['memory_gib']} GiB", sys.stderr)
    finished = len(configs) - before - interrupted - failures
    text = f"{finished} runs done now, {before} before, {interrupted} left, {failures} failed"
    print(text, file=sys.stderr)
    return failures


def _start(jobs: int) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    threading.Thread(target=_outlive_nobody, args=(os.getppid(),), daemon=True).start()


def _outlive_nobody(parent: int) -> None:
    """End with the process that gives out work: any run may be killed at any moment."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(config: Config, execution: Execution, deadline: float) -> dict[str, Any] | None:
    if time.time() > deadline:
        return None
    record = run(config, execution, deadline)
    torch.cuda.empty_cache()
    return record


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("pilot", "fig1", "table1", "table2", "start", "table4", "table5", "sizes")
    parser.add_argument("experiments", nargs="+", choices=names)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from --seed on")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a process each")
    parser.add_argument("--budget-minutes", type=float, default=float("inf"))
    parser.add_argument("--grid", nargs="*", default=["0.2", "0.35", "0.5", "0.75"])
    parser.add_argument("--lrs", nargs="*", type=float, default=[0.005, 0.01, 0.02])
    parser.add_argument("--sigma-power", default="0.5")
    parser.add_argument("--detectors", nargs="*", default=list(DETECTORS), choices=DETECTORS)
    parser.add_argument("--pretrain-json", default="", help="COCO annotations; empty: no such runs")
    parser.add_argument("--pretrain-val-json", default="", help="by default --val-json")
    parser.add_argument("--pretrain-size", type=int, nargs=2, help="by default --size")
    parser.add_argument("--pretrain-scale-match", default="sm", choices=("sm", "msm"))
    parser.add_argument("--sizes", nargs="*", default=["100", "200", "800"])
    parser.add_argument("--shares", nargs="*", type=float, default=[1.0])
    parser.add_argument("--backbones", nargs="*", default=list(BACKBONES[:2]), metavar="NAME=FILE")
    parser.set_defaults(inits={})
    add_options(parser, Config)
    add_options(parser, Execution)
    return parser.parse_args(arguments)


def main() -> None:
    """Run what the command line asks for."""
    options = parse()
    deadline = time.time() + 60 * options.budget_minutes
    execution = replace(from_options(Execution, options), quiet=True)
    first = pretraining(options)
    keeping = replace(execution, keep_weights=True)
    failed = sweep(list(first.values()), keeping, options.jobs, deadline) if first else 0
    options.inits = {
        name: str(weights_path(config, keeping))
        for name, config in first.items()
        if not lacks_weights(config, keeping)
    }
    if len(options.inits) < len(first):
        sys.exit("pre-training is not finished: the rest waits for it")
    sys.exit(1 if sweep(plan(options), execution, options.jobs, deadline) + failed else 0)


if __name__ == "__main__":
    main()
