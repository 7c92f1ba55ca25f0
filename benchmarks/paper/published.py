"""Rebuild the paper's S-alpha from real boxes, and write docs/published-factors.md.

    python -m benchmarks.paper.published --tinyperson BOXES.json --citypersons BOXES.json

TinyPerson is cut into tiles as for the paper's training, and its boxes are matched to the anchors
of the paper's code, which are not torchvision's: they are centred on their cells and rounded
differently. CityPersons is counted as it is and divided by four, which makes it Tiny CityPersons.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alphafpn import AlphaEstimate, AnchorLayout, estimate_alpha
from alphafpn.tiny import cut_dataset

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
_PAGE_FILE = Path(__file__).resolve().parents[2] / "docs" / "published-factors.md"


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
    cells = [
        scale * legacy_cells(stride, sizes, anchors["ratios"])
        for stride, sizes in zip(STRIDES, anchors["sizes"], strict=True)
    ]
    if scale != strides:  # enlarged anchors stay on the centres of the smaller cells
        cells = [
            cell - (scale - strides) * stride / 2
            for cell, stride in zip(cells, STRIDES, strict=True)
        ]
    spacing = [strides * stride for stride in STRIDES]
    grids = [(max(1, size[0] // s), max(1, size[1] // s)) for s in spacing]
    return AnchorLayout(cells, spacing, grids, num_fused_levels=4)


def tiles_of(coco: dict[str, Any], *, dense: bool) -> dict[tuple[int, int], list[Tensor]]:
    """Boxes per 640x512 tile, by the tile's (height, width); without boxes to ignore."""
    kept = {image["id"] for image in coco["images"] if dense or not image["dense"]}
    chosen = {
        **coco,
        "images": [image for image in coco["images"] if image["id"] in kept],
        "annotations": [
            a for a in coco["annotations"] if a["image_id"] in kept and not a["ignore"]
        ],
    }
    return boxes_by_size(cut_dataset(chosen, keep_empty=False))


def boxes_by_size(coco: dict[str, Any]) -> dict[tuple[int, int], list[Tensor]]:
    """Boxes [n, 4] (xyxy) per image, by (height, width); sides of at most a pixel are dropped."""
    by_image: dict[int, list[list[float]]] = {image["id"]: [] for image in coco["images"]}
    for annotation in coco["annotations"]:
        x, y, w, h = annotation["bbox"]
        if w > 1 and h > 1 and not annotation.get("ignore"):
            by_image[annotation["image_id"]].append([x, y, x + w, y + h])
    found: dict[tuple[int, int], list[Tensor]] = {}
    for image in coco["images"]:
        boxes = torch.tensor(by_image[image["id"]]).reshape(-1, 4)
        found.setdefault((image["height"], image["width"]), []).append(boxes)
    return found


def count(
    boxes: dict[tuple[int, int], list[Tensor]], anchors: dict[str, Any], **how: int
) -> AlphaEstimate:
    """The estimate over images of all sizes."""
    parts = [
        estimate_alpha(legacy_layout(anchors, size, **how), images)
        for size, images in boxes.items()
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    return total


def divided(boxes: dict[tuple[int, int], list[Tensor]], by: int) -> dict[Any, list[Tensor]]:
    """The same images and boxes at a fraction of their size."""
    return {
        (size[0] // by, size[1] // by): [image / by for image in images]
        for size, images in boxes.items()
    }


def tinyperson_table(coco: dict[str, Any]) -> list[str]:
    """Published factors beside ours."""
    lines = ["| | P3 to P2 | P4 to P3 | P5 to P4 | boxes |", "|---|---|---|---|---|"]
    tiles = {
        "ours, all images": tiles_of(coco, dense=True),
        "ours, without dense images": tiles_of(coco, dense=False),
    }
    for name, anchors in ANCHORS.items():
        figures = " | ".join(f"{value:g}" for value in PUBLISHED[name])
        lines.append(f"| **{name}**, published | {figures} | |")
        for title, boxes in tiles.items():
            estimate = count(boxes, anchors)
            figures = " | ".join(f"{ratio:.3f}" for ratio in estimate.ratios)
            lines.append(f"| {title} | {figures} | {estimate.num_boxes} |")
    return lines


def citypersons_table(coco: dict[str, Any]) -> list[str]:
    """Which levels CityPersons' boxes belong to, as it is and divided by four."""
    full = boxes_by_size(coco)
    quarter = divided(full, 4)
    rows: list[tuple[str, Any, dict[str, int]]] = [
        ("2048x1024, anchors 8-128", full, {}),
        ("2048x1024, anchors 32-512", full, {"scale": 4}),
        ("2048x1024, anchors 32-512, strides 16-256", full, {"scale": 4, "strides": 4}),
        ("512x256 (Tiny CityPersons), anchors 8-128", quarter, {}),
        ("512x256 (Tiny CityPersons), anchors 32-512", quarter, {"scale": 4}),
    ]
    lines = [
        "| | P2 | P3 | P4 | P5 | P6 | P3 to P2 | P4 to P3 | P5 to P4 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for title, boxes, how in rows:
        estimate = count(boxes, RETINANET, **how)
        shares = [f"{100 * n / sum(estimate.counts):.1f} %" for n in estimate.counts]
        ratios = [f"{ratio:.2f}" for ratio in estimate.ratios]
        lines.append(f"| {' | '.join([title, *shares, *ratios])} |")
    return lines


def page(tinyperson: dict[str, Any], citypersons: dict[str, Any]) -> str:
    """The whole page."""
    return _PAGE.format(
        tinyperson="\n".join(tinyperson_table(tinyperson)),
        citypersons="\n".join(citypersons_table(citypersons)),
    )


_PAGE = """\
# The published factors, rebuilt

Does counting give the factors that the paper states? This page counts the paper's data sets anew;
`python -m benchmarks.paper.published` writes it.

## TinyPerson

The paper states its S-alpha for TinyPerson. These are the same ratios, `N[i+1] / N[i]`, counted
anew from the boxes of the train set: images cut into 640x512 tiles that overlap by 50 pixels, boxes
kept where at least 0.49 of their area is inside a tile and both sides are longer than a pixel, and
each given to the level of its one best anchor.

{tinyperson}

The counts are not expected to agree to the last digit: the sizes of some of the images are guesses,
and most of the flags of regions to ignore are not in the boxes that we had.

The anchors here are those of the paper's code. They are not torchvision's: an anchor is centred on
its cell, not on the cell's corner, and only the shape that fills the cell is rounded. For objects
of a few pixels this moves boxes from level to level. So these layouts serve to check the published
numbers; to train a detector, use `estimate_alpha_for`, which counts with its own anchors.

## CityPersons and Tiny CityPersons

Tiny CityPersons is CityPersons divided by four. What decides which level a box belongs to is its
size against the anchors' sizes, so the division by itself changes nothing for a detector whose
anchors are divided as well: compare the second row with the fourth. The third row is the same as
the fourth by construction, as everything is four times as large, the grid too; what is left between
the second and the fourth is the grid, which is four times as coarse for the small images, so that a
box finds its best anchor a little further away.

With the same anchors, on the other hand, the division moves the objects by two levels: compare the
first row with the fourth. Factors that were counted on CityPersons are then far from those of Tiny
CityPersons, though the pictures show the same.

{citypersons}

Boxes marked to be ignored are left out. The anchors are the RetinaNet's of the first table, where
32-512 stands for all of them four times as large.
"""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tinyperson", type=Path, required=True, help="COCO boxes, full images")
    parser.add_argument("--citypersons", type=Path, required=True, help="COCO boxes")
    parser.add_argument("--out", type=Path, default=_PAGE_FILE)
    options = parser.parse_args()
    data = [json.loads(path.read_bytes()) for path in (options.tinyperson, options.citypersons)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page(*data), encoding="utf-8")


if __name__ == "__main__":
    main()
