"""Trains TinyPerson in the paper's regime, the most informative runs first, while there is time.

    ALPHAFPN_DATA=/data python -m benchmarks.paper.plan --minutes 25 --out plan/

    0. pilots: the rows without factors at three rates, with a seed of their own, for an eighth of
       the steps; the other rows take the rate of the row that they start from
    1. stock levels and anchors; adapted; adapted with S-alpha; adapted with .5
    2. the paper's levels and anchors with factors of 1, S-alpha and .5, and with the first function
       of S-alpha alone

Seeds are the outer loop of each part, and the parts come again with more seeds. Finished runs are
lines of OUT/plan.jsonl and interrupted ones are checkpoints in OUT: with that folder on another
machine, the same command goes on there. The same command may run several times side by side.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alphafpn import (
    AlphaEstimate,
    AnchorFit,
    adapt_detector,
    compare_anchors,
    estimate_alpha_for,
    fold_alpha,
    patch_detector,
)
from alphafpn.demo.training import as_results
from benchmarks.intervals import mean_of, paired
from benchmarks.markdown import table
from benchmarks.paper.data import Batches, Split
from benchmarks.paper.detectors import detector
from benchmarks.records import Record, by_seed, digest, environment, key_of, read, work
from benchmarks.training import Checkpoint, Interrupted, figures, train

STOCK, ADAPTED, PAPER = "stock", "adapted", "paper"
FIRST_ROWS = (STOCK, ADAPTED, f"{ADAPTED}, S-alpha", f"{ADAPTED}, alpha = 0.5")
PAPER_ROWS = (PAPER, f"{PAPER}, S-alpha", f"{PAPER}, alpha = 0.5", f"{PAPER}, first function")
FIGURES = ("AP50_tiny", "AP50_tiny1", "AP50_tiny2", "AP50_tiny3", "AP25_tiny", "AP75_tiny")
# The paper's recipe for RetinaNet: so many steps of 2 tiles of 640 x 512 pixels at this rate.
_STEPS, _BATCH, _RATE, _WARMUP = 19_236, 2, 0.005, 500
_PILOT_SEED, _PILOT_SHARE, _PILOT_RATES = 100, 8, (1.0, 0.5, 0.25)
_SEEDS, _ROUNDS = 4, 3  # seeds of a part before the next part has its turn; turns
_MOMENTUM, _DECAY, _CLIP = 0.9, 1e-4, 10.0


def base(options: argparse.Namespace) -> Record:
    """What all runs have in common. The tiles are as many as the paper's, whatever the batch."""
    steps = options.steps or round(_STEPS * _BATCH / options.batch)
    return {
        "detector": options.detector,
        "backbone": options.backbone,
        "channels": options.channels,
        "size": list(options.size),
        "crop": options.crop,
        "batch": options.batch,
        "steps": steps,
        "warmup": max(1, round(_WARMUP / _STEPS * steps)),
        "train": digest(options.train_json),
        "val": digest(options.val_json),
    }


def pilots(common: Record) -> list[Record]:
    """The rows without factors at several rates, for a part of the schedule."""
    steps = max(1, common["steps"] // _PILOT_SHARE)
    part = {**common, "steps": steps, "warmup": min(common["warmup"], steps)}
    rate = _RATE * common["batch"] / _BATCH
    return [
        {**part, "row": row, "seed": _PILOT_SEED, "optimizer": "sgd", "lr": share * rate}
        for row in (STOCK, ADAPTED, PAPER)
        for share in _PILOT_RATES
    ]


def best_rates(records: Sequence[Record]) -> dict[str, float]:
    """By row without factors: the rate of its best pilot; the smallest if all diverged."""
    found: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        config = record["config"]
        figure = -1.0 if record["diverged"] else record["AP50_tiny"]
        found.setdefault(config["row"], []).append((figure, -config["lr"]))
    return {row: -max(tried)[1] for row, tried in found.items()}


def runs(common: Record, rates: dict[str, float]) -> Iterator[Record]:
    """All runs after the pilots, in the order to run them."""
    for turn in range(_ROUNDS):
        for rows in (FIRST_ROWS, PAPER_ROWS):
            for seed in range(turn * _SEEDS, (turn + 1) * _SEEDS):
                for row in rows:
                    rate = rates[row.split(",")[0]]
                    yield {**common, "row": row, "seed": seed, "optimizer": "sgd", "lr": rate}


class Laboratory:
    """The data, and all that runs share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.fits: dict[str, AnchorFit] = {}
        self.estimates: dict[tuple[str, str], AlphaEstimate] = {}
        size = tuple(options.size)
        self.train, self.val = (
            Split(path, options.images, size, options.out / "cache", erase=erase)
            for path, erase in ((options.train_json, True), (options.val_json, False))
        )

    @functools.cached_property
    def pixels(self) -> tuple[Tensor, Tensor]:
        """All images to train on and to evaluate on, on the device."""
        return self.train.pixels.to(self.device), self.val.pixels.to(self.device)

    @functools.cached_property
    def items(self) -> list[tuple[tuple[int, int], Tensor]]:
        """Squares like those of training, about ten for each image: what is counted."""
        options = self.options
        batches = Batches(self.train, options.crop, options.batch, seed=0)
        return batches.items(10 * len(self.train.boxes))

    def prepared(self, config: Record) -> tuple[Any, Record]:
        """The detector of a run before its first step, and what was counted for it."""
        name, _, factors = config["row"].partition(", ")
        levels = PAPER if name == PAPER else STOCK
        kind = config["detector"]
        torch.manual_seed(config["seed"])
        model = detector(kind, levels, config["backbone"], config["channels"])
        counted: Record = {}
        if name == ADAPTED:
            if kind not in self.fits:
                self.fits[kind] = compare_anchors(model, self.items).best
            fit = self.fits[kind]
            adapt_detector(model, fit)
            counted["fit"] = [fit.anchor_scale, fit.finer_level, round(fit.reached, 4)]
        if (kind, name) not in self.estimates:
            self.estimates[kind, name] = estimate_alpha_for(model, self.items)
        estimate = self.estimates[kind, name]
        counted |= {"counts": list(estimate.counts), "ratios": list(estimate.ratios)}
        alpha: Any = factors.removeprefix("alpha = ") or 1.0
        if factors in ("S-alpha", "first function"):
            alpha = list(estimate)
        if factors == "first function":
            fold_alpha(patch_detector(model, alpha))
            alpha = 1.0
        patch_detector(model, alpha if isinstance(alpha, list) else float(alpha))
        counted["alpha"] = [round(v, 4) for v in model.backbone.fpn.alpha.tolist()]
        model.to(self.device, memory_format=torch.channels_last)
        return model.train(), counted

    def run(self, config: Record) -> Record | None:
        """Trains and evaluates; None if the time is up before that."""
        began = time.monotonic()
        model, counted = self.prepared(config)
        path = self.options.out / f"{key_of(config)}.pt"
        saved = Checkpoint(path, model, self.options.every, self.options.deadline)
        batches = Batches(self.train, config["crop"], config["batch"], config["seed"])
        try:
            losses, diverged = train(
                self.loss_of(model, batches, config),
                optimizer_of(model, config),
                batches,
                config["steps"],
                _CLIP,
                schedule=functools.partial(rate_at, config=config),
                checkpoint=saved,
            )
        except Interrupted:
            return None
        found: Record = {"diverged": diverged, **dict.fromkeys(FIGURES)}
        if not diverged:
            found |= figures(self.val.coco, self.detections(model), FIGURES)
        path.unlink(missing_ok=True)
        seconds = round(time.monotonic() - began, 1)
        return {**found, **counted, "loss": losses, "seconds": seconds, **environment()}

    def loss_of(self, model: Any, batches: Batches, config: Record) -> Any:
        """The loss of a numbered batch."""

        def loss(step: int) -> Tensor:
            # What torchvision draws must not depend on what was drawn before.
            torch.manual_seed(config["seed"] * 1_000_003 + step)
            crops, boxes = batches.at(step, self.pixels[0])
            images = crops.permute(0, 3, 1, 2).float().div_(255)
            targets = [
                {"boxes": part, "labels": torch.ones(len(part), dtype=torch.int64)}
                for part in boxes
            ]
            targets = [{name: v.to(self.device) for name, v in t.items()} for t in targets]
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                parts = model(list(images), targets)
            return torch.stack([part.float() for part in parts.values()]).sum()

        return loss

    @torch.no_grad()
    def detections(self, model: Any) -> list[dict[str, Any]]:
        """What is found in the whole images, with the ids of the annotations."""
        model.eval()
        found = []
        for image in self.pixels[1]:
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                one = model([image.permute(2, 0, 1).float().div(255)])[0]
            found.append({name: value.float().cpu() for name, value in one.items()})
        ids = [image["id"] for image in self.val.coco["images"]]
        category = self.val.coco["categories"][0]["id"]
        return [
            {**result, "image_id": ids[result["image_id"]], "category_id": category}
            for result in as_results([{**one, "labels": one["labels"].long()} for one in found])
        ]


def optimizer_of(model: torch.nn.Module, config: Record) -> torch.optim.Optimizer:
    """The paper's SGD: biases learn twice as fast and have no decay."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rate = config["lr"]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if not name.endswith("bias")]},
        {
            "params": [p for name, p in named if name.endswith("bias")],
            "weight_decay": 0.0,
            "lr": 2 * rate,
        },
    ]
    return torch.optim.SGD(groups, rate, momentum=_MOMENTUM, weight_decay=_DECAY)


def rate_at(step: int, config: Record) -> float:
    """The paper's schedule: warm-up from a third, a tenth after 1/2 and again after 5/6."""
    steps, warmup = config["steps"], config["warmup"]
    drops = (step >= steps / 2) + (step >= steps * 5 / 6)
    warm = 1.0 if step >= warmup else 1 / 3 + 2 / 3 * step / warmup
    return float(warm * 0.1**drops)


def summary(records: Sequence[Record]) -> str:
    """A table of all rows; differences are paired by seed."""
    rows = {
        row: {s: record["AP50_tiny"] for s, record in runs.items() if not record["diverged"]}
        for (row,), runs in by_seed(records, "row").items()
    }
    lines = []
    for row, values in rows.items():
        other = {STOCK: "", ADAPTED: STOCK, PAPER: STOCK}.get(row, row.split(",")[0])
        mean = mean_of(list(values.values()))
        against = mean_of(paired(values, rows.get(other, {}))).text(2, "+")
        lines.append([row, mean.count, mean.text(2), against and f"{against} over {other}"])
    return table(["row", "seeds", "AP50_tiny", "difference"], lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = os.environ.get("ALPHAFPN_DATA")
    folder = Path(data) / "tinyperson640" if data else None
    parser.add_argument("--minutes", type=float, default=math.inf, help="time for all of it")
    parser.add_argument("--out", type=Path, default=Path("runs/plan"), help="records, checkpoints")
    parser.add_argument("--detector", choices=("retinanet", "fasterrcnn"), default="retinanet")
    parser.add_argument("--backbone", choices=("lite0", "toy"), default="lite0")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--size", type=int, nargs=2, default=(960, 1706), help="HEIGHT WIDTH")
    parser.add_argument("--crop", type=int, default=576, help="as many pixels as the paper's tiles")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=0, help="0: as many tiles as in the paper")
    parser.add_argument("--every", type=int, default=250, help="steps between two checkpoints")
    for name, file in (
        ("train-json", "train.json"),
        ("val-json", "val.json"),
        ("images", "images"),
    ):
        parser.add_argument(f"--{name}", type=Path, default=folder and folder / file)
    options = parser.parse_args(arguments)
    if not (options.train_json and options.val_json and options.images):
        parser.error("set ALPHAFPN_DATA, or give --train-json, --val-json and --images")
    if options.crop % 32 or options.crop > min(options.size):
        parser.error(f"--crop: expected a multiple of 32 of at most {min(options.size)}, found "
                     f"{options.crop}")  # fmt: skip
    options.deadline = time.time() + 60 * options.minutes
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what is left of the plan; returns how many runs are missing."""
    options = parse(arguments)
    file, common = options.out / "plan.jsonl", base(options)
    laboratory = Laboratory(options)

    def do(todo: list[Record]) -> list[Record]:
        left = (options.deadline - time.time()) / 60
        work(todo, laboratory.run, file, options.out / "claims", left)
        keys = {key_of(config) for config in todo}
        return [record for record in read([file]) if record["key"] in keys]

    first = pilots(common)
    while len(tried := do(first)) < len(first):
        if time.time() > options.deadline:
            print("the pilots are not finished; the other runs need their rates", file=sys.stderr)
            return len(first) - len(tried)
        time.sleep(1)  # another process has claimed the rest
    rates = best_rates(tried)
    planned = list(runs(common, rates))
    done = do(planned)
    print("learning rates:", rates, f"chosen with seed {_PILOT_SEED}")
    print(summary(done))
    return len(planned) - len(done)


if __name__ == "__main__":
    main()
