"""From an annotation file of COCO's size to factors, each step in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.coco_like import ANNOTATIONS, IMAGES, write
from benchmarks.pairs import interleave

# The others take many times as long.
ROUNDS = {"estimate_alpha_for": 3, "alphafpn estimate": 3}

# Each prints the seconds of its work, without imports, and the peak memory of the process in MiB.
FRAME = """
import resource, sys, time
{imports}
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
start = time.perf_counter()
{work}
print(time.perf_counter() - start, peak(), before)
"""
PROGRAMS = {
    "json": ("import json", "json.load(open(sys.argv[1]))"),
    "pycocotools": (
        "from pycocotools.coco import COCO\nimport contextlib, io",
        "with contextlib.redirect_stdout(io.StringIO()): COCO(sys.argv[1])",
    ),
    "estimate_alpha_for": (
        "import torch, torchvision\nfrom alphafpn import estimate_alpha_for\n"
        "with torch.device('meta'):\n"
        "    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(\n"
        "        weights=None, weights_backbone=None)",
        "estimate_alpha_for(model, sys.argv[1])",
    ),
    "alphafpn estimate": (
        "import contextlib, io, torch, torchvision\nfrom alphafpn import cli",
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    cli.main(['estimate', sys.argv[1], '--detector', 'fasterrcnn_resnet50_fpn'])",
    ),
}


@pytest.fixture(scope="module")
def annotation_file() -> Path:
    """Kept between runs: writing it takes longer than most benchmarks."""
    path = Path(tempfile.gettempdir()) / "alphafpn-coco-like.json"
    if not path.exists():
        part = path.with_suffix(".part")
        with part.open("w") as file:
            write(file)
        part.replace(path)
    return path


def run(program: str, path: Path) -> tuple[float, float, float]:
    imports, work = PROGRAMS[program]
    out = subprocess.run(
        [sys.executable, "-c", FRAME.format(imports=imports, work=work), str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    ).stdout
    seconds, peak, before = map(float, out.split())
    return seconds, peak, before


def test_file_to_factors(benchmark: Any, record: Any, annotation_file: Path) -> None:
    size = annotation_file.stat().st_size / 2**20
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in PROGRAMS}
    for i in range(max(ROUNDS.values())):
        for name in PROGRAMS:
            if i < ROUNDS.get(name, 1):
                found[name].append(run(name, annotation_file))
    benchmark.pedantic(lambda: run("estimate_alpha_for", annotation_file), rounds=1)
    ours = float(np.median([s for s, *_ in found["estimate_alpha_for"]]))
    for name, rounds in found.items():
        seconds = float(np.median([s for s, *_ in rounds]))
        record(
            f"file/{name}",
            file_mib=size,
            images=IMAGES,
            annotations=ANNOTATIONS,
            rounds=len(rounds),
            median_s=seconds,
            ours_over_this=ours / seconds,
            peak_mib=max(peak for _, peak, _ in rounds),
            peak_over_file=max(peak - before for _, peak, before in rounds) / size,
        )


SMALL = {
    "images": [{"id": 1, "width": 640, "height": 480}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [9, 9, 20, 30]}],
    "categories": [{"id": 1, "name": "person"}],
}


def test_command_line(benchmark: Any, record: Any, tmp_path: Path) -> None:
    """What a process adds to importing torchvision, where there is next to nothing to count."""
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL))
    estimate = ["-m", "alphafpn", "estimate", str(path), "--detector", "fasterrcnn_resnet50_fpn"]
    baseline, candidate = (
        partial(subprocess.run, [sys.executable, *command], capture_output=True, check=True)
        for command in (["-c", "import torchvision"], estimate)
    )
    benchmark.pedantic(candidate, rounds=1)
    pairs = interleave(baseline, candidate, seconds=0, least=6, warm_up=0)
    record("command line/alphafpn estimate", **pairs.summary())
