"""The statistics kernel against what people use instead, on the same boxes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from alphafpn import AnchorLayout, estimate_alpha
from alphafpn.estimate.matcher import GridMatcher
from alphafpn.estimate.s_alpha import BLOCK, count_levels
from benchmarks.pairs import interleave, spread, timed
from benchmarks.workload import BOXES, SIZE, boxes, layout

# Boxes per call of a baseline: its matrix has this many rows.
ROWS = 16


def matcher(lay: AnchorLayout, device: str) -> GridMatcher:
    return GridMatcher(lay.cell_anchors, [lay], torch.float32, torch.device(device))


def levels_and_counts(found: GridMatcher, all_boxes: Tensor) -> Tensor:
    level, _ = found.match(all_boxes)
    return torch.bincount(level, minlength=6)


def repeat(function: Callable[[], object], device: str, seconds: float = 2.0) -> list[float]:
    for _ in range(3):
        timed(function, device)
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        times.append(timed(function, device))
    return times


def seconds_per_box(function: Callable[[Tensor], object], sample: Tensor, device: str) -> float:
    parts = sample.split(ROWS)
    timed(lambda: function(parts[0]), device)
    return float(np.median([timed(lambda p=p: function(p), device) for p in parts])) / ROWS


@pytest.mark.parametrize("shapes", [3, 9])
def test_kernel_against_brute_force(benchmark: Any, record: Any, device: str, shapes: int) -> None:
    lay = layout(shapes)
    all_boxes, anchors = boxes(device=device), torch.cat(lay.anchors()).to(device)
    found = matcher(lay, device)
    times = repeat(lambda: levels_and_counts(found, all_boxes), device)
    benchmark.pedantic(lambda: levels_and_counts(found, all_boxes), rounds=5)
    sample = all_boxes[: 32 * ROWS]
    brute = seconds_per_box(lambda b: box_iou(b, anchors).max(1), sample, device)
    checked = check_exact(found, sample, lay, anchors)
    record(
        f"kernel/{shapes} shapes",
        device,
        boxes=BOXES,
        anchors=len(anchors),
        baseline="torchvision box_iou(...).max(1), per box",
        baseline_s=brute * BOXES,
        **{f"candidate_{k}": v for k, v in spread(times).items()},
        times_faster=brute * BOXES / float(np.median(times)),
        exact_on=checked,
    )


def check_exact(found: GridMatcher, sample: Tensor, lay: AnchorLayout, anchors: Tensor) -> int:
    """How many boxes were compared with brute force; all of them agree."""
    sizes = [len(level) for level in lay.anchors()]
    iou = torch.cat([box_iou(b, anchors) for b in sample.split(ROWS)])
    per_level = torch.stack([part.amax(1) for part in iou.split(sizes, dim=1)], dim=1)
    top = per_level.topk(2, dim=1).values
    clear = (top[:, 0] - top[:, 1] > 1e-6) & (top[:, 0] > 0)
    level, _ = found.match(sample)
    assert torch.equal(level[clear], per_level.argmax(1)[clear])
    return int(clear.sum())


@pytest.mark.parametrize("shapes", [3, 9])
def test_estimate_alpha(benchmark: Any, record: Any, device: str, shapes: int) -> None:
    """The public function: checks, counts per image, IoU histogram and all."""
    lay, all_boxes = layout(shapes), boxes(device=device)
    per_image = list(all_boxes.split(7))
    counts = torch.tensor([len(b) for b in per_image])
    found = matcher(lay, device)
    inner = repeat(lambda: count_levels(found, all_boxes.split(BLOCK), counts, 5), device)
    times = repeat(lambda: estimate_alpha(lay, per_image), device)
    benchmark.pedantic(lambda: estimate_alpha(lay, per_image), rounds=3)
    record(
        f"estimate_alpha/{shapes} shapes",
        device,
        boxes=BOXES,
        images=len(per_image),
        without_the_list_s=float(np.median(inner)),
        **{f"candidate_{k}": v for k, v in spread(times).items()},
        boxes_per_s=BOXES / float(np.median(times)),
    )


def _matcher_path(anchors: Tensor) -> Callable[[Tensor], object]:
    match = Matcher(0.7, 0.3, allow_low_quality_matches=True)
    return lambda b: match(box_iou(b, anchors))


def _numpy(anchors: Tensor) -> Callable[[Tensor], object]:
    a = anchors.numpy()
    area = (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])

    def run(b: Tensor) -> object:
        g = b.numpy()[:, None]
        w = np.clip(np.minimum(g[..., 2], a[:, 2]) - np.maximum(g[..., 0], a[:, 0]), 0, None)
        h = np.clip(np.minimum(g[..., 3], a[:, 3]) - np.maximum(g[..., 1], a[:, 1]), 0, None)
        inter = w * h
        union = (g[..., 2] - g[..., 0]) * (g[..., 3] - g[..., 1]) + area - inter
        return (inter / union).argmax(1)

    return run


def _pycocotools(anchors: Tensor) -> Callable[[Tensor], object]:
    mask = pytest.importorskip("pycocotools.mask")

    def xywh(b: Tensor) -> np.ndarray:
        return torch.cat([b[:, :2], b[:, 2:] - b[:, :2]], 1).double().numpy()

    a = xywh(anchors)
    return lambda b: mask.iou(xywh(b), a, np.zeros(len(a), dtype=np.uint8)).argmax(1)


def _powerboxes(anchors: Tensor) -> Callable[[Tensor], object]:
    powerboxes = pytest.importorskip("powerboxes")
    a = anchors.double().numpy()
    return lambda b: powerboxes.iou_distance(b.double().numpy(), a).argmin(1)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("torchvision Matcher on box_iou", _matcher_path),
        ("pycocotools maskUtils.iou", _pycocotools),
        ("powerboxes iou_distance", _powerboxes),
        ("numpy", _numpy),
    ],
)
def test_other_baselines(benchmark: Any, record: Any, name: str, make: Any) -> None:
    lay = layout(3)
    all_boxes, anchors = boxes(), torch.cat(lay.anchors())
    found = matcher(lay, "cpu")
    # Boxes whose sides vanish in float32 break some of the others.
    sample = all_boxes[: 8 * ROWS]
    other = seconds_per_box(make(anchors), sample, "cpu")
    times = repeat(lambda: levels_and_counts(found, all_boxes), "cpu", 1.0)
    benchmark.pedantic(lambda: levels_and_counts(found, all_boxes), rounds=3)
    record(
        f"baseline/{name}",
        baseline_s=other * BOXES,
        candidate_median_s=float(np.median(times)),
        times_faster=other * BOXES / float(np.median(times)),
    )


def test_many_shapes_of_images(benchmark: Any, record: Any, device: str) -> None:
    """118,000 images in 300 padded shapes against one shape."""
    images = 118_000
    sizes = [(32 * h, 32 * w) for h in range(16, 31) for w in range(22, 42)]
    assert len(sizes) == 300
    counts = torch.full((images,), BOXES // images)
    counts[: BOXES - int(counts.sum())] += 1
    which = torch.randint(300, (images,), generator=torch.Generator().manual_seed(1))
    all_boxes = boxes(device=device)
    # Each box within its own image.
    scale = torch.tensor([(w / SIZE[1], h / SIZE[0]) * 2 for h, w in sizes], device=device)
    scaled = all_boxes * scale[which.repeat_interleave(counts)]
    one = matcher(layout(3), device)
    layouts = [layout(3, size) for size in sizes]
    cells = layouts[0].cell_anchors
    many = GridMatcher(cells, layouts, torch.float32, torch.device(device))

    def run_many() -> object:
        return count_levels(many, scaled.split(BLOCK), counts, 5, which)

    pairs = interleave(
        lambda: count_levels(one, all_boxes.split(BLOCK), counts, 5),
        run_many,
        device=device,
        seconds=4,
    )
    benchmark.pedantic(run_many, rounds=3)
    record("shapes/300 against 1", device, **pairs.summary())


@pytest.mark.parametrize("factor", [0.5, 1, 2, 4])
def test_number_of_anchors(benchmark: Any, record: Any, factor: float) -> None:
    size = (int(SIZE[0] * factor) // 32 * 32, int(SIZE[1] * factor) // 32 * 32)
    lay = layout(3, size)
    found, all_boxes = matcher(lay, "cpu"), boxes(size=size)
    times = repeat(lambda: levels_and_counts(found, all_boxes), "cpu", 1.0)
    benchmark.pedantic(lambda: levels_and_counts(found, all_boxes), rounds=3)
    anchors = sum(map(len, lay.anchors()))
    record(f"anchors/{anchors:,}", anchors=anchors, **spread(times))


@pytest.mark.parametrize("count", [10_000, 100_000, 1_000_000, 10_000_000])
def test_number_of_boxes(benchmark: Any, record: Any, device: str, count: int) -> None:
    found, all_boxes = matcher(layout(3), device), boxes(count, device=device)
    counts = torch.full((count // 10,), 10)
    times = repeat(lambda: count_levels(found, all_boxes.split(BLOCK), counts, 5), device, 1.0)
    benchmark.pedantic(lambda: count_levels(found, all_boxes.split(BLOCK), counts, 5), rounds=3)
    record(
        f"boxes/{count:,}",
        device,
        boxes=count,
        **spread(times),
        boxes_per_s=count / float(np.median(times)),
    )


MEMORY = """
import re, sys, torch
from pathlib import Path
from benchmarks.workload import boxes, layout
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
from alphafpn import estimate_alpha
count = int(sys.argv[1])
all_boxes = torch.cat([boxes(1_000_000)] * (count // 1_000_000))
images = list(all_boxes.split(10_000))
estimate_alpha(layout(3), images[:1])
# Forget the peak of making the inputs (Linux).
Path("/proc/self/clear_refs").write_text("5")
before = peak()
result = estimate_alpha(layout(3), all_boxes)
assert result.num_boxes == count
print(peak() - before)
"""


def test_memory_of_thirty_million_boxes(benchmark: Any, record: Any) -> None:
    """Peak beyond the inputs, in a process of its own."""
    count = 30_000_000
    seconds: list[float] = []

    def run() -> float:
        start = time.perf_counter()
        out = subprocess.run(
            [sys.executable, "-c", MEMORY, str(count)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        ).stdout
        seconds.append(time.perf_counter() - start)
        return float(out)

    extra = benchmark.pedantic(run, rounds=1)
    record("memory/30,000,000 boxes", boxes=count, extra_mib=extra, process_s=seconds[0])


@pytest.mark.parametrize("shapes", [3, 9])
def test_plain_tensors(benchmark: Any, record: Any, shapes: int) -> None:
    lay, all_boxes = layout(shapes), boxes()
    levels = lay.anchors()
    recognise = repeat(lambda: AnchorLayout.from_tensors(levels), "cpu", 0.5)
    pairs = interleave(
        lambda: estimate_alpha(lay, all_boxes), lambda: estimate_alpha(levels, all_boxes), seconds=4
    )
    benchmark.pedantic(lambda: estimate_alpha(levels, all_boxes), rounds=3)
    record(
        f"plain tensors/{shapes} shapes",
        recognise_s=float(np.median(recognise)),
        anchors=sum(len(level) for level in levels),
        **pairs.summary(),
    )


def test_irregular_anchors(benchmark: Any, record: Any, device: str) -> None:
    """Anchors in random order: blocked search against the whole matrix."""
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
    expected = estimate_alpha(layout(3), some)
    assert estimate_alpha(levels, some).counts == expected.counts
    record("irregular/217,413 anchors, 2,000 boxes", device, **pairs.summary())


IRREGULAR = """
import re, torch
from pathlib import Path
from alphafpn import estimate_alpha
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
torch.manual_seed(0)
corner = torch.rand(1_000_000, 2) * 4000
levels = [torch.cat([c, c + 8 + 60 * torch.rand(len(c), 2)], 1) for c in corner.split(250_000)]
corner = torch.rand(2000, 2) * 4000
boxes = torch.cat([corner, corner + 8 + 60 * torch.rand(2000, 2)], 1)
estimate_alpha([level[:1000] for level in levels], boxes[:10])
# Forget the peak of making the inputs (Linux).
Path("/proc/self/clear_refs").write_text("5")
before = peak()
estimate_alpha(levels, boxes)
print(peak() - before)
"""


def test_memory_of_a_million_irregular_anchors(benchmark: Any, record: Any) -> None:
    def run() -> float:
        return float(
            subprocess.run(
                [sys.executable, "-c", IRREGULAR],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "PYTHONPATH": os.getcwd()},
            ).stdout
        )

    extra = benchmark.pedantic(run, rounds=1)
    record("memory/1,000,000 irregular anchors, 2,000 boxes", extra_mib=extra)
