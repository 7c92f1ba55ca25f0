"""One run: a stock detector, adapted and given factors as its row says, trained and evaluated."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from alphafpn import (
    AnchorComparison,
    AnchorFit,
    LearnableAlpha,
    adapt_detector,
    compare_anchors,
    fold_alpha,
    patch_detector,
)
from alphafpn.demo.training import as_results, rows
from benchmarks.adapting.data import DataSet, load
from benchmarks.adapting.detectors import frozen_maps, keep_maps, keep_matches, stock
from benchmarks.adapting.rows import Row
from benchmarks.records import Record, environment
from benchmarks.training import adamw, figures, train

FIGURES = ("AP50_all", "AP50_tiny", "AP25_all", "AP75_all")
_PER_CLASS = ("cells4",)  # data sets whose classes differ in size
_AT_ONCE = 20  # images that are evaluated together


@functools.cache
def compared(data: str, kind: str) -> AnchorComparison:
    """The comparison of a data set's stock detector."""
    found = load(data)
    return compare_anchors(stock(kind, found.classes, found.train.size), found.items())


def fit_of(row: str, data: str, kind: str) -> AnchorFit:
    """The row of the comparison that a row of the experiment is."""
    comparison = compared(data, kind)
    if row.startswith(Row.ADAPTED):
        return comparison.best
    as_it_is, best_scale = comparison.rows[:2]
    if row == Row.LARGER:
        return next(fit for fit in comparison.rows if fit.input_scale == 2)
    return best_scale if row == Row.SCALE and kind != "fcos" else as_it_is


@functools.cache
def _maps(data: str, part: str, input_scale: float) -> Tensor:
    """What the frozen parts make of a data set's images; all runs share it."""
    found = load(data)
    height, width = found.train.size
    size = (round(height * input_scale), round(width * input_scale))
    model = stock("retinanet", found.classes, size)
    return frozen_maps(model, getattr(found, part).pixels)


@functools.cache
def _matches(data: str, anchors: Any) -> dict[int, Tensor]:
    """What `keep_matches` fills, for one data set and one set of anchors."""
    return {}


def run(config: Record) -> Record:
    """Trains and evaluates; returns the record, whose figures are None if training diverged."""
    began = time.monotonic()
    data = load(config["data"])
    model, fit, alpha = prepared(config, data)
    losses, diverged, trained = _train(model, data, config, fit.input_scale)
    found: Record = {"diverged": diverged, **dict.fromkeys(FIGURES)}
    if not diverged:
        results = as_results(detections(model, data, fit.input_scale))
        found |= figures(data.truth, results, FIGURES)
        if data.name in _PER_CLASS:
            found["AP50_all_per_class"] = _per_class(data, results)
    learnt = getattr(model.backbone.fpn, "alpha", None)
    return {
        "config": {
            **config,
            "finer_level": fit.finer_level,
            "anchor_scale": fit.anchor_scale,
            "input_scale": fit.input_scale,
        },
        **found,
        "alpha": alpha,
        "reached": round(fit.reached, 4),
        "cost": round(fit.cost, 3),
        "anchor_sizes": [[round(size, 2) for size in level] for level in fit.anchor_sizes],
        "alpha_after": learnt if learnt is None else [round(v, 3) for v in learnt.tolist()],
        "loss": losses,
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds_of_training": round(trained, 1),
        **environment(),
    }


def prepared(config: Record, data: DataSet) -> tuple[Any, AnchorFit, list[float] | None]:
    """The detector of a run before its first step, its row of the comparison, and its factors."""
    kind, row = config["detector"], config["row"]
    fit = fit_of(row, config["data"], kind)
    torch.manual_seed(config["seed"])
    model = stock(kind, data.classes, data.train.size)
    if "scale" in config:
        # Of FCOS, which has no scale to search: nothing is counted.
        adapt_detector(model, config["scale"])
        sizes = tuple(map(tuple, model.anchor_generator.sizes))
        fit = dataclasses.replace(
            fit, anchor_scale=config["scale"], anchor_sizes=sizes, reached=math.nan
        )
    elif not row.startswith(Row.STOCK):
        adapt_detector(model, fit)
    if fit.finer_level:
        start_finer_level(model)
    if config.get("roi") == "scaled":
        # Sends boxes to levels as it does at the anchors' own size.
        model.roi_heads.box_roi_pool.canonical_scale = round(224 * fit.anchor_scale)
    if "radius" in config:
        model.center_sampling_radius = config["radius"]
    alpha = None
    if row in (Row.ESTIMATED, Row.FIRST, Row.STOCK_ESTIMATED):
        # What `estimate_alpha_for` gives for the adapted detector.
        alpha = [round(factor, 4) for factor in fit.estimate]
    if row == Row.FIRST:
        fold_alpha(patch_detector(model, alpha))
    kinds = {
        **dict.fromkeys((Row.HALF, Row.STOCK_HALF), 0.5),
        **dict.fromkeys((Row.ESTIMATED, Row.STOCK_ESTIMATED), alpha),
        Row.NONE: 0.0,
        Row.LEARNABLE: LearnableAlpha(0.5),
        Row.FIRST: 1.0,
    }
    if row in kinds:
        patch_detector(model, kinds[row])
    return model.train(), fit, alpha


def start_finer_level(model: Any) -> None:
    """Draws the first weights of the finer level's blocks again, as torchvision does, in place."""
    fpn = model.backbone.fpn
    for convolution in (fpn.inner_blocks[0][0], fpn.layer_blocks[0][0]):
        nn.init.kaiming_uniform_(convolution.weight, a=1)
        nn.init.zeros_(convolution.bias)


def _train(
    model: Any, data: DataSet, config: Record, input_scale: float
) -> tuple[list[float], bool, float]:
    maps = _maps(data.name, "train", input_scale)
    kept = keep_maps(model)
    if config["detector"] == "retinanet":
        sizes = tuple(map(tuple, model.anchor_generator.sizes))
        keep_matches(model, _matches(data.name, (sizes, input_scale)))
    blank = torch.zeros(3, *data.train.size)

    def loss_of(batch: list[int]) -> Tensor:
        kept.maps = maps[batch]
        targets = [
            {"boxes": data.train.boxes[i], "labels": data.train.labels[i], "row": i} for i in batch
        ]
        losses = model([blank] * len(batch), targets)
        return torch.stack(list(losses.values())).sum()

    began = time.process_time()
    batches = rows(len(data.train.boxes) // 2, config["batch"], config["seed"])
    losses, diverged = train(loss_of, adamw(model, config["lr"]), batches, config["steps"])
    return losses, diverged, time.process_time() - began


@torch.no_grad()
def detections(model: Any, data: DataSet, input_scale: float) -> list[dict[str, Tensor]]:
    """What a detector without its frozen parts finds in the images to evaluate on."""
    model.eval()
    maps, found = _maps(data.name, "val", input_scale), []
    blank = torch.zeros(3, *data.val.size)
    for part in maps.split(_AT_ONCE):
        model.backbone.body["stem"].maps = part
        found += model([blank] * len(part))
    return found


def _per_class(data: DataSet, results: list[dict[str, Any]]) -> list[float | None]:
    values = []
    for label in range(1, data.classes + 1):
        truth = {
            **data.truth,
            "annotations": [m for m in data.truth["annotations"] if m["category_id"] == label],
            "categories": [c for c in data.truth["categories"] if c["id"] == label],
        }
        some = [result for result in results if result["category_id"] == label]
        values.append(figures(truth, some, ("AP50_all",))["AP50_all"])
    return values
