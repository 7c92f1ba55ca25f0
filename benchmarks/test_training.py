"""The experiments' training step: losses of a whole batch, against a loop over its images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.pairs import Pairs, in_turns, spread
from benchmarks.paper.config import Config
from benchmarks.paper.models import make_detector
from benchmarks.paper.training import Experiment

OBJECTS = 27  # on each crop, as on those of 320 pixels from TinyPerson
# What a CPU can do, and the set-up of the first runs on a GPU with larger batches.
SMALL = Config(crop=160, channels=64, batch=8, weights="none", precision="bf16-mixed")
LARGE = Config(crop=320, channels=256, batch=64, weights="none", precision="bf16-mixed")


def test_training_step(benchmark: Any, record: Any, device: str) -> None:
    """Losses, backward, clipping and SGD; without making the batch."""
    pytest.importorskip("efficientnet_lite_pytorch")
    config = LARGE if device == "cuda" else SMALL
    generator = torch.Generator().manual_seed(0)
    side = config.crop
    pixels = torch.randint(256, (config.batch, side, side, 3), dtype=torch.uint8)
    sides = 3 * 8 ** torch.rand(config.batch, OBJECTS, 2, generator=generator)
    corners = (side - sides) * torch.rand(config.batch, OBJECTS, 2, generator=generator)
    boxes = list(torch.cat([corners, corners + sides], 2))
    labels = [torch.ones(OBJECTS, dtype=torch.int64)] * config.batch

    def make(batched: bool, compiled: str = "") -> Callable[[], object]:
        detector = make_detector(config, num_classes=2)
        detector.to(device, memory_format=torch.channels_last).train()
        nothing: Any = None
        experiment = Experiment(
            config, detector, nothing, nothing, on_device=True, compiled=compiled
        ).to(device)
        trained = [p for p in detector.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1e-6, momentum=0.9)
        images = pixels.to(device)

        def step() -> object:
            with torch.autocast(device, torch.bfloat16):
                losses = experiment.losses(images, boxes, labels, batched=batched)
            optimizer.zero_grad()
            torch.stack([loss.float() for loss in losses.values()]).sum().backward()
            torch.nn.utils.clip_grad_norm_(trained, 10.0)
            return optimizer.step()

        return step

    steps = {"loop": make(False), "batched": make(True)}
    if device == "cuda":
        steps |= {f"compiled, {m}": make(True, m) for m in ("default", "reduce-overhead")}
    times = in_turns(list(steps.values()), device=device, seconds=20, least=5)
    benchmark.pedantic(steps["batched"], rounds=1)
    for name, own in zip(steps, times, strict=True):
        crops = config.batch / spread(own)["median_s"]
        size = {"crop": side, "batch": config.batch, "channels": config.channels}
        pairs = Pairs(times[0], own).summary()
        record(f"training/{name}", device, **pairs, crops_per_s=crops, **size)
