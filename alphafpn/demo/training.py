"""How the demo's detectors are trained, run and evaluated."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from alphafpn.demo.detector import Levels, detector
from alphafpn.demo.scenes import Scene
from alphafpn.pyramid import Alpha
from alphafpn.surgery import fold_alpha, patch_detector
from alphafpn.tiny import evaluate_tiny

Detections: TypeAlias = list[dict[str, Tensor]]

MEASURE = "AP50_tiny"
BASELINE, ESTIMATED, NONE, FIRST = "alpha = 1", "S-alpha", "alpha = 0", "first function"
ROWS = (BASELINE, ESTIMATED, "alpha = 0.5", NONE, FIRST)
_CLIP = 5.0


@dataclass(frozen=True)
class Settings:
    """How much the demo does; by default, a few minutes' work for two cores.

    Attributes:
        train: Scenes to train on.
        val: Scenes to evaluate on.
        steps: Of the optimizer in each training.
        batch: Scenes per step.
        learning_rate: The highest, after a tenth of the steps.
        seeds: For each, one training of each row.
        processes: Trainings side by side, each on one thread.
    """

    train: int = 320
    val: int = 160
    steps: int = 400
    batch: int = 4
    learning_rate: float = 6e-3
    seeds: tuple[int, ...] = (0, 1)
    processes: int = 2


@dataclass(frozen=True)
class Task:
    """What detectors are trained on and judged on.

    Attributes:
        train: Scenes to train on.
        val: Scenes to evaluate on.
        truth: COCO data set of `val`.
        sizes: Of the anchors in pixels, by level.
        ratios: Height over width of the anchors.
        s_alpha: Factors estimated from `train`.
    """

    train: list[Scene]
    val: list[Scene]
    truth: dict[str, Any]
    sizes: Levels
    ratios: tuple[float, ...]
    s_alpha: list[float]


class Training(NamedTuple):
    """One training: of a row, on a task, from a seed."""

    task: str
    row: str
    seed: int


class Trained(NamedTuple):
    """What came of it.

    Attributes:
        figures: Of the evaluation.
        last_loss: Mean of the last ten; None where training diverged.
        found: Detections in the scenes to evaluate on.
        weights: State dict.
        cpu_seconds: What it took.
    """

    figures: dict[str, float]
    last_loss: float | None
    found: Detections
    weights: dict[str, Tensor]
    cpu_seconds: float


def train_and_evaluate(tasks: dict[str, Task], settings: Settings, training: Training) -> Trained:
    """Trains a detector and evaluates it."""
    began = time.process_time()
    task = tasks[training.task]
    model, loss = train_detector(task, training.row, training.seed, settings)
    found = detect(model, as_images(task.val))
    return Trained(
        evaluate(task.truth, found),
        loss if math.isfinite(loss) else None,
        found,
        model.state_dict(),
        time.process_time() - began,
    )


def start_of(task: Task, row: str) -> Any:
    """A new detector with the factors and the first function of a row."""
    model = detector(task.sizes, task.ratios)
    factors: dict[str, Alpha] = {ESTIMATED: task.s_alpha, "alpha = 0.5": 0.5, NONE: 0.0}
    if row == FIRST:
        fold_alpha(patch_detector(model, task.s_alpha))
    return patch_detector(model, factors.get(row, 1.0))


def train_detector(task: Task, row: str, seed: int, settings: Settings) -> tuple[nn.Module, float]:
    """Trains a new detector; returns it in eval mode, with the mean of its last ten losses."""
    torch.manual_seed(seed)
    model = start_of(task, row)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        settings.learning_rate,
        total_steps=settings.steps + 1,
        pct_start=0.1,
        cycle_momentum=False,
    )
    scenes = [*task.train, *(scene.mirrored() for scene in task.train)]
    losses = []
    batches = rows(len(task.train), settings.batch, seed)
    for batch in itertools.islice(batches, settings.steps):
        chosen = [scenes[row] for row in batch]
        targets = [{"boxes": scene.boxes, "labels": scene.labels} for scene in chosen]
        loss = sum(model(as_images(chosen), targets).values())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()
        schedule.step()
    return model.eval(), float(np.mean(losses[-10:]))


def rows(count: int, batch: int, seed: int) -> Iterator[list[int]]:
    """Rows of each step's images, of `count` and as many mirrored ones that follow them.

    Every image is seen once before any is twice, mirrored at random; the same for the same seed.
    """
    rng = np.random.default_rng(seed)
    order: list[int] = []
    while True:
        while len(order) < batch:
            order += (rng.permutation(count) + count * rng.integers(0, 2, count)).tolist()
        yield order[:batch]
        order = order[batch:]


def as_images(scenes: Sequence[Scene]) -> list[Tensor]:
    """The scenes as a detector takes them: float32 [3, H, W] from 0 to 1."""
    return [scene.pixels / 255 for scene in scenes]


@torch.no_grad()
def detect(model: nn.Module, images: Sequence[Tensor], batch: int = 16) -> Detections:
    """Runs a detector on images: boxes, labels and scores for each."""
    return [
        found
        for first in range(0, len(images), batch)
        for found in model(list(images[first : first + batch]))
    ]


def as_results(found: Detections) -> list[dict[str, Any]]:
    """Detections as COCO results; an image's id is its place.

    Class 0 is the background, which a detector finds only where its training went wrong.
    """
    return [
        {
            "image_id": index,
            "category_id": label,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for index, entry in enumerate(found)
        for (x1, y1, x2, y2), score, label in zip(
            *(entry[name].tolist() for name in ("boxes", "scores", "labels")), strict=True
        )
        if label > 0
    ]


def evaluate(truth: dict[str, Any], found: Detections) -> dict[str, float]:
    """Evaluates detections against a COCO data set of the scenes."""
    figures = evaluate_tiny(truth, as_results(found))
    return {name: figures[name] for name in (MEASURE, "AP25_tiny", "AP50_all", "MR50_tiny")}
