"""Cluttered scenes, figures among things that look like them, and a detector trained on them."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock

from alphafpn.demo.scenes import Marks, as_coco, cloud
from alphafpn.pyramid import Alpha
from alphafpn.tiny import tiny_retinanet

Scene: TypeAlias = tuple[NDArray[np.uint8], Marks]  # pixels [H, W, 3]
Tensors: TypeAlias = tuple[Tensor, Tensor]  # image [3, H, W] from 0 to 1, boxes [N, 4] as xyxy


@dataclass(frozen=True)
class Settings:
    """Scenes, a detector, and how it is trained.

    Attributes:
        side: Of the scenes, in pixels.
        train: Scenes to train on.
        val: Scenes to evaluate on.
        steps: Of the optimizer in each training.
        batch: Scenes per step.
        learning_rate: The highest, after a tenth of the steps.
        channels: Of the pyramid and the heads.
    """

    side: int = 192
    train: int = 160
    val: int = 80
    steps: int = 300
    batch: int = 4
    learning_rate: float = 2e-3
    channels: int = 32


def drawn_scenes(count: int, side: int, seed: int) -> Iterator[Scene]:
    """Square scenes with figures, in about TinyPerson's sizes, among things that look like them."""
    for index in range(count):
        yield _draw(np.random.default_rng((seed, index)), side)


def _draw(rng: np.random.Generator, side: int) -> Scene:
    image = np.full((side, side, 3), 0.45)
    for cells in (3, 8, 20, 48):
        image += rng.normal(0, 0.05, 3) + 0.06 * cloud(rng, cells, side)[..., None]
    count = 2 * int(rng.integers(8, 17))
    sizes = np.exp(rng.normal(np.log(8.5), 1.05, 20 * count))
    sizes = sizes[(sizes >= 4) & (sizes <= 0.6 * side)][:count]
    marks: Marks = []
    for size in sorted(sizes.tolist(), reverse=True):
        is_figure = rng.random() < 0.5
        aspect = math.sqrt(rng.uniform(1.2, 2.2))
        w, h = size / aspect, size * aspect
        if not is_figure and rng.random() < 0.5:
            w, h = h, w
        left, top = rng.uniform(0, side - w), rng.uniform(0, side - h)
        rows, columns = (slice(int(a), int(a + n) + 1) for a, n in ((top, h), (left, w)))
        region = image[rows, columns]
        y, x = np.mgrid[rows, columns][:, : region.shape[0], : region.shape[1]] + 0.5
        u, v = (x - left) / w * 2 - 1, (y - top) / h * 2 - 1
        # A figure is light above and dark below, or the reverse; other things are of one tone, or
        # split from left to right.
        if is_figure:
            shade = np.tanh(3 * v + 0.6)
            marks.append({"bbox": [left, top, w, h]})
        else:
            shade = np.tanh(3 * u) if rng.random() < 0.5 else np.ones_like(u)
        tone = rng.choice([-1, 1]) * rng.uniform(0.14, 0.3) + rng.normal(0, 0.03, 3)
        edge = (1 - np.abs(u) ** 2.5 - np.abs(v) ** 2.5) * min(w, h) / 4
        cover = np.clip(edge + 0.5, 0, 1)[..., None]
        region += cover * (shade[..., None] * tone + rng.normal(0, 0.05, region.shape))
    image += rng.normal(0, 0.035, image.shape)
    return (image.clip(0, 1) * 255).astype(np.uint8), marks


def coco(name: str, scenes: list[Scene]) -> dict[str, Any]:
    """A COCO data set of the scenes, with files in the folder `name`."""
    return as_coco(name, ((pixels.shape[:2], marks) for pixels, marks in scenes))


def as_tensors(scenes: list[Scene]) -> list[Tensors]:
    """The scenes as the detector takes them."""
    tensors = []
    for pixels, marks in scenes:
        found = [mark["bbox"] for mark in marks]
        boxes = torch.tensor(found, dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        tensors.append((torch.from_numpy(pixels).permute(2, 0, 1) / 255, boxes))
    return tensors


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


def train_detector(alpha: Alpha, scenes: list[Tensors], seed: int, settings: Settings) -> nn.Module:
    """Trains a new detector; returns it in training mode."""
    torch.manual_seed(seed)
    model = small_detector(settings, alpha)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps + 1, pct_start=0.1
    )
    for images, targets in itertools.islice(batches(scenes, seed, settings.batch), settings.steps):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    return model


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
