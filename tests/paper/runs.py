"""Data and command lines for runs of seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def write_dataset(folder, name, images=6, size=(120, 160), seed=0):
    """Bright rectangles on noise, with a region to ignore and an object too large for tiny."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(exist_ok=True)
    coco = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "thing"}]}
    for index in range(images):
        height, width = size
        pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
        for n in range(6):
            w, h = (int(v) for v in rng.integers(6, 20, 2))
            x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
            pixels[y : y + h, x : x + w] = rng.integers(180, 255, 3)
            annotation = {"id": len(coco["annotations"]) + 1, "image_id": index, "category_id": 7}
            annotation |= {"bbox": [x, y, w, h], "area": w * h, "ignore": n == 0, "iscrowd": 0}
            coco["annotations"].append(annotation)
        file = f"{name}{index}.png"
        Image.fromarray(pixels).save(folder / "images" / file)
        coco["images"].append({"id": index, "file_name": file, "height": height, "width": width})
    coco["images"][-1]["dense"] = True
    (folder / f"{name}.json").write_text(json.dumps(coco))


def options(data, runs, **changes):
    """A command line for a run of seconds."""
    given = {
        "train-json": data / "train.json",
        "val-json": data / "val.json",
        "images": data / "images",
        "size": "128 192",
        "crop": 64,
        "batch": 2,
        "steps": 12,
        "warmup": 4,
        "lr": 0.01,
        "channels": 8,
        "backbone": "resnet18",
        "accelerator": "cpu",
        "runs": runs,
        "results": runs / "results.jsonl",
        "checkpoint-every": 3,
        **changes,
    }
    words = [(f"--{name}", *str(value).split()) for name, value in given.items()]
    return [word for pair in words for word in pair]


def start(module, arguments, **how):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", f"benchmarks.paper.{module}", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how,
    )  # fmt: skip
