"""The main job from end to end: compare, adapt, train with several factors, evaluate.

Needs the extra `demo`. Without images of your own it draws scenes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from alphafpn.comparison import compare_anchors
from alphafpn.demo.detector import detector
from alphafpn.demo.own import own_scenes
from alphafpn.demo.picture import Results, draw_picture
from alphafpn.demo.scenes import FAR, SIDE, Scene, draw
from alphafpn.demo.training import (
    ADAPTED,
    MEASURE,
    ROWS,
    STOCK,
    Settings,
    Task,
    evaluate,
    run,
)
from alphafpn.display import table

_ABOUT_FAR = (
    f"far: the same images, but a disc at least {FAR} px away decides which tiny figures are "
    "objects. A small factor, or a first function that is like one, can cost points there: it "
    "weakens what the coarse levels tell the fine ones about the disc."
)
_NOTE = (
    "Two seeds do not rank rows that differ by less than 3 points. A small detector that is "
    "trained for a minute says little about another one."
)


def run_demo(
    out: Path,
    images: Path | None = None,
    annotations: Path | None = None,
    *,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Trains a small detector as it is, adapted, and with factors, and prints what each gives.

    The rows: `stock` (P3 to P6, anchors from 32 px); `adapted` (as the best row of
    `compare_anchors`); and the adapted detector with `alpha = 0.5`, `S-alpha`, `alpha = 0` and
    `first function` (factors of 1 and weights that at first give the outputs of `S-alpha`). In a
    second family of drawn scenes (`outcome["far"]`) a disc far away decides which figures are
    objects.

    Images of your own, in the folder `images` and in the COCO file `annotations`, are scaled, all
    by the same factor and at most doubled, so that the median object is 10 pixels large, and cut
    into scenes of 128 x 128. A quarter of the images is held out. All categories are merged into
    one. There is no second family.

    Writes `demo.png` and `outcome.json`, neither ever half-written, to `out`, and returns what the
    latter holds: `results[row]` has an entry per seed with `AP50_tiny` from 0 to 1. Trainings run
    in processes of their own, so a script calls this under `if __name__ == "__main__":`. Errors
    name the file.
    """
    try:
        import faster_coco_eval  # noqa: F401
        import matplotlib  # noqa: F401
        import PIL  # noqa: F401
    except ImportError as error:
        message = f'the demo needs {error.name}: pip install "alphafpn[demo]"'
        raise ImportError(message) from error
    settings = settings or Settings()
    began = time.monotonic()
    out, data, parts = Path(out), *_scenes(images, annotations, settings)
    train, val = parts["results"]
    if evaluate(val, [])[MEASURE] < 0:
        raise ValueError(f"{annotations}: expected tiny objects in the held-out images, found none")
    out.mkdir(parents=True, exist_ok=True)

    with torch.random.fork_rng(devices=()):  # the caller's random state stays as it is
        comparison = compare_anchors(
            detector(), [((SIDE, SIDE), torch.from_numpy(scene.boxes)) for scene in train]
        )
    findings = comparison.findings()
    print(f"{len(train)} scenes to train on, {len(val)} to evaluate on", *findings, sep="\n")
    print(f"\n{comparison}\n", flush=True)
    tasks = {name: Task(*part, comparison.best) for name, part in parts.items()}
    trained = _train(tasks, settings)
    results: dict[str, Results] = {
        name: {row: [trained[name, row, s][0] for s in settings.seeds] for row in ROWS[name]}
        for name in tasks
    }
    note = f"{_ABOUT_FAR} {_NOTE}" if "far" in parts else _NOTE
    outcome = {
        "data": {**data, "train_scenes": len(train), "val_scenes": len(val)},
        "comparison": comparison.to_list(),
        "findings": findings,
        **results,
        "note": note,
        "seconds": round(time.monotonic() - began, 1),
    }
    task = tasks["results"]
    found = {row: trained["results", row, settings.seeds[0]][1] for row in (STOCK, ADAPTED)}
    files = {
        "demo.png": draw_picture(task.val[task.shown], found, comparison, results),
        "outcome.json": json.dumps(outcome, allow_nan=False, indent=2).encode(),
    }
    with tempfile.TemporaryDirectory(prefix=".", dir=out) as staging:
        for name, content in files.items():
            (Path(staging) / name).write_bytes(content)
        for name in files:
            os.replace(Path(staging) / name, out / name)
    print(f"{_as_text(results)}\n\n{note}\nsee {out / 'demo.png'} and {out / 'outcome.json'}")
    return outcome


def _scenes(
    images: Path | None, annotations: Path | None, settings: Settings
) -> tuple[dict[str, Any], dict[str, tuple[list[Scene], list[Scene]]]]:
    """Says where the scenes come from; scenes to train on and to evaluate on, by family."""
    if (images is None) != (annotations is None):
        raise ValueError(
            f"images and annotations: expected both or none, found {images} and {annotations}"
        )
    if images is None or annotations is None:
        return {"annotations": "drawn by the demo"}, {
            name: (draw(settings.train, 0, far=far), draw(settings.val, 1, far=far))
            for name, far in (("results", False), ("far", True))
        }
    counts = settings.train, settings.val
    scale, train, val = own_scenes(Path(images), Path(annotations), counts)
    data = {"annotations": str(annotations), "scale": scale, "categories": "merged into one"}
    return data, {"results": (train, val)}


def _train(tasks: dict[str, Task], settings: Settings) -> dict[tuple[str, str, int], Any]:
    """Does all runs, in processes that end when this one does, however it does."""
    plan = [(name, row, seed) for seed in settings.seeds for name in tasks for row in ROWS[name]]
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    with (
        tqdm(total=len(plan), unit="training", mininterval=1) as bar,
        ProcessPoolExecutor(settings.processes, context, _start_process, (reader,)) as pool,
        writer,  # closed before the pool waits for its processes, so that these end at once
    ):
        futures = {
            (name, row, seed): pool.submit(run, tasks[name], row, seed, settings.steps)
            for name, row, seed in plan
        }
        for future in as_completed(futures.values()):
            future.result()
            bar.update()
    return {key: future.result() for key, future in futures.items()}


def _start_process(parent: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from the keyboard it reaches all processes
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Connection) -> None:
    parent.poll(None)  # until the other end is closed
    os._exit(0)


def _as_text(results: dict[str, Results]) -> str:
    """Shows a row for each kind of detector, and a column for each family and seed."""
    seeds = [entry["seed"] for entry in results["results"][STOCK]]
    header = (MEASURE, *(f"{'far, ' * (name == 'far')}seed {s}" for name in results for s in seeds))
    lines = []
    for row in ROWS["results"]:
        entries = [entry for part in results.values() for entry in part.get(row, [])]
        cells = [f"{100 * entry[MEASURE]:.1f} %" for entry in entries]
        lines.append((row, *cells, *[""] * (len(header) - 1 - len(cells))))
    return "\n".join(table(header, lines))
