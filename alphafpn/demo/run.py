"""The main job from end to end: estimate, train without and with factors, evaluate, fold, compare.

Needs the extra ``demo``. Without images of your own it draws cluttered scenes.
"""

from __future__ import annotations

import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from alphafpn.demo.picture import draw_picture
from alphafpn.demo.scenes import as_coco, as_tensors, drawn_scenes, own_scenes, write, write_scenes
from alphafpn.demo.training import (
    MEASURE,
    Detections,
    Settings,
    detect,
    evaluate,
    small_detector,
    train_detector,
)
from alphafpn.estimate import estimate_alpha_for
from alphafpn.pyramid import Alpha
from alphafpn.surgery import fold_alpha

BASELINE, ESTIMATED = "alpha = 1", "S-alpha"
NOTE = (
    "Whichever is ahead: a short training from scratch of a small detector, with two seeds, proves "
    "nothing about yours. It shows that all parts work together."
)

_MARKER = ".alphafpn-demo"
_SAME = 0.01  # of the same detection: largest difference in pixels, or in percent of score


def run_demo(
    out: Path,
    images: Path | None = None,
    annotations: Path | None = None,
    *,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Trains a small detector with `alpha = 1` and with S-alpha, and compares the two.

    The trainings of a pair start from the same weights and see the same batches. Written to `out`,
    each file complete or not at all: `data/` (scenes as PNG files, `train.json` and `val.json` in
    COCO format), `demo.png` (a scene, objects per level, results) and last of all `outcome.json`.
    Calling it again, also after an interruption, replaces what an earlier demo wrote, and no other
    files.

    Images of your own are scaled, all alike and at most doubled, so that the median object is 10
    pixels large, and cut into scenes. A quarter of the images is held out. Regions that are
    `iscrowd`, `ignore` or `uncertain` are painted over for training, and neither right nor wrong in
    the evaluation. All categories are merged into one.

    Args:
        out: Folder to write to, made if need be.
        images: Folder with the images that `annotations` names.
        annotations: COCO-format JSON.
        settings: How much to do; by default what `Settings()` says.

    Returns:
        What `outcome.json` holds.

    Raises:
        FileExistsError: If there is a file of another origin where one would be written.
        FileNotFoundError: If the annotations, or an image that they name, are not there.
        ImportError: If the extra is not installed.
        ValueError: If only one of `images` and `annotations` is given, or a file is malformed or
            holds too little; the message names the file.
    """
    try:
        import matplotlib  # noqa: F401
        import PIL  # noqa: F401
    except ImportError as error:
        message = f'the demo needs {error.name}: pip install "alphafpn[demo]"'
        raise ImportError(message) from error
    settings = settings or Settings()
    start = time.monotonic()
    out = Path(out)
    counts = (settings.train, settings.val)
    if images is not None and annotations is not None:
        scale, *parts = own_scenes(Path(images), Path(annotations), settings.side, counts)
        data = {"annotations": str(annotations), "scale": scale, "categories": "merged into one"}
    elif images is None and annotations is None:
        parts = [drawn_scenes(count, settings.side, seed) for seed, count in enumerate(counts)]
        data = {"annotations": "drawn by the demo"}
    else:
        raise ValueError(f"images is {images}, annotations is {annotations}: expected both or none")
    # All that can be wrong with data is found before anything is written.
    splits = {name: list(part) for name, part in zip(("train", "val"), parts, strict=True)}
    train, val = (as_tensors(scenes) for scenes in splits.values())
    truth = as_coco("val", splits["val"])
    if evaluate(truth, [])[MEASURE] < 0:
        raise ValueError(f"{annotations}: expected tiny objects in the held-out images, found none")
    _claim(out)
    train_file, _ = (write_scenes(out / "data", name, scenes) for name, scenes in splits.items())

    results: dict[str, list[dict[str, Any]]] = {BASELINE: [], ESTIMATED: []}
    found: dict[str, Detections] = {}
    # The caller's random state stays as it is.
    with (
        torch.random.fork_rng(devices=()),
        tqdm(total=2 * len(settings.seeds) * settings.steps, unit="step", mininterval=1) as bar,
    ):
        estimate = estimate_alpha_for(small_detector(settings), train_file)
        factors: dict[str, Alpha] = {BASELINE: 1.0, ESTIMATED: estimate}
        for seed in settings.seeds:
            for name, alpha in factors.items():
                bar.set_description(f"seed {seed}, {name}")
                model, loss = train_detector(alpha, train, seed, settings, bar.update)
                found[name] = detect(model, val)
                figures = evaluate(truth, found[name])
                last = loss if math.isfinite(loss) else None
                results[name].append({"seed": seed, "last_loss": last, **figures})
        stock = small_detector(settings).double().eval()
        # In float64, as rounding would decide about detections at a threshold.
        model, exact = model.double(), [(image.double(), boxes) for image, boxes in val]
        stock.load_state_dict(fold_alpha(copy.deepcopy(model)).state_dict())
        folding = _difference(detect(model, exact), detect(stock, exact))

    per_seed = [[run[MEASURE] for run in results[name]] for name in (BASELINE, ESTIMATED)]
    differences = [with_it - without for without, with_it in zip(*per_seed, strict=True)]
    facts = estimate.to_dict()
    shown = ("alpha", "ratios", "confidence_interval", "counts", "level_names", "num_boxes")
    outcome = {
        "data": {**data, "train_scenes": len(train), "val_scenes": len(val)},
        "estimate": {name: facts[name] for name in shown},
        "results": results,
        f"{MEASURE}_difference": {
            "of": f"{ESTIMATED} - {BASELINE}",
            "per_seed": differences,
            "mean": float(np.mean(differences)),
        },
        "folding": folding,
        "note": NOTE,
        "seconds": round(time.monotonic() - start, 1),
    }
    write(out / "demo.png", draw_picture(val, found, estimate, settings.seeds, per_seed))
    write(out / "outcome.json", json.dumps(outcome, allow_nan=False, indent=2).encode())
    return outcome


def _difference(found: Detections, others: Detections) -> dict[str, float]:
    """How far detections are from their like in the same scene, and how many have none."""
    largest, alone = torch.zeros(2, dtype=torch.float64), 0
    for pair in zip(found, others, strict=True):
        a, b = (torch.cat([d["boxes"], 100 * d["scores"][:, None]], 1) for d in pair)
        gaps = (a[:, None] - b).abs()
        same = gaps.amax(2) < _SAME
        alone += int((~same.any(1)).sum() + (~same.any(0)).sum())
        near = gaps[same]
        if len(near):
            largest = largest.maximum(torch.stack([near[:, :4].max(), near[:, 4].max() / 100]))
    return {
        "same": alone == 0,
        "detections": sum(len(entry["boxes"]) for entry in found),
        "without_partner": alone,
        "largest_difference_in_pixels": float(largest[0]),
        "largest_difference_in_score": float(largest[1]),
    }


def _claim(out: Path) -> None:
    """Makes the folder the demo's, unless it holds something in the way."""
    if not (out / _MARKER).exists():
        for name in ("data", "demo.png", "outcome.json"):
            if (out / name).exists():
                raise FileExistsError(f"{out / name}: not written by the demo, expected none")
    out.mkdir(parents=True, exist_ok=True)
    write(out / _MARKER, b"")
    # An outcome never lies beside other data than its own.
    for name in ("outcome.json", "demo.png"):
        (out / name).unlink(missing_ok=True)
