"""The main job from end to end: estimate, train without and with factors, evaluate, fold, compare.

Needs the extra ``demo``. Without images of your own it draws cluttered scenes.
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock
from tqdm import tqdm

from alphafpn.demo.scenes import (
    Tensors,
    as_coco,
    as_tensors,
    drawn_scenes,
    own_scenes,
    write,
    write_scenes,
)
from alphafpn.estimate.for_detector import estimate_alpha_for
from alphafpn.estimate.result.alpha_estimate import AlphaEstimate
from alphafpn.pyramid import Alpha
from alphafpn.surgery import fold_alpha

Detections: TypeAlias = list[dict[str, Tensor]]

BASELINE, ESTIMATED = "alpha = 1", "S-alpha"
MEASURE = "AP50_tiny"
NOTE = (
    "Whichever is ahead: a short training from scratch of a small detector, with two seeds, proves "
    "nothing about yours. It shows that all parts work together."
)

_MARKER = ".alphafpn-demo"
_SAME = 0.01  # of the same detection: largest difference in pixels, or in percent of score


@dataclass(frozen=True)
class Settings:
    """How much the demo does; by default, a few minutes' work for two cores.

    Attributes:
        side: Of the scenes, in pixels.
        train: Scenes to train on.
        val: Scenes to evaluate on.
        steps: Of the optimizer in each training.
        batch: Scenes per step.
        learning_rate: The highest, after a tenth of the steps.
        channels: Of the pyramid and the heads.
        seeds: For each, one training with each kind of factors.
    """

    side: int = 192
    train: int = 160
    val: int = 80
    steps: int = 300
    batch: int = 4
    learning_rate: float = 2e-3
    channels: int = 32
    seeds: tuple[int, ...] = (0, 1)


def run_demo(
    out: Path,
    images: Path | None = None,
    annotations: Path | None = None,
    *,
    settings: Settings = Settings(),
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
        settings: How much to do.

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
    if _evaluate(truth, [])[MEASURE] < 0:
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
        estimate = estimate_alpha_for(_detector(settings), train_file)
        factors: dict[str, Alpha] = {BASELINE: 1.0, ESTIMATED: estimate}
        for seed in settings.seeds:
            for name, alpha in factors.items():
                bar.set_description(f"seed {seed}, {name}")
                model, loss = _train(alpha, train, seed, settings, bar.update)
                found[name] = _detect(model, val)
                figures = _evaluate(truth, found[name])
                last = loss if math.isfinite(loss) else None
                results[name].append({"seed": seed, "last_loss": last, **figures})
        stock = _detector(settings).double().eval()
        # In float64, as rounding would decide about detections at a threshold.
        model, exact = model.double(), [(image.double(), boxes) for image, boxes in val]
        stock.load_state_dict(fold_alpha(copy.deepcopy(model)).state_dict())
        folding = _difference(_detect(model, exact), _detect(stock, exact))

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
    write(out / "demo.png", _picture(val, found, estimate, settings.seeds, per_seed))
    write(out / "outcome.json", json.dumps(outcome, allow_nan=False, indent=2).encode())
    return outcome


def _detector(settings: Settings, alpha: Alpha | None = None) -> Any:
    """A RetinaNet of P2-P6 on a residual network of ten layers."""
    from alphafpn.tiny.detectors import tiny_retinanet

    widths = (16, 32, 64, 96, 128)
    stem = nn.Conv2d(3, widths[0], 3, 2, 1, bias=False)
    stages = [nn.Sequential(stem, nn.BatchNorm2d(widths[0]), nn.ReLU())]
    for before, width in itertools.pairwise(widths):
        shortcut = nn.Sequential(nn.Conv2d(before, width, 1, 2, bias=False), nn.BatchNorm2d(width))
        stages.append(BasicBlock(before, width, 2, shortcut))
    body = nn.Sequential(OrderedDict((f"c{i}", stage) for i, stage in enumerate(stages, 1)))
    names = {f"c{i}": str(i) for i in range(2, 6)}
    backbone = BackboneWithFPN(body, names, list(widths[1:]), settings.channels)
    model = tiny_retinanet(backbone, alpha=alpha)
    for name, parameter in model.head.named_parameters():
        # RetinaNet's own start is made for 256 channels; with fewer, signals would die away.
        if ".conv." in name and parameter.dim() == 4:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    return model


def _train(
    alpha: Alpha,
    scenes: list[Tensors],
    seed: int,
    settings: Settings,
    step_done: Callable[[], object],
) -> tuple[nn.Module, float]:
    torch.manual_seed(seed)
    model = _detector(settings, alpha)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps + 1, pct_start=0.1
    )
    losses = []
    for images, targets in itertools.islice(_batches(scenes, seed, settings.batch), settings.steps):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        step_done()
    return model.eval(), float(np.mean(losses[-10:]))


def _batches(
    scenes: list[Tensors], seed: int, size: int
) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """Images and targets without end, mirrored at random; the same for the same seed."""
    rng = np.random.default_rng(seed)
    order: list[int] = []
    while True:
        while len(order) < size:
            order += rng.permutation(len(scenes)).tolist()
        batch, order = order[:size], order[size:]
        images, targets = [], []
        for index in batch:
            image, boxes = scenes[index]
            if rng.random() < 0.5:
                image = image.flip(-1)
                x1, y1, x2, y2 = boxes.T
                boxes = torch.stack([image.shape[-1] - x2, y1, image.shape[-1] - x1, y2], 1)
            images.append(image)
            targets.append({"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64)})
        yield images, targets


@torch.no_grad()
def _detect(model: nn.Module, scenes: list[Tensors]) -> Detections:
    batches = [scenes[i : i + 8] for i in range(0, len(scenes), 8)]
    return [found for batch in batches for found in model([image for image, _ in batch])]


def _evaluate(truth: dict[str, Any], found: Detections) -> dict[str, float]:
    from alphafpn.tiny.evaluation import evaluate_tiny

    results = [
        {"image_id": index, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
        for index, entry in enumerate(found)
        for (x1, y1, x2, y2), score in zip(
            entry["boxes"].tolist(), entry["scores"].tolist(), strict=True
        )
    ]
    figures = evaluate_tiny(truth, results)
    return {name: figures[name] for name in (MEASURE, "AP25_tiny", "AP50_all", "MR50_tiny")}


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


def _picture(
    scenes: list[Tensors],
    found: dict[str, Detections],
    estimate: AlphaEstimate,
    seeds: Sequence[int],
    per_seed: list[list[float]],
) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    from alphafpn.estimate.result.picture import plot_estimate

    figure = Figure(figsize=(11, 10), layout="constrained")
    FigureCanvasAgg(figure)
    above, (levels, results) = figure.subplots(2, 2)
    index = int(np.argsort([len(boxes) for _, boxes in scenes])[len(scenes) // 2])
    image, truth = scenes[index]
    for axes, (name, detections) in zip(above, found.items(), strict=True):
        axes.imshow(image.permute(1, 2, 0).numpy())
        confident = detections[index]["boxes"][detections[index]["scores"] > 0.3]
        for boxes, colour in ((truth, "#56b4e9"), (confident, "#ffa500")):
            for x1, y1, x2, y2 in boxes.tolist():
                outline = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour)
                axes.add_patch(outline)
        title = f"{name}, seed {seeds[-1]}: objects blue, detections above 0.3 orange"
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    plot_estimate(estimate, levels)
    levels.set_title("what S-alpha is estimated from", fontsize=10)
    for seed, pair in zip(seeds, zip(*per_seed, strict=True), strict=True):
        results.plot([0, 1], pair, marker="o", label=f"seed {seed}")
        for place, value in enumerate(pair):
            offset = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
            results.annotate(f"{value:.3f}", (place, value), fontsize=8, **offset)
    results.set_xticks([0, 1], [BASELINE, ESTIMATED])
    results.set_xlim(-0.4, 1.4)
    results.set_ylim(0, 1.15 * max(0.01, *itertools.chain(*per_seed)))
    results.set_ylabel(MEASURE)
    results.legend(loc="lower right")
    results.set_title("short trainings: no proof", fontsize=10)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()
