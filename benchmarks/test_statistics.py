"""Counting the boxes of COCO: the public function against what people use instead."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from alphafpn import AnchorLayout, estimate_alpha
from benchmarks.pairs import interleave, repeat, spread, timed
from benchmarks.workload import BOXES, SIZE, boxes, layout

# Boxes per call of the baseline: its matrix has this many rows.
ROWS = 16


def seconds_per_box(function: Callable[[Tensor], object], sample: Tensor, device: str) -> float:
    parts = sample.split(ROWS)
    timed(lambda: function(parts[0]), device)
    return float(np.median([timed(lambda p=p: function(p), device) for p in parts])) / ROWS


@pytest.mark.parametrize("shapes", [3, 9])
def test_kernel_against_brute_force(benchmark: Any, record: Any, device: str, shapes: int) -> None:
    """All boxes in one tensor, and the matrix of `box_iou` on a sample of them."""
    lay, all_boxes = layout(shapes), boxes(device=device)
    anchors = torch.cat(lay.anchors()).to(device)
    times = repeat(lambda: estimate_alpha(lay, all_boxes), device)
    benchmark.pedantic(lambda: estimate_alpha(lay, all_boxes), rounds=5)
    sample = all_boxes[: 32 * ROWS]
    brute = seconds_per_box(lambda b: box_iou(b, anchors).max(1), sample, device)
    check_exact(sample, lay, anchors)
    record(
        f"kernel/{shapes} shapes",
        device,
        boxes=BOXES,
        anchors=len(anchors),
        baseline_s=brute * BOXES,
        **{f"candidate_{k}": v for k, v in spread(times).items()},
        times_faster=brute * BOXES / float(np.median(times)),
    )


def check_exact(sample: Tensor, lay: AnchorLayout, anchors: Tensor) -> None:
    """The counts of all boxes with a clear best level are those of brute force."""
    sizes = [len(level) for level in lay.anchors()]
    iou = torch.cat([box_iou(b, anchors) for b in sample.split(ROWS)])
    per_level = torch.stack([part.amax(1) for part in iou.split(sizes, dim=1)], dim=1)
    top = per_level.topk(2, dim=1).values
    clear = (top[:, 0] - top[:, 1] > 1e-6) & (top[:, 0] > 0)
    expected = torch.bincount(per_level.argmax(1)[clear], minlength=len(sizes))
    assert list(estimate_alpha(lay, sample[clear]).counts) == expected.tolist()


@pytest.mark.parametrize("images", [10_000, 122_858])
@pytest.mark.parametrize("shapes", [3, 9])
def test_list_of_images(benchmark: Any, record: Any, device: str, shapes: int, images: int) -> None:
    """A tensor of seven boxes for each image."""
    lay, per_image = layout(shapes), list(boxes(7 * images, device=device).split(7))
    times = repeat(lambda: estimate_alpha(lay, per_image), device)
    benchmark.pedantic(lambda: estimate_alpha(lay, per_image), rounds=3)
    values = {f"candidate_{k}": v for k, v in spread(times).items()}
    record(f"estimate_alpha/{shapes} shapes, {images:,} images", device, **values)


def test_many_shapes_of_images(benchmark: Any, record: Any, device: str) -> None:
    """COCO's images in 300 padded shapes, over as many in one shape."""
    sizes = [(32 * h, 32 * w) for h in range(16, 31) for w in range(22, 42)]
    generator = torch.Generator().manual_seed(1)
    same = list(boxes(device=device).split(7))
    which = torch.randint(len(sizes), (len(same),), generator=generator).tolist()
    several = [layout(3, size) for size in sizes]
    layouts = [several[index] for index in which]
    # Each box within its own image.
    scales = [torch.tensor([w / SIZE[1], h / SIZE[0]] * 2, device=device) for h, w in sizes]
    own = [part * scales[index] for part, index in zip(same, which, strict=True)]
    one = [layout(3)] * len(same)
    pairs = interleave(
        lambda: estimate_alpha(one, same),
        lambda: estimate_alpha(layouts, own),
        device=device,
        seconds=4,
    )
    benchmark.pedantic(lambda: estimate_alpha(layouts, own), rounds=3)
    record("shapes/300 over 1", device, **pairs.summary())


@pytest.mark.parametrize("shapes", [3, 9])
def test_plain_tensors(benchmark: Any, record: Any, shapes: int) -> None:
    """Levels as tensors, whose grid is recognised, over a layout."""
    lay, all_boxes = layout(shapes), boxes()
    levels = lay.anchors()
    pairs = interleave(
        lambda: estimate_alpha(lay, all_boxes), lambda: estimate_alpha(levels, all_boxes), seconds=4
    )
    benchmark.pedantic(lambda: estimate_alpha(levels, all_boxes), rounds=3)
    record(f"plain tensors/{shapes} shapes", **pairs.summary())


def test_irregular_anchors(benchmark: Any, record: Any, device: str) -> None:
    """Anchors in random order: the blocked search over the whole matrix."""
    generator = torch.Generator().manual_seed(0)
    levels = [
        level[torch.randperm(len(level), generator=generator)].to(device)
        for level in layout(3).anchors()
    ]
    anchors, some = torch.cat(levels), boxes(2000, device=device)

    def matrix() -> object:
        return [box_iou(part, anchors).max(1) for part in some.split(200)]

    pairs = interleave(
        matrix, lambda: estimate_alpha(levels, some), device=device, least=3, warm_up=1
    )
    benchmark.pedantic(lambda: estimate_alpha(levels, some), rounds=1)
    assert estimate_alpha(levels, some).counts == estimate_alpha(layout(3), some).counts
    record("irregular/217,413 anchors, 2,000 boxes", device, **pairs.summary())


MEMORY = """
import re, sys, torch
from pathlib import Path
from benchmarks.workload import boxes, layout
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
from alphafpn import estimate_alpha
count = int(sys.argv[1])
all_boxes = torch.cat([boxes(1_000_000)] * (count // 1_000_000))
estimate_alpha(layout(3), all_boxes[:10_000])
# Forget the peak of making the inputs (Linux).
Path("/proc/self/clear_refs").write_text("5")
before = peak()
assert estimate_alpha(layout(3), all_boxes).num_boxes == count
print(peak() - before)
"""


def test_memory_of_thirty_million_boxes(benchmark: Any, record: Any) -> None:
    """The peak beyond the inputs, in a process of its own."""
    count = 30_000_000

    def run() -> float:
        command = [sys.executable, "-c", MEMORY, str(count)]
        environment = {**os.environ, "PYTHONPATH": os.getcwd()}
        out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return float(out.stdout)

    record("memory/30,000,000 boxes", boxes=count, extra_mib=benchmark.pedantic(run, rounds=1))
