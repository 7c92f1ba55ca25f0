"""Fine-tune a detector that was trained with factors of 1, changing them in several ways.

    python -m benchmarks.finetune run --seeds 5 --budget-minutes 35
    python -m benchmarks.finetune table

`run` trains a small detector on cluttered scenes with factors of 1, once per seed, and then
fine-tunes it on other scenes. Runs of a seed start from the same weights and see the same batches.
Each finished run is a line of the results file, and is not repeated. `table` writes what the file
says between the marks of docs/experiments.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import itertools
import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn

from alphafpn import estimate_alpha_for, fold_alpha, patch_detector
from alphafpn.demo.training import MEASURE, detect, evaluate
from benchmarks.clutter import (
    Settings,
    as_tensors,
    batches,
    coco,
    drawn_scenes,
    small_detector,
    train_detector,
)
from benchmarks.paper import results
from benchmarks.paper.config import hash_of
from benchmarks.paper.pairs import mean_of

STAY, JUMP, RAMP, RESCALE = "stay at 1", "jump", "ramp", "rescale, then patch"
TARGETS = ("S-alpha", "0.2")
WHEN = ("before", "after", "ramped", "end")

_ROOT = Path(__file__).resolve().parents[1]
_POINTS = 20  # of the loss curve
_PRETRAINING = Settings(side=128, train=200, val=120, steps=500)


@dataclass(frozen=True)
class Plan:
    """What all runs have in common.

    Attributes:
        pretraining: Scenes of each of the three sets, the detector, and how it is trained first.
        steps: Of fine-tuning.
        ramp: Of them, those before the factors are at their target.
        rates: Optimizers with their learning rates, which are constant. AdamW's is a tenth of what
            the detector was trained with; SGD's are a tenth and a third of what diverges even where
            the factors stay at 1.
    """

    pretraining: Settings = _PRETRAINING
    steps: int = 200
    ramp: int = 100
    rates: tuple[tuple[str, float], ...] = (
        ("SGD", 3e-3),
        ("SGD", 1e-2),
        ("AdamW", 2e-4),
    )

    def runs(self, seed: int) -> Iterator[dict[str, Any]]:
        """The configurations of a seed."""
        plan = dataclasses.asdict(self)
        del plan["rates"]
        kinds = [("1", STAY), *itertools.product(TARGETS, (JUMP, RAMP, RESCALE))]
        for optimizer, rate in self.rates:
            for target, way in kinds:
                kind = {"optimizer": optimizer, "rate": rate, "target": target, "way": way}
                yield {"plan": plan, "seed": seed, **kind}


class Laboratory:
    """The scenes of a plan, and the detectors that were trained on them first.

    Args:
        plan: What to do.
        folder: Where trained weights are kept.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self.folder = folder
        settings = plan.pretraining
        counts = (settings.train, settings.val, settings.train)
        first, val, second = (
            list(drawn_scenes(count, settings.side, seed)) for seed, count in enumerate(counts)
        )
        self.first, self.val, self.second = (as_tensors(part) for part in (first, val, second))
        self.truth = coco("val", val)
        items = [((image.shape[-2], image.shape[-1]), boxes) for image, boxes in self.second]
        self.estimate = estimate_alpha_for(small_detector(settings), items)

    def figure(self, model: nn.Module) -> float:
        """AP50_tiny on the scenes to evaluate on; leaves the model in training mode."""
        images = [image for image, _ in self.val]
        found = evaluate(self.truth, detect(model.eval(), images, batch=8))[MEASURE]
        model.train()
        return found

    def pretrained(self, seed: int) -> tuple[Any, float]:
        """A detector that was trained with factors of 1, and how good it is; kept in the folder."""
        settings = self.plan.pretraining
        name = hash_of({**dataclasses.asdict(settings), "seeds": seed})
        path = self.folder / f"{name}.pt"
        if not path.exists():
            model = train_detector(1.0, self.first, seed, settings)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            torch.save({"weights": model.state_dict(), "figure": self.figure(model)}, partial)
            partial.replace(path)
        kept = torch.load(path, weights_only=True)
        model = small_detector(settings, 1.0)
        model.load_state_dict(kept["weights"])
        return model.train(), kept["figure"]

    def run(self, config: dict[str, Any]) -> dict[str, Any]:
        """Fine-tunes a detector, and gives the record of it."""
        began = time.monotonic()
        seed, way = config["seed"], config["way"]
        model, before = self.pretrained(seed)
        start, figures = _digest(model), {"before": before}
        target = {"1": [1.0] * 3, "0.2": [0.2] * 3}.get(config["target"], list(self.estimate))
        change(model, way, target)
        optimizer = _optimizer(model, config)
        losses: list[float] = []
        endless = batches(self.second, seed, self.plan.pretraining.batch)
        for step, (images, targets) in enumerate(itertools.islice(endless, self.plan.steps)):
            if way == RAMP:
                share = min(step / self.plan.ramp, 1.0)
                patch_detector(model, [1 + share * (factor - 1) for factor in target])
            if step in (0, self.plan.ramp):
                figures["ramped" if step else "after"] = self.figure(model)
            loss = sum(model(images, targets).values())
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        else:
            figures["end"] = self.figure(model)
        parts = np.array_split(losses, min(_POINTS, len(losses)))
        return {
            "key": hash_of(config),
            "config": config,
            "start": start,
            "alpha": model.backbone.fpn.alpha.tolist(),
            "figures": {name: round(value, 5) for name, value in figures.items()},
            "diverged_at": None if "end" in figures else len(losses) - 1,
            "loss": [round(float(np.mean(part)), 5) for part in parts],
            "seconds": round(time.monotonic() - began, 1),
            "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
            },
        }


def change(model: nn.Module, way: str, target: Sequence[float]) -> None:
    """Does to a trained detector whatever is done to it before the first step."""
    if way == RESCALE:
        # The weights take up 1/alpha, so that alpha gives the outputs that were there.
        fold_alpha(patch_detector(model, [1 / factor for factor in target]))
    patch_detector(model, 1.0 if way == RAMP else target)


def run(plan: Plan, seeds: int, file: Path, folder: Path, minutes: float = math.inf) -> None:
    """Runs what the file does not hold, seed by seed; starts none after so many minutes."""
    began = time.monotonic()
    done = {record["key"] for record in results.read([file])}
    todo = [config for seed in range(seeds) for config in plan.runs(seed)]
    laboratory = None
    for config in todo:
        if hash_of(config) in done:
            continue
        if time.monotonic() - began > 60 * minutes:
            return
        laboratory = laboratory or Laboratory(plan, folder)
        record = laboratory.run(config)
        results.append(file, results.finite(record))
        print(*(config[name] for name in ("seed", "optimizer", "target", "way")), record["figures"])


def table(records: Sequence[dict[str, Any]]) -> str:
    """For each optimizer a table of means, and of paired differences with 95 % t-intervals.

    Raises:
        ValueError: If runs of a seed started from different weights.
    """
    starts: dict[int, set[str]] = {}
    for record in records:
        starts.setdefault(record["config"]["seed"], set()).add(record["start"])
    if mixed := sorted(seed for seed, found in starts.items() if len(found) > 1):
        raise ValueError(f"seeds {mixed}: expected runs that start alike, found different weights")
    groups: dict[tuple[str, float], dict[tuple[str, str], list[dict[str, Any]]]] = {}
    for record in records:
        config = record["config"]
        group = groups.setdefault((config["optimizer"], config["rate"]), {})
        group.setdefault((config["target"], config["way"]), []).append(record)
    return "\n\n".join(_section(*name, group) for name, group in sorted(groups.items()))


def _section(
    optimizer: str, rate: float, group: dict[tuple[str, str], list[dict[str, Any]]]
) -> str:
    stayed = _ends(group.get(("1", STAY), []))
    lines = [
        "| target | way | seeds | before | after the change | at the ramp's end | at the end | "
        "against staying at 1 | against jumping | last loss |",
        "|---" * 10 + "|",
    ]
    for (target, way), runs in group.items():
        good = [run for run in runs if run["diverged_at"] is None]
        seeds = str(len(good)) + f" ({len(runs) - len(good)} diverged)" * (len(good) < len(runs))
        means = [_mean([run["figures"].get(when) for run in runs]) for when in WHEN[:3]]
        against = [
            "" if others is None else _difference(_ends(runs), others)
            for others in (
                None if way == STAY else stayed,
                _ends(group.get((target, JUMP), [])) if way in (RAMP, RESCALE) else None,
            )
        ]
        end = _mean(list(_ends(runs).values()))
        last = f"{np.mean([run['loss'][-1] for run in good]):.3f}" if good else ""
        lines.append(f"| {' | '.join([target, way, seeds, *means, end, *against, last])} |")
    return results.fold(f"{optimizer}, learning rate {rate:g}", "\n".join(lines))


def _ends(runs: Sequence[dict[str, Any]]) -> dict[int, float]:
    """What came out, by seed, of the runs that did not diverge."""
    return {run["config"]["seed"]: run["figures"]["end"] for run in runs if "end" in run["figures"]}


def _mean(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    return f"{np.mean(known):.1f}" if known else ""


def _difference(found: dict[int, float], others: dict[int, float]) -> str:
    mean = mean_of([100 * (found[seed] - others[seed]) for seed in found if seed in others])
    if not mean.count:
        return ""
    return f"{mean.mean:+.1f}" + ("" if math.isnan(mean.half) else f" ± {mean.half:.1f}")


def _optimizer(model: nn.Module, config: dict[str, Any]) -> torch.optim.Optimizer:
    rate = config["rate"]
    if config["optimizer"] == "SGD":
        return torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-3)


def _digest(model: nn.Module) -> str:
    buffer = io.BytesIO()
    for tensor in model.state_dict().values():
        buffer.write(tensor.numpy().tobytes())
    return hashlib.sha256(buffer.getvalue()).hexdigest()[:12]


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget-minutes", type=float, default=math.inf)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--folder", type=Path, default=_ROOT / "runs" / "finetune")
    parser.add_argument("--page", type=Path, default=_ROOT / "docs" / "experiments.md")
    given = parser.parse_args()
    if given.what == "run":
        run(Plan(), given.seeds, given.results, given.folder, given.budget_minutes)
    else:
        results.fill(given.page, "fine-tuning", [table(results.read([given.results]))])


if __name__ == "__main__":
    main()
