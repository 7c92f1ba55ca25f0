"""Rebuilds the paper's S-alpha from real boxes, for the page of tables.

    ALPHAFPN_DATA=/data python -m benchmarks.paper.published

TinyPerson is cut into tiles as for the paper's training. Its boxes are matched to the anchors of
the paper's code: they are centred on their cells and rounded differently from torchvision's.
CityPersons is counted as it is and divided by four, which makes it Tiny CityPersons.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from alphafpn import AlphaEstimate, AnchorLayout, estimate_alpha
from alphafpn.tiny import cut_dataset
from benchmarks.markdown import write
from benchmarks.records import FOLDER

STRIDES = (4, 8, 16, 32, 64)
RETINANET = {
    "sizes": [[s * 2 ** (octave / 3) for octave in range(3)] for s in (8, 16, 32, 64, 128)],
    "ratios": (0.5, 1.0, 2.0),
}
FASTER_RCNN = {
    "sizes": [[8.31], [12.5], [18.55], [30.23], [60.41]],
    "ratios": (0.5, 1.3, 2.0),
}
# The paper's configurations, finest edge first.
PUBLISHED = {"Adaptive RetinaNet": (0.368, 0.387, 0.367), "Faster R-CNN": (0.48, 0.66, 1.06)}
ANCHORS: dict[str, dict[str, Any]] = {"Adaptive RetinaNet": RETINANET, "Faster R-CNN": FASTER_RCNN}
Item: TypeAlias = tuple[tuple[int, int], Tensor]
_EDGES = ("P3 -> P2", "P4 -> P3", "P5 -> P4")


def legacy_cells(stride: int, sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """Anchors [A, 4] (xyxy) of the cell at the origin, as maskrcnn-benchmark makes them.

    A shape is rounded where it fills the stride's window, then scaled to its size; its centre is
    the cell's.
    """
    shapes = []
    for ratio in ratios:
        width = np.round(np.sqrt(stride**2 / ratio))
        height = np.round(width * ratio)
        shapes += [(width * size / stride, height * size / stride) for size in sizes]
    half = torch.tensor(shapes, dtype=torch.float64) / 2
    return torch.cat([stride / 2 - half, stride / 2 + half], 1).float()


def legacy_layout(
    anchors: dict[str, Any], size: tuple[int, int], scale: int = 1, strides: int = 1
) -> AnchorLayout:
    """The anchors of an image of (height, width), `scale` times as large as the paper's."""
    # Enlarged anchors stay on the centres of the smaller cells.
    cells = [
        scale * legacy_cells(stride, sizes, anchors["ratios"]) - (scale - strides) * stride / 2
        for stride, sizes in zip(STRIDES, anchors["sizes"], strict=True)
    ]
    spacing = [strides * stride for stride in STRIDES]
    grids = [(max(1, size[0] // s), max(1, size[1] // s)) for s in spacing]
    return AnchorLayout(cells, spacing, grids, num_fused_levels=4)


def tiles_of(coco: dict[str, Any], *, dense: bool) -> list[Item]:
    """The boxes of each 640x512 tile, without those to ignore."""
    kept = {image["id"] for image in coco["images"] if dense or not image["dense"]}
    images = [image for image in coco["images"] if image["id"] in kept]
    marks = [m for m in coco["annotations"] if m["image_id"] in kept and not m["ignore"]]
    return items_of(cut_dataset({"images": images, "annotations": marks}, keep_empty=False))


def items_of(coco: dict[str, Any]) -> list[Item]:
    """(height, width) and boxes [n, 4] (xyxy) of each image; boxes of a pixel are dropped."""
    by_image: dict[int, list[list[float]]] = {image["id"]: [] for image in coco["images"]}
    for annotation in coco["annotations"]:
        x, y, w, h = annotation["bbox"]
        if w > 1 and h > 1 and not annotation.get("ignore"):
            by_image[annotation["image_id"]].append([x, y, x + w, y + h])
    return [
        ((image["height"], image["width"]), torch.tensor(by_image[image["id"]]).reshape(-1, 4))
        for image in coco["images"]
    ]


def count(items: list[Item], anchors: dict[str, Any], **how: int) -> AlphaEstimate:
    """The estimate over images of all sizes."""
    by_size: dict[tuple[int, int], list[Tensor]] = {}
    for size, boxes in items:
        by_size.setdefault(size, []).append(boxes)
    parts = (estimate_alpha(legacy_layout(anchors, s, **how), by_size[s]) for s in by_size)
    return functools.reduce(AlphaEstimate.merge, parts)


def tinyperson_rows(coco: dict[str, Any]) -> list[list[object]]:
    """The published factors, and ours."""
    tiles = {
        "ours, all images": tiles_of(coco, dense=True),
        "ours, without dense images": tiles_of(coco, dense=False),
    }
    rows: list[list[object]] = []
    for name, anchors in ANCHORS.items():
        rows.append([f"{name}, published", *(f"{value:g}" for value in PUBLISHED[name]), ""])
        for title, items in tiles.items():
            estimate = count(items, anchors)
            ratios = (f"{ratio:.3f}" for ratio in estimate.ratios)
            rows.append([f"{name}, {title}", *ratios, estimate.num_boxes])
    return rows


def citypersons_rows(coco: dict[str, Any]) -> list[list[object]]:
    """On which levels the boxes of CityPersons lie, as they are and divided by four."""
    full = items_of(coco)
    quarter = [((height // 4, width // 4), boxes / 4) for (height, width), boxes in full]
    cases: list[tuple[str, Any, dict[str, int]]] = [
        ("2048x1024, anchors 8-128", full, {}),
        ("2048x1024, anchors 32-512", full, {"scale": 4}),
        ("2048x1024, anchors 32-512, strides 16-256", full, {"scale": 4, "strides": 4}),
        ("512x256 (Tiny CityPersons), anchors 8-128", quarter, {}),
        ("512x256 (Tiny CityPersons), anchors 32-512", quarter, {"scale": 4}),
    ]
    rows: list[list[object]] = []
    for title, boxes, how in cases:
        estimate = count(boxes, RETINANET, **how)
        shares = [f"{100 * n / sum(estimate.counts):.1f} %" for n in estimate.counts]
        rows.append([title, *shares, *(f"{ratio:.2f}" for ratio in estimate.ratios)])
    return rows


def main() -> None:
    """Writes both tables into the folder of results."""
    data = Path(os.environ["ALPHAFPN_DATA"])
    tables = {
        "tinyperson": (
            ["", *_EDGES, "boxes"],
            tinyperson_rows(json.loads((data / "tinyperson_native_boxes.json").read_bytes())),
        ),
        "citypersons": (
            ["", *(f"P{level}" for level in range(2, 7)), *_EDGES],
            citypersons_rows(json.loads((data / "citypersons_train_boxes.json").read_bytes())),
        ),
    }
    for name, (header, rows) in tables.items():
        lines = ["\t".join(map(str, row)) for row in (header, *rows)]
        write(FOLDER / f"factors-{name}.tsv", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
