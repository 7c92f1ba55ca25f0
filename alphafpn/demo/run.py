"""The main job from end to end: estimate, train with several factors, evaluate, fold, compare.

Needs the extra `demo`. Without images of your own it draws scenes.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from alphafpn.demo.detector import DRAWN_RATIOS, DRAWN_SIZES, Levels, detector
from alphafpn.demo.findings import NOTES, Results, differences, findings
from alphafpn.demo.own import own_scenes
from alphafpn.demo.picture import draw_picture
from alphafpn.demo.processes import side_by_side
from alphafpn.demo.scenes import SIDE, Family, Scene, as_coco, as_pngs, draw
from alphafpn.demo.training import (
    BASELINE,
    ESTIMATED,
    MEASURE,
    ROWS,
    Detections,
    Settings,
    Task,
    Trained,
    Training,
    as_images,
    detect,
    evaluate,
    start_of,
    train_and_evaluate,
)
from alphafpn.estimate import AlphaEstimate, estimate_alpha_for
from alphafpn.surgery import fold_alpha
from alphafpn.tiny.detectors import RETINANET_SIZES

RESULTS, NEAR = "results", "near"
_RATIOS = (0.2, 0.2, 0.2)  # of the drawn scenes
_TITLES = {RESULTS: "what decides is far away", NEAR: "what decides is near"}
_MARKER = ".alphafpn-demo"  # names the files that are the demo's
_STAGING = ".alphafpn-demo-partial-"
_SAME = 0.01  # of the same detection: largest difference in pixels, or in percent of score


def run_demo(
    out: Path,
    images: Path | None = None,
    annotations: Path | None = None,
    *,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Trains a small detector with `alpha = 1`, S-alpha and other factors, and compares them.

    The rows are `alpha = 1`, S-alpha, `alpha = 0.5`, `alpha = 0` (no top-down path), and `first
    function`: `alpha = 1`, started from the function that a detector with S-alpha has at its start.
    Trainings of a seed start from the same weights and see the same batches. The scenes are drawn,
    all rows on two families of the same images: in one, a landmark at least 64 pixels away decides
    whether figures are objects (`outcome["results"]`), in the other every figure of the kind is one
    (`outcome["near"]`).

    Images of your own are scaled, all alike and at most doubled, so that the median object is 10
    pixels large, and cut into scenes. A quarter of the images is held out. Regions that are
    `iscrowd`, `ignore` or `uncertain` are painted over for training, and neither right nor wrong in
    the evaluation. All categories are merged into one. There is no second family then.

    Written to `out`, when all is done: `data/` (scenes as PNG files, `train.json` and `val.json` in
    COCO format, of drawn scenes also `near_train.json` and `near_val.json`), `demo.png` (scenes,
    objects per level, results) and `outcome.json`. Calling it again replaces what an earlier demo
    wrote, and no other files; until then, and if it is interrupted, the earlier outcome stays.

    Trainings run in processes of their own: a script that calls this does so under
    `if __name__ == "__main__":`.

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
        RuntimeError: If the process of a training ends before it should.
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
    # The caller's random state stays as it is.
    with torch.random.fork_rng(devices=()):
        if images is not None and annotations is not None:
            scale, *parts = own_scenes(Path(images), Path(annotations), SIDE, counts)
            train, val = (list(part) for part in parts)
            made = {RESULTS: _task(train, val, RETINANET_SIZES, (0.5, 1.0, 2.0))}
            data = {
                "annotations": str(annotations),
                "scale": scale,
                "categories": "merged into one",
            }
        elif images is None and annotations is None:
            made = {name: _drawn(counts, far=name == RESULTS) for name in (RESULTS, NEAR)}
            data = {"annotations": "drawn by the demo"}
        else:
            expected = "expected both or none"
            raise ValueError(f"images is {images}, annotations is {annotations}: {expected}")
    tasks = {name: task for name, (task, _) in made.items()}
    estimates = {name: estimate for name, (_, estimate) in made.items()}
    task = tasks[RESULTS]
    # All that can be wrong with data is found before anything is written.
    if evaluate(task.truth, [])[MEASURE] < 0:
        raise ValueError(f"{annotations}: expected tiny objects in the held-out images, found none")
    _claim(out)

    plan = [Training(name, row, seed) for row in ROWS for name in tasks for seed in settings.seeds]
    done: dict[Training, Trained] = {}
    work = functools.partial(train_and_evaluate, tasks, settings)
    with tqdm(total=len(plan), unit="training", mininterval=1) as bar:
        for training, trained in side_by_side(work, plan, settings.processes):
            done[training] = trained
            bar.update()
    results: dict[str, Results] = {
        name: {
            row: [_entry(done[Training(name, row, s)], s) for s in settings.seeds] for row in ROWS
        }
        for name in tasks
    }
    last = {row: done[Training(RESULTS, row, settings.seeds[-1])] for row in (BASELINE, ESTIMATED)}

    prefixes = {name: "" if name == RESULTS else f"{name}_" for name in tasks}
    shown = ("alpha", "ratios", "confidence_interval", "counts", "level_names", "num_boxes")
    said = findings(results[RESULTS], results.get(NEAR), [task.s_alpha for task in tasks.values()])
    note = NOTES["drawn" if NEAR in tasks else "own"]
    outcome = {
        "data": {**data, "train_scenes": len(task.train), "val_scenes": len(task.val)},
        **{
            f"{prefix}estimate": {key: estimates[name].to_dict()[key] for key in shown}
            for name, prefix in prefixes.items()
        },
        **results,
        "differences": {
            "of": f"each row - {BASELINE}, in points of {MEASURE} by seed",
            **{
                name: {row: differences(part, row) for row in ROWS if row != BASELINE}
                for name, part in results.items()
            },
        },
        "folding": _folding(task, last[ESTIMATED]),
        "findings": said,
        "note": note,
        "seconds": round(time.monotonic() - start, 1),
        "cpu_seconds_of_training": round(sum(trained.cpu_seconds for trained in done.values()), 1),
    }
    files: dict[str, bytes] = {}
    for split in ("train", "val"):
        files |= as_pngs(f"data/{split}", getattr(task, split))
        for name, prefix in prefixes.items():
            scenes = getattr(tasks[name], split)
            files[f"data/{prefix}{split}.json"] = json.dumps(_coco(split, scenes)).encode()
    picture = draw_picture(
        task.val,
        {row: trained.found for row, trained in last.items()},
        estimates[RESULTS],
        {_TITLES[name] if NEAR in tasks else "your scenes": part for name, part in results.items()},
        [*said, note],
    )
    text = json.dumps(outcome, allow_nan=False, indent=2).encode()
    _write(out, files | {"demo.png": picture, "outcome.json": text})
    return outcome


def _drawn(counts: tuple[int, int], *, far: bool) -> tuple[Task, AlphaEstimate]:
    train, val = (draw(Family(_RATIOS, far), count, seed) for seed, count in enumerate(counts))
    return _task(train, val, DRAWN_SIZES, DRAWN_RATIOS)


def _task(
    train: list[Scene], val: list[Scene], sizes: Levels, ratios: tuple[float, ...]
) -> tuple[Task, AlphaEstimate]:
    items = [(scene.size, scene.boxes) for scene in train]
    estimate = estimate_alpha_for(detector(sizes, ratios), items)
    return Task(train, val, _coco("val", val), sizes, ratios, list(estimate)), estimate


def _coco(name: str, scenes: list[Scene]) -> dict[str, Any]:
    return as_coco(name, (scene.marked() for scene in scenes))


def _entry(trained: Trained, seed: int) -> dict[str, Any]:
    return {"seed": seed, "last_loss": trained.last_loss, **trained.figures}


def _folding(task: Task, trained: Trained) -> dict[str, Any]:
    """Compares a trained detector with the stock one that it folds into."""
    with torch.random.fork_rng(devices=()):
        model, stock = start_of(task, ESTIMATED), detector(task.sizes, task.ratios)
    model.load_state_dict(trained.weights)
    # In float64, as rounding would decide about detections at a threshold.
    model, stock = (part.double().eval() for part in (model, stock))
    exact = [image.double() for image in as_images(task.val)]
    found = detect(model, exact)
    stock.load_state_dict(fold_alpha(model).state_dict())
    return _difference(found, detect(stock, exact))


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
    (out / _MARKER).touch()


def _write(out: Path, files: dict[str, bytes]) -> None:
    """Puts files in place of an earlier demo's; what takes time comes before the first change."""
    for left in out.glob(f"{_STAGING}*"):
        shutil.rmtree(left)
    marker = out / _MARKER
    earlier = set(marker.read_text("utf-8").splitlines())
    with tempfile.TemporaryDirectory(prefix=_STAGING, dir=out) as staging:
        for name, content in files.items():
            (Path(staging) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(staging) / name).write_bytes(content)
        marker.write_text("\n".join(sorted(earlier | set(files))), "utf-8")
        for name in files:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(staging) / name, out / name)
    for name in earlier - set(files):
        (out / name).unlink(missing_ok=True)
    marker.write_text("\n".join(sorted(files)), "utf-8")
