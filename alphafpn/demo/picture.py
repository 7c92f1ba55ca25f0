"""The demo's picture: scenes with detections, objects per level, results, and what they say."""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from alphafpn.demo.findings import Results
from alphafpn.demo.scenes import Scene
from alphafpn.demo.training import BASELINE, ESTIMATED, MEASURE, Detections
from alphafpn.estimate import AlphaEstimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OBJECTS, _FOUND = "#56b4e9", "#ffa500"
_CONFIDENT = 0.3
_WIDTH = 165  # of the text below, in characters


def draw_picture(
    scenes: Sequence[Scene],
    found: dict[str, Detections],
    estimate: AlphaEstimate,
    results: dict[str, Results],
    words: Sequence[str],
) -> bytes:
    """Draws a PNG.

    Args:
        scenes: To be judged on. One with objects and, where there is any, one without are shown.
        found: Detections in them by row, of `BASELINE` and `ESTIMATED`.
        estimate: Of the scenes to train on.
        results: What is drawn side by side, by title.
        words: Sentences below all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9.5), layout="constrained")
    FigureCanvasAgg(figure)
    lines = [line for sentence in words for line in textwrap.wrap(sentence, _WIDTH)]
    heights = (10, 10, 0.6 * len(lines))
    parts: Any = figure.subfigures(3, 1, height_ratios=heights)
    scene_part, result_part, text_part = parts
    places = list(itertools.product(_examples(scenes), (BASELINE, ESTIMATED)))
    above = scene_part.subplots(1, len(places))
    for axes, (index, row) in zip(above, places, strict=True):
        _draw_scene(axes, scenes[index], found[row][index])
        axes.set_title(f"{row}: {len(scenes[index].boxes)} objects", fontsize=10)
    scene_part.suptitle(
        f"scenes kept for evaluation: objects blue, detections above {_CONFIDENT:g} orange",
        fontsize=10,
    )
    levels, *others = result_part.subplots(
        1, 1 + len(results), width_ratios=[1.5, *(1 for _ in results)]
    )
    estimate.plot(levels)
    levels.set_title("what S-alpha is estimated from", fontsize=10)
    for axes, (title, part) in zip(others, results.items(), strict=True):
        _draw_results(axes, part)
        axes.set_title(title, fontsize=10)
    text_part.text(0.01, 0.98, "\n".join(lines), fontsize=9, va="top")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def _examples(scenes: Sequence[Scene]) -> list[int]:
    """A scene with about the median number of objects, and the first one without, if any."""
    counts = np.array([len(scene.boxes) for scene in scenes])
    order = np.argsort(counts, kind="stable")
    some = order[counts[order] > 0]
    return [int(some[len(some) // 2]), *np.flatnonzero(counts == 0)[:1].tolist()]


def _draw_scene(axes: Axes, scene: Scene, found: dict[str, Tensor]) -> None:
    from matplotlib.patches import Rectangle

    axes.imshow(scene.pixels.permute(1, 2, 0).numpy())
    confident = found["boxes"][found["scores"] > _CONFIDENT]
    for boxes, colour in ((scene.boxes, _OBJECTS), (confident, _FOUND)):
        for x1, y1, x2, y2 in boxes.tolist():
            outline = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour)
            axes.add_patch(outline)
    axes.set_axis_off()


def _draw_results(axes: Axes, results: Results) -> None:
    """A place for each row, a colour for each seed."""
    for runs in zip(*results.values(), strict=True):
        values = [100 * run[MEASURE] for run in runs]
        axes.plot(values, range(len(values)), "o", alpha=0.7, label=f"seed {runs[0]['seed']}")
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"{MEASURE}, points")
    axes.legend(fontsize=8, loc="lower left")
    axes.grid(alpha=0.3)
