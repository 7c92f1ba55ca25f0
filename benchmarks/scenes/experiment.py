"""One run: a configuration, trained and judged."""

from __future__ import annotations

import dataclasses
import functools
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from alphafpn import alpha_parameters, estimate_alpha_for, gradient_shares
from alphafpn.demo.detector import DEVIATION, MEAN, detector
from alphafpn.demo.training import as_images, as_results, detect, rows
from alphafpn.tiny import evaluate_tiny
from benchmarks.batched import BatchedLoss, outputs
from benchmarks.paper.config import hash_of
from benchmarks.paper.results import finite
from benchmarks.scenes import starts
from benchmarks.scenes.data import DataSet, load

FIGURES = ("AP50_tiny", "AP50_all", "AP25_tiny")
_CLIP = 5.0
_POINTS = 20  # of the loss curve
_LOOKED_AT = 8  # images for shares


@dataclass(frozen=True)
class Config:
    """What a run is.

    Attributes:
        data: Name of the data set, see `load`.
        seed: Of scenes, first weights and order. Runs of a seed share all of these.
        alpha: Kind of factors, see `starts.factors`.
        start: Kind of factors whose function the first weights compute; empty: that of `alpha`.
        laterals: `equal`: laterals are brought to equal RMS before the first step.
        weights: Of the backbone: `scratch`, `pretrained` on drawn scenes, or `imagenet`, which is
            a larger one.
        optimizer: `adamw` or `sgd`.
        rate: The highest, after a tenth of the steps.
        steps: Of the optimizer.
        batch: Images per step.
    """

    data: str
    seed: int
    alpha: str = "1"
    start: str = ""
    laterals: str = ""
    weights: str = "scratch"
    optimizer: str = "adamw"
    rate: float = 4e-3
    steps: int = 400
    batch: int = 4

    def key(self) -> str:
        """Names the run."""
        return hash_of(dataclasses.asdict(self))


@functools.lru_cache(maxsize=2)
def _data(name: str, seed: int) -> tuple[DataSet, Any, torch.Tensor, Any]:
    """A data set with its anchors' matches and S-alpha, which all runs of a seed share."""
    data = load(name, seed)
    model = detector(data.sizes, data.ratios, data.classes)
    loss = BatchedLoss(model, data.images.shape[-2:])
    return data, loss, loss.match(data.boxes), estimate_alpha_for(model, data.items())


@functools.lru_cache(maxsize=1)
def _maps(name: str, seed: int) -> torch.Tensor:
    """C2 of a data set's images, which all runs from ImageNet's weights share."""
    return starts.Lite().maps(_data(name, seed)[0].images)


def run(config: Config, folder: Path) -> dict[str, Any]:
    """Trains and judges.

    Args:
        config: What to run.
        folder: Where pretrained weights are kept.

    Returns:
        The record: `figures` are None where training diverged.
    """
    began = time.monotonic()
    data, batched, matched, estimate = _data(config.data, config.seed)
    torch.manual_seed(config.seed)
    model = detector(data.sizes, data.ratios, data.classes)
    if config.weights == "pretrained":
        starts.take_pretrained(model, starts.pretrained(folder))
    elif config.weights == "imagenet":
        starts.take_imagenet(model)
    model.to(memory_format=torch.channels_last)
    alpha = starts.factors(config.alpha, estimate)
    start = starts.factors(config.start, estimate) if config.start else None
    some = data.images[:_LOOKED_AT]
    starts.prepare(model, alpha, start, some if config.laterals else None)
    shares = [_shares(model, data)]
    losses = []
    diverged_at = None
    optimizer = _optimizer(model, config)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        total_steps=config.steps + 1,
        pct_start=0.1,
        cycle_momentum=False,
    )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    inputs = data.images
    if config.weights == "imagenet":
        inputs = _maps(config.data, config.seed)
    batches = rows(len(data.train), config.batch, config.seed)
    for step, batch in zip(range(config.steps), batches, strict=False):
        logits, deltas = outputs(model, inputs[batch])
        boxes, labels = ([part[row] for row in batch] for part in (data.boxes, data.labels))
        loss = sum(batched(logits, deltas, matched[batch], boxes, labels).values())
        losses.append(float(loss.detach()))  # type: ignore[union-attr]
        if not math.isfinite(losses[-1]):
            diverged_at = step
            break
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimizer.step()
        schedule.step()
    trained = time.monotonic() - began
    figures = None
    if diverged_at is None:
        shares.append(_shares(model, data))
        detections = detect(model.eval(), as_images(data.val))
        found = evaluate_tiny(data.truth, as_results(detections))
        figures = {name: round(found[name], 5) for name in FIGURES}
    parts = np.array_split(losses, min(_POINTS, len(losses)))
    record = {
        "key": config.key(),
        "config": dataclasses.asdict(config),
        "figures": figures,
        "s_alpha": [round(factor, 4) for factor in estimate],
        "counts": list(estimate.counts),
        "alpha": [round(v, 4) for v in model.backbone.fpn.alpha.detach().tolist()],
        "shares": shares,
        "diverged_at": diverged_at,
        "loss": [round(float(np.mean(part)), 4) for part in parts],
        "seconds": [round(trained, 2), round(time.monotonic() - began - trained, 2)],
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
    }
    kept: dict[str, Any] = finite(record)
    return kept


def _optimizer(model: Any, config: Config) -> torch.optim.Optimizer:
    learnt = alpha_parameters(model)
    known = {id(factor) for factor in learnt}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups: list[dict[str, Any]] = [{"params": others, "lr": config.rate}]
    if learnt:
        groups.append({"params": learnt, "lr": config.rate, "weight_decay": 0.0})
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-4)
    return torch.optim.AdamW(groups, weight_decay=1e-3, fused=True)


def _shares(model: Any, data: DataSet) -> dict[str, Any]:
    """Forward shares at each edge, and the gradient's shares [C_i, P_j]."""
    some = slice(0, _LOOKED_AT)
    images = [image * DEVIATION + MEAN for image in data.images[some]]
    targets = [
        {"boxes": boxes, "labels": labels}
        for boxes, labels in zip(data.boxes[some], data.labels[some], strict=True)
    ]
    try:
        gradient = gradient_shares(model, images, targets).shares.tolist()
    except ValueError:  # of a training that is about to diverge
        gradient = None
    return {
        "forward": [round(share, 4) for share in starts.forward_shares(model, data.images[some])],
        "gradient": gradient and [[round(share, 4) for share in row] for row in gradient],
    }
