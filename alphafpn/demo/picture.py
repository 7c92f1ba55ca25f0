"""The demo's picture: detections as it is and adapted, boxes reached by size, results by row."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from alphafpn.comparison import AnchorComparison
from alphafpn.demo.scenes import Scene
from alphafpn.demo.training import CONFIDENT, MEASURE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results: TypeAlias = dict[str, list[dict[str, Any]]]  # a row's entries, one for each seed

_OBJECTS, _FOUND = "#56b4e9", "#ffa500"


def draw_picture(
    scene: Scene,
    found: dict[str, NDArray[np.float32]],
    comparison: AnchorComparison,
    results: dict[str, Results],
) -> bytes:
    """Draws a PNG: detections by row in a scene, boxes reached, results by family and row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=(5, 4))
    above, below = parts
    above.suptitle(f"objects blue, detections with a score above {CONFIDENT:g} orange")
    places = above.subplots(1, len(found))
    for axes, (row, boxes) in zip(places, found.items(), strict=True):
        _draw_scene(axes, scene, boxes)
        axes.set_title(f"{row}: {len(scene.boxes)} objects, {len(boxes)} detections", fontsize=10)
    reached, *others = below.subplots(1, 1 + len(results))
    comparison.plot(reached)
    for axes, (name, part) in zip(others, results.items(), strict=True):
        _draw_results(axes, part)
        title = "what decides is far away" if name == "far" else f"{MEASURE} by row"
        axes.set_title(title, fontsize=10)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def _draw_scene(axes: Axes, scene: Scene, found: NDArray[np.float32]) -> None:
    from matplotlib.patches import Rectangle

    axes.imshow(scene.pixels)
    for boxes, colour in ((scene.boxes, _OBJECTS), (found, _FOUND)):
        for x1, y1, x2, y2 in boxes.tolist():
            outline = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour)
            axes.add_patch(outline)
    axes.set_axis_off()


def _draw_results(axes: Axes, results: Results) -> None:
    """Draws a line for each row and a colour for each seed."""
    for runs in zip(*results.values(), strict=True):
        values = [100 * run[MEASURE] for run in runs]
        axes.plot(values, range(len(values)), "o", alpha=0.7, label=f"seed {runs[0]['seed']}")
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"{MEASURE} in percent")
    axes.legend(fontsize=8, loc="lower left")
    axes.grid(alpha=0.3)
