"""The demo's picture: a scene, objects per level, results."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence

import numpy as np

from alphafpn.demo.scenes import Tensors
from alphafpn.demo.training import MEASURE, Detections
from alphafpn.estimate import AlphaEstimate


def draw_picture(
    scenes: list[Tensors],
    found: dict[str, Detections],
    estimate: AlphaEstimate,
    seeds: Sequence[int],
    per_seed: list[list[float]],
) -> bytes:
    """Draws a PNG of a scene with detections, the objects per level, and the results."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

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
    estimate.plot(levels)
    levels.set_title("what S-alpha is estimated from", fontsize=10)
    for seed, pair in zip(seeds, zip(*per_seed, strict=True), strict=True):
        results.plot([0, 1], pair, marker="o", label=f"seed {seed}")
        for place, value in enumerate(pair):
            offset = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
            results.annotate(f"{value:.3f}", (place, value), fontsize=8, **offset)
    results.set_xticks([0, 1], list(found))
    results.set_xlim(-0.4, 1.4)
    results.set_ylim(0, 1.15 * max(0.01, *itertools.chain(*per_seed)))
    results.set_ylabel(MEASURE)
    results.legend(loc="lower right")
    results.set_title("short trainings: no proof", fontsize=10)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()
