"""A small detector on scenes: how it is built, trained, run and evaluated."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock

from alphafpn.demo.scenes import Tensors
from alphafpn.pyramid import Alpha
from alphafpn.tiny import evaluate_tiny, tiny_retinanet

Detections: TypeAlias = list[dict[str, Tensor]]

MEASURE = "AP50_tiny"


@dataclass(frozen=True)
class Settings:
    """How much the demo does; by default, a few minutes' work for two cores.

    Attributes:
        side: Of the scenes, in pixels.
        train: Scenes to train on.
        val: Scenes to evaluate on.
        steps: Of the optimizer in each training.
        batch: Scenes per step.
        learning_rate: The highest, after a tenth of the steps.
        channels: Of the pyramid and the heads.
        seeds: For each, one training with each kind of factors.
    """

    side: int = 192
    train: int = 160
    val: int = 80
    steps: int = 300
    batch: int = 4
    learning_rate: float = 2e-3
    channels: int = 32
    seeds: tuple[int, ...] = (0, 1)


def small_detector(settings: Settings, alpha: Alpha | None = None) -> Any:
    """A RetinaNet of P2-P6 on a residual network of ten layers."""
    widths = (16, 32, 64, 96, 128)
    stem = nn.Conv2d(3, widths[0], 3, 2, 1, bias=False)
    stages = [nn.Sequential(stem, nn.BatchNorm2d(widths[0]), nn.ReLU())]
    for before, width in itertools.pairwise(widths):
        shortcut = nn.Sequential(nn.Conv2d(before, width, 1, 2, bias=False), nn.BatchNorm2d(width))
        stages.append(BasicBlock(before, width, 2, shortcut))
    body = nn.Sequential(OrderedDict((f"c{i}", stage) for i, stage in enumerate(stages, 1)))
    names = {f"c{i}": str(i) for i in range(2, 6)}
    backbone = BackboneWithFPN(body, names, list(widths[1:]), settings.channels)
    model = tiny_retinanet(backbone, alpha=alpha)
    for name, parameter in model.head.named_parameters():
        # RetinaNet's own start is made for 256 channels; with fewer, signals would die away.
        if ".conv." in name and parameter.dim() == 4:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    return model


def train_detector(
    alpha: Alpha,
    scenes: list[Tensors],
    seed: int,
    settings: Settings,
    step_done: Callable[[], object],
) -> tuple[nn.Module, float]:
    """Trains a new detector; returns it in eval mode, with the mean of its last ten losses."""
    torch.manual_seed(seed)
    model = small_detector(settings, alpha)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps + 1, pct_start=0.1
    )
    losses = []
    for images, targets in itertools.islice(batches(scenes, seed, settings.batch), settings.steps):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        step_done()
    return model.eval(), float(np.mean(losses[-10:]))


def batches(
    scenes: list[Tensors], seed: int, size: int
) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """Images and targets without end, mirrored at random; the same for the same seed."""
    rng = np.random.default_rng(seed)
    order: list[int] = []
    while True:
        while len(order) < size:
            order += rng.permutation(len(scenes)).tolist()
        batch, order = order[:size], order[size:]
        images, targets = [], []
        for index in batch:
            image, boxes = scenes[index]
            if rng.random() < 0.5:
                image = image.flip(-1)
                x1, y1, x2, y2 = boxes.T
                boxes = torch.stack([image.shape[-1] - x2, y1, image.shape[-1] - x1, y2], 1)
            images.append(image)
            targets.append({"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64)})
        yield images, targets


@torch.no_grad()
def detect(model: nn.Module, scenes: list[Tensors]) -> Detections:
    """Runs a detector on scenes: boxes and scores for each."""
    groups = [scenes[i : i + 8] for i in range(0, len(scenes), 8)]
    return [found for group in groups for found in model([image for image, _ in group])]


def evaluate(truth: dict[str, Any], found: Detections) -> dict[str, float]:
    """Evaluates detections against a COCO data set of the scenes."""
    results = [
        {"image_id": index, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
        for index, entry in enumerate(found)
        for (x1, y1, x2, y2), score in zip(
            entry["boxes"].tolist(), entry["scores"].tolist(), strict=True
        )
    ]
    figures = evaluate_tiny(truth, results)
    return {name: figures[name] for name in (MEASURE, "AP25_tiny", "AP50_all", "MR50_tiny")}
