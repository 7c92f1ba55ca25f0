"""Train one configuration and judge it by the protocol.

    python -m benchmarks.paper.train --train-json ... --val-json ... --images ... [--alpha .5] ...

A run that is interrupted, by whatever, goes on from its last checkpoint when it is started again;
a finished one is not repeated. Its record is appended to `--results`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812
import torch
import torchvision

from alphafpn.tiny import MonotoneScaleMatch, ScaleMatch, box_sizes
from benchmarks.paper import results
from benchmarks.paper.callbacks import Checkpoints, Progress
from benchmarks.paper.config import Config, Execution, add_options, check, from_options
from benchmarks.paper.data import Batches, Split
from benchmarks.paper.models import make_detector, set_alpha
from benchmarks.paper.training import Experiment


def run(config: Config, execution: Execution, deadline: float = math.inf) -> dict[str, Any] | None:
    """Do what is left to do of a run.

    Args:
        config: what to run.
        execution: how.
        deadline: in `time.time()`; the run is interrupted at the first checkpoint after it.

    Returns:
        The run's record, or None if it was interrupted.
    """
    check(config, execution)
    key = config.key()
    checkpoint = Path(execution.runs) / f"{key}.ckpt"
    for known in results.read([execution.results, *execution.done]):
        if known["key"] == key and not lacks_weights(config, execution):
            checkpoint.unlink(missing_ok=True)
            return known
    _quieten()
    experiment, source = prepare(config, execution)
    finished, cuda = _fit(experiment, config, execution, checkpoint, deadline)
    if not finished:
        return None
    began = time.monotonic()
    judge = L.Trainer(**_options(config, execution))
    figures = dict(judge.validate(experiment, verbose=False)[0])
    edges = len(experiment.detector.backbone.fpn.inner_blocks) - 1
    alpha = [round(figures.pop(f"alpha{edge}"), 6) for edge in range(edges)]
    record: dict[str, Any] = {
        "key": key,
        "config": config.identity(),
        "alpha": alpha,
        "s_alpha": source,
        "figures": {name: round(value, 5) for name, value in figures.items()},
        "loss": experiment.curve,
        "diverged_at": experiment.diverged_at,
        "counts": {
            "train_images": len(experiment.batches.split),
            "train_boxes": sum(map(len, experiment.batches.split.boxes)),
            "val_images": len(experiment.val),
            "val_boxes": sum(map(len, experiment.val.boxes)),
            **experiment.batches.split.boxes_by_category(),
        },
        "seconds": [round(experiment.seconds, 1), round(time.monotonic() - began, 1)],
        "memory_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if cuda else None,
        "device": _device(cuda),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "lightning": L.__version__,
        },
    }
    record = results.finite(record)
    if execution.keep_weights:
        partial = Path(execution.runs) / f"{key}.{os.getpid()}.partial"
        torch.save(experiment.detector.state_dict(), partial)
        os.replace(partial, weights_path(config, execution))
    results.append(Path(execution.results), record)
    checkpoint.unlink(missing_ok=True)
    return record


def lacks_weights(config: Config, execution: Execution) -> bool:
    """Whether a run has to be done for its weights, even if its figures are known."""
    return execution.keep_weights and not weights_path(config, execution).exists()


def weights_path(config: Config, execution: Execution) -> Path:
    """Where `--keep-weights` leaves a run's weights."""
    return Path(execution.runs) / f"{config.key()}.pt"


def splits(config: Config, execution: Execution) -> tuple[Split, Split]:
    """What to train on and what to judge on; their images are decoded if they never were."""
    train = Split(config, config.train_json, execution.runs, erase=True)
    return train, Split(config, config.val_json, execution.runs, erase=False)


def prepare(config: Config, execution: Execution) -> tuple[Experiment, dict[str, Any]]:
    """What to run, ready to run, and where its factors come from."""
    train, val = splits(config, execution)
    detector = make_detector(config, num_classes=1 + len(train.categories))
    source = set_alpha(config, detector, train)
    detector.to(memory_format=torch.channels_last)
    resize = None
    if config.scale_match == "sm":
        resize = ScaleMatch(box_sizes(config.match_json))
    elif config.scale_match == "msm":
        resize = MonotoneScaleMatch(box_sizes(train.coco), box_sizes(config.match_json))
    batches = Batches(train, config, resize)
    on_device = execution.cache == "device"
    how = {"on_device": on_device, "compiled": execution.compile}
    return Experiment(config, detector, batches, val, **how), source


def _fit(
    experiment: Experiment,
    config: Config,
    execution: Execution,
    checkpoint: Path,
    deadline: float,
) -> tuple[bool, bool]:
    """Train until the end or the deadline; returns whether to the end, and whether on CUDA."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    callbacks: list[L.Callback] = [Checkpoints(checkpoint, execution.checkpoint_every, deadline)]
    if not execution.quiet:
        callbacks.append(Progress(f"alpha {config.alpha} seed {config.seed}"))
    trainer = L.Trainer(
        **_options(config, execution),
        callbacks=callbacks,
        max_steps=config.steps,
        max_epochs=-1,
        limit_val_batches=0,
        gradient_clip_val=config.clip or None,
    )
    trainer.fit(experiment, ckpt_path=checkpoint if checkpoint.exists() else None)
    # With several devices another process has trained: what it saved is all there is to see.
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    experiment.load_state_dict(state["state_dict"])
    experiment.on_load_checkpoint(state)
    finished = state["global_step"] >= config.steps or experiment.diverged_at is not None
    return finished, isinstance(trainer.accelerator, L.pytorch.accelerators.CUDAAccelerator)


def _options(config: Config, execution: Execution) -> dict[str, Any]:
    """What both trainers need."""
    cpu = execution.accelerator == "cpu" or not torch.cuda.is_available()
    # Not needed for equal results, and it fills every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return {
        "accelerator": execution.accelerator,
        "devices": execution.devices,
        "strategy": "auto" if execution.devices == 1 else "ddp_spawn",
        "precision": config.precision,
        "deterministic": cpu,
        "benchmark": not cpu,
        "use_distributed_sampler": False,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }


def _device(cuda: bool) -> str:
    if cuda:
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _quieten() -> None:
    """Lightning's advice on loaders does not apply: batches are made in the training step."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    torch.set_float32_matmul_precision("high")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser, Config)
    add_options(parser, Execution)
    options = parser.parse_args()
    record = run(from_options(Config, options), from_options(Execution, options))
    json.dump(record, sys.stdout)
    print()


if __name__ == "__main__":
    main()
