"""Draws the pictures that explain: ``python -m benchmarks.pictures``."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from pathlib import Path

import matplotlib
import torch

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.patches import Rectangle
from torchvision.ops import box_iou

from alphafpn import AnchorLayout, estimate_alpha

DOCS = Path(__file__).parents[1] / "docs"
IMAGES = DOCS / "images"
COLOURS = ("#4c78a8", "#f58518")


def algorithm1(path: Path) -> None:
    """The example of "How it works": three boxes and their best anchors on two levels."""
    cell = torch.tensor([[-8.0, -8.0, 8.0, 8.0]])
    layout = AnchorLayout([cell, 2 * cell], [8, 16], [(8, 8), (4, 4)], 2)
    boxes = torch.tensor(
        [[8.0, 8.0, 20.0, 22.0], [36.0, 10.0, 50.0, 24.0], [18.0, 33.0, 46.0, 61.0]]
    )
    estimate = estimate_alpha(layout, boxes)
    figure, axes = pyplot.subplots(figsize=(6.4, 5.2), layout="constrained")
    for i, (part, colour) in enumerate(zip(layout.anchors(), COLOURS, strict=True)):
        centres = (part[:, :2] + part[:, 2:]) / 2
        axes.plot(
            *centres.t().tolist(),
            "o" if i else ".",
            color=colour,
            markersize=9 if i else 5,
            fillstyle="none" if i else "full",
            label=f"anchor centres, {'32' if i else '16'} px: N = {estimate.counts[i]}",
        )
    anchors = torch.cat(layout.anchors())
    level_of = [level for level, part in enumerate(layout.anchors()) for _ in part]
    ious, places = box_iou(boxes, anchors).max(1)
    for box, place, iou in zip(boxes, places.tolist(), ious.tolist(), strict=True):
        level, best = level_of[place], anchors[place]
        for (x1, y1, x2, y2), style in ((box.tolist(), "-"), (best.tolist(), "--")):
            colour = "black" if style == "-" else COLOURS[level]
            axes.add_patch(
                Rectangle(
                    (x1, y1), x2 - x1, y2 - y1, fill=False, linestyle=style, color=colour, lw=1.8
                )
            )
        plain = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        left, top = box[:2].tolist()
        axes.text(left + 1, top - 1.5, f"IoU {iou:.2f}", fontsize=9, bbox=plain)
    axes.set(xlim=(-12, 66), ylim=(68, -22), aspect="equal", xlabel="x (px)", ylabel="y (px)")
    axes.set_title(f"boxes (solid), their best anchors (dashed); $\\alpha$ = {estimate.alpha[0]}")
    axes.legend(loc="upper left", fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def worked_example(images: Path) -> None:
    """The pictures that the blocks of the worked example save."""
    page = (DOCS / "worked-example.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.chdir(folder):
            exec("\n".join(blocks), {})
        for picture in Path(folder).glob("worked-example-*"):
            shutil.copy(picture, images)


if __name__ == "__main__":
    IMAGES.mkdir(parents=True, exist_ok=True)
    algorithm1(IMAGES / "algorithm1.png")
    worked_example(IMAGES)
