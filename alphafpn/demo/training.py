"""One run of the demo: a row's detector is trained and evaluated."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from alphafpn.adapt import AnchorFit, adapt_detector
from alphafpn.demo.detector import detector
from alphafpn.demo.scenes import Scene
from alphafpn.pyramid import Alpha
from alphafpn.surgery import fold_alpha, patch_detector
from alphafpn.tiny import evaluate_tiny

MEASURE = "AP50_tiny"
STOCK, ADAPTED, HALF, ESTIMATED = "stock", "adapted", "alpha = 0.5", "S-alpha"
NONE, FIRST = "alpha = 0", "first function"
ROWS = {  # by family
    "results": (STOCK, ADAPTED, HALF, ESTIMATED, NONE, FIRST),
    "far": (ADAPTED, HALF, ESTIMATED, FIRST),
}
CONFIDENT = 0.3
_BATCH, _RATE, _CLIP = 4, 6e-3, 5.0


@dataclass(frozen=True)
class Settings:
    """How much the demo does; by default a few minutes' work for two cores."""

    train: int = 240  # scenes
    val: int = 100
    steps: int = 250  # of the optimizer in each training
    seeds: tuple[int, ...] = (0, 1)  # for each, one training of each row
    processes: int = 2  # trainings at the same time, each on one thread


@dataclass(frozen=True)
class Task:
    """What detectors are trained and evaluated on, and how they are adapted."""

    train: list[Scene]
    val: list[Scene]
    fit: AnchorFit

    @property
    def shown(self) -> int:
        """Returns the place of a scene to show: with the median number of objects, at least one."""
        some = [i for i, scene in enumerate(self.val) if len(scene.boxes)]
        return sorted(some, key=lambda i: len(self.val[i].boxes))[len(some) // 2]


def run(task: Task, row: str, seed: int, steps: int) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """Trains a row's detector from a seed; returns its figures, and what it finds in a scene.

    That is the confident detections, xyxy [N, 4], in the scene to show. No tensor is returned,
    since processes would share it as an open file.
    """
    torch.manual_seed(seed)
    model = start(row, task.fit)
    loss = train(model, task.train, steps, seed)
    found = detect(model, task.val)
    shown = found[task.shown]
    confident = shown["boxes"][shown["scores"] > CONFIDENT].numpy()
    return {"seed": seed, **evaluate(task.val, found), "loss": loss}, confident


def start(row: str, fit: AnchorFit) -> Any:
    """Makes a row's detector; the weights of all rows are the same for the same random state.

    `first function` is the exception: it has factors of 1, and weights with which it starts from
    the outputs of `S-alpha`.
    """
    model = detector()
    if row == STOCK:
        return model
    adapt_detector(model, fit)
    alpha = list(fit.estimate)
    if row == FIRST:
        return fold_alpha(patch_detector(model, alpha))
    factors: dict[str, Alpha] = {ADAPTED: 1.0, HALF: 0.5, ESTIMATED: alpha, NONE: 0.0}
    return patch_detector(model, factors[row])


def train(model: nn.Module, scenes: Sequence[Scene], steps: int, seed: int) -> float | None:
    """Trains a detector; returns the mean of its last ten losses, None if they are not finite."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        _RATE,  # the highest, after a tenth of the steps
        total_steps=steps + 1,
        pct_start=0.1,
        cycle_momentum=False,
    )
    both = [*scenes, *(scene.mirrored() for scene in scenes)]
    losses = []
    model.train()
    for batch in itertools.islice(rows(len(scenes), _BATCH, seed), steps):
        chosen = [both[i] for i in batch]
        targets = [
            {"boxes": torch.from_numpy(scene.boxes), "labels": torch.ones(len(scene.boxes)).long()}
            for scene in chosen
        ]
        loss = sum(model(as_images(chosen), targets).values())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()
        schedule.step()
    mean = float(np.mean(losses[-10:]))
    return mean if np.isfinite(mean) else None


def rows(count: int, batch: int, seed: int) -> Iterator[list[int]]:
    """Yields the images of each step, of `count` and as many mirrored ones that follow them.

    Every image is seen once before any is seen twice, mirrored at random; the same for the same
    seed.
    """
    rng = np.random.default_rng(seed)
    order: list[int] = []
    while True:
        while len(order) < batch:
            order += (rng.permutation(count) + count * rng.integers(0, 2, count)).tolist()
        yield order[:batch]
        order = order[batch:]


def as_images(scenes: Sequence[Scene]) -> list[Tensor]:
    """Returns the scenes as a detector takes them: float32 [3, H, W] from 0 to 1."""
    return [torch.from_numpy(scene.pixels).permute(2, 0, 1) / 255 for scene in scenes]


@torch.no_grad()
def detect(model: nn.Module, scenes: Sequence[Scene], batch: int = 16) -> list[dict[str, Tensor]]:
    """Returns the detections in each scene: boxes, labels and scores."""
    model.eval()
    starts = range(0, len(scenes), batch)
    return [found for i in starts for found in model(as_images(scenes[i : i + batch]))]


def evaluate(scenes: Sequence[Scene], found: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Evaluates the detections in scenes: figures from 0 to 1, -1 if there are no such objects."""
    objects = [(i, 1, box, False) for i, scene in enumerate(scenes) for box in scene.boxes.tolist()]
    figures = evaluate_tiny(as_coco(objects, len(scenes), 1), as_results(found))
    return {name: figures[name] for name in (MEASURE, "AP50_all")}


def as_coco(
    objects: Sequence[tuple[int, int, Sequence[float], bool]], images: int, classes: int
) -> dict[str, Any]:
    """Returns a COCO data set of so many images; an image's id is its place.

    An object is an image, a class from 1, a box (xyxy), and whether it is to be ignored.
    """
    return {
        "images": [{"id": image} for image in range(images)],
        "categories": [{"id": label} for label in range(1, classes + 1)],
        "annotations": [
            {
                "image_id": image,
                "category_id": label,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "ignore": ignore,
            }
            for image, label, (x1, y1, x2, y2), ignore in objects
        ],
    }


def as_results(detections: Sequence[dict[str, Tensor]]) -> list[dict[str, Any]]:
    """Returns the detections in each image as COCO results; an image's id is its place.

    Class 0 is the background, which a detector finds only if its training went wrong.
    """
    return [
        {
            "image_id": index,
            "category_id": label,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for index, found in enumerate(detections)
        for (x1, y1, x2, y2), score, label in zip(
            *(found[name].tolist() for name in ("boxes", "scores", "labels")), strict=True
        )
        if label > 0
    ]
