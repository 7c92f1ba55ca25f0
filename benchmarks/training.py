"""The loop that trains, and what is measured of a detector afterwards."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from alphafpn import alpha_parameters
from alphafpn.tiny import evaluate_tiny

_CLIP = 5.0
_POINTS = 20  # of the loss curve
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Checkpoint:
    """Where a training that may be interrupted goes on."""

    path: Path
    model: nn.Module
    every: int = 250  # steps
    deadline: float = math.inf  # in `time.time()`; training stops at the first checkpoint after it


class Interrupted(Exception):  # noqa: N818
    """The deadline came before the last step; a checkpoint is kept."""


def train(
    loss_of: Callable[[Batch], Tensor],
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    steps: int,
    clip: float = _CLIP,
    *,
    schedule: Callable[[int], float] | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[list[float], bool]:
    """Trains for `steps` steps, each on a batch; `batches` are the same in each call.

    `schedule` tells by what the rates are multiplied at each step. By default they rise for a tenth
    of the steps and then fall to 0. Returns the loss curve in at most 20 means, and whether
    training diverged; then it has stopped.
    """
    rates: Any = (
        torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            [group["lr"] for group in optimizer.param_groups],
            total_steps=steps + 1,
            pct_start=0.1,
            cycle_momentum=False,
        )
        if schedule is None
        else torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses = _resume(checkpoint, optimizer, rates)
    begun = len(losses)
    for step, batch in zip(range(steps), batches, strict=False):
        if step < begun:
            continue
        loss = loss_of(batch)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        rates.step()
        if checkpoint and step + 1 < steps and (step + 1) % checkpoint.every == 0:
            _save(checkpoint, optimizer, rates, losses)
            if time.time() > checkpoint.deadline:
                raise Interrupted(f"{checkpoint.path}: {step + 1} of {steps} steps done")
    parts = np.array_split(losses, min(_POINTS, len(losses)))
    curve = [round(float(np.mean(part)), 4) for part in parts]
    return curve, not math.isfinite(losses[-1])


def _save(checkpoint: Checkpoint, optimizer: Any, rates: Any, losses: list[float]) -> None:
    checkpoint.path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "model": checkpoint.model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rates": rates.state_dict(),
        "losses": losses,
    }
    partial = checkpoint.path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(checkpoint.path)


def _resume(checkpoint: Checkpoint | None, optimizer: Any, rates: Any) -> list[float]:
    """Takes up what was saved; returns the losses of the steps that are done."""
    if checkpoint is None or not checkpoint.path.exists():
        return []
    state = torch.load(checkpoint.path, weights_only=True, map_location="cpu")
    checkpoint.model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    rates.load_state_dict(state["rates"])
    losses: list[float] = state["losses"]
    return losses


def adamw(model: nn.Module, rate: float, decay: float = 1e-3) -> torch.optim.Optimizer:
    """AdamW on all that a model trains; learnable factors have no decay."""
    factors = alpha_parameters(model)
    known = {id(factor) for factor in factors}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups: list[dict[str, Any]] = [{"params": others}]
    if factors:
        groups.append({"params": factors, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, rate, weight_decay=decay, fused=True)


def figures(
    truth: dict[str, Any], results: list[dict[str, Any]], names: Sequence[str]
) -> dict[str, float]:
    """Figures of the evaluation in percent, by name; None of a range without objects."""
    found = evaluate_tiny(truth, results)
    return {name: round(100 * found[name], 3) if found[name] >= 0 else None for name in names}
