"""One data set at several sizes, and the factors that each of them counts.

    python -m benchmarks.paper.sizes TinyPerson=boxes.json ... [--sizes full 800 200 100 /4]

writes the table of factors into docs/paper-systems.md, between its marks. Boxes are enough for it:
no image is opened. `sweep sizes` trains at each size, on images that `derive` resizes.

A size is the length of the shorter side in pixels (COCO100 is `100`), what to divide both sides by
(Tiny CityPersons is CityPersons at `/4`), or `full`. Proportions are kept.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from alphafpn import estimate_alpha_for
from alphafpn.tiny import tiny_faster_rcnn, tiny_retinanet
from benchmarks.paper import results
from benchmarks.paper.config import digest, hash_of
from benchmarks.paper.data import PADDING
from benchmarks.paper.detectors import libra_rcnn, tiny_fcos
from benchmarks.paper.published import boxes_by_size

PAGE = Path(__file__).resolve().parents[2] / "docs" / "paper-systems.md"
SIZES = ("full", "800", "200", "100", "/4")
# Detectors that count alike share a column.
_COUNTED: dict[str, Any] = {
    "RetinaNet, FreeAnchor": tiny_retinanet,
    "Faster R-CNN": tiny_faster_rcnn,
    "Libra, Grid R-CNN": libra_rcnn,
    "FCOS": tiny_fcos,
}


def scaled_size(height: int, width: int, size: str) -> tuple[int, int]:
    """(height, width) of an image at a size.

    Raises:
        ValueError: If `size` is none of the three kinds.
    """
    try:
        number = 1.0 if size == "full" else float(size.removeprefix("/"))
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise ValueError(f"size: expected full, pixels or a divisor such as /4, found {size!r}")
    scale = 1 / number if size == "full" or size.startswith("/") else number / min(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def scaled(coco: dict[str, Any], size: str) -> dict[str, Any]:
    """Annotations of images that are resized to a size."""
    images, scales = [], {}
    for image in coco["images"]:
        height, width = scaled_size(image["height"], image["width"], size)
        scales[image["id"]] = width / image["width"], height / image["height"]
        images.append({**image, "height": height, "width": width})
    annotations = []
    for annotation in coco["annotations"]:
        across, down = scales[annotation["image_id"]]
        x, y, w, h = annotation["bbox"]
        bbox = [x * across, y * down, w * across, h * down]
        annotations.append({**annotation, "bbox": bbox, "area": bbox[2] * bbox[3]})
    return {**coco, "images": images, "annotations": annotations}


def derive(
    train_json: str, val_json: str, images: str, size: str, share: float, folder: Path
) -> dict[str, Any]:
    """Write the data sets at a size, unless they are there, and say where they are.

    Images keep their proportions and are padded, right and below, to the largest of them.

    Args:
        train_json: COCO annotations to train on.
        val_json: COCO annotations to judge on.
        images: Folder that file names start from.
        size: As above.
        share: Of the images to train on, how many are kept. Those of a smaller share are among
            those of a larger one.
        folder: Where to write.

    Returns:
        What a `Config` takes: `train_json`, `val_json`, `images` and `size`.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: expected above 0 and at most 1, found {share}")
    parts = {}
    for name, path in (("train", train_json), ("val", val_json)):
        coco = scaled(json.loads(Path(path).read_bytes()), size)
        parts[name] = {**coco, "images": [i for i in coco["images"] if not i.get("dense")]}
    every = [image for part in parts.values() for image in part["images"]]
    canvas = max(i["height"] for i in every), max(i["width"] for i in every)
    source = {"train": digest(train_json), "val": digest(val_json), "size": size}
    out = folder / f"size-{size.replace('/', 'by')}-{hash_of({**source, 'images': str(images)})}"
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"images": str(out), "size": canvas}
    for name, coco in parts.items():
        kept = coco["images"]
        if name == "train":
            order = np.random.default_rng(0).permutation(len(kept))
            kept = [kept[i] for i in sorted(order[: max(1, round(share * len(kept)))].tolist())]
        names = [_write_image(image, Path(images), out, canvas) for image in kept]
        known = {image["id"] for image in kept}
        whole = {"height": canvas[0], "width": canvas[1]}
        chosen = {
            **coco,
            "images": [i | whole | {"file_name": n} for i, n in zip(kept, names, strict=True)],
            "annotations": [a for a in coco["annotations"] if a["image_id"] in known],
        }
        path = out / (f"train-{share:g}.json" if name == "train" else "val.json")
        results.write(path, json.dumps(chosen).encode())
        found[f"{name}_json"] = str(path)
    return found


def _write_image(image: dict[str, Any], folder: Path, out: Path, canvas: tuple[int, int]) -> str:
    """Write a resized image, unless it is there; returns its name."""
    name = Path(image["file_name"]).with_suffix(".png").as_posix()
    path = out / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        padded = Image.new("RGB", canvas[::-1], (PADDING,) * 3)
        with Image.open(folder / image["file_name"]) as opened:
            size = image["width"], image["height"]
            padded.paste(opened.convert("RGB").resize(size, Image.Resampling.BILINEAR))
        content = io.BytesIO()
        padded.save(content, "PNG")
        results.write(path, content.getvalue())
    return name


def factors_table(data: dict[str, dict[str, Any]], sizes: Sequence[str] = SIZES) -> list[str]:
    """Ratios of Eq. 2, unclamped and finest edge first, by data set, size and detector.

    Boxes to be ignored, and those of at most a pixel at the size in question, do not count.
    """
    detectors: dict[str, nn.Module] = {
        name: builder("resnet18", weights_backbone=None) for name, builder in _COUNTED.items()
    }
    lines = [
        f"| data set | shorter side | boxes | median side | {' | '.join(detectors)} |",
        "|---" * (4 + len(detectors)) + "|",
    ]
    for name, coco in data.items():
        for size in sizes:
            grouped = boxes_by_size(scaled(coco, size))
            items = [(shape, boxes) for shape, group in grouped.items() for boxes in group]
            sides = np.concatenate(
                [(boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt().numpy() for _, boxes in items]
            )
            shorter = sorted(min(shape) for shape, _ in items)[len(items) // 2]
            title = f"{shorter}" if size[0] != "/" else f"{shorter} ({size})"
            cells = [name, title, f"{len(sides):,}", f"{np.median(sides):.1f}"]
            for detector in detectors.values():
                ratios = estimate_alpha_for(detector, items).ratios
                cells.append(" ".join("-" if math.isnan(r) else f"{r:.2f}" for r in ratios))
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Write the table into the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", nargs="+", metavar="NAME=FILE", help="COCO boxes")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES))
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    data = {}
    for entry in options.data:
        name, found, file = entry.partition("=")
        if not found:
            parser.error(f"expected NAME=FILE, found {entry!r}")
        data[name] = json.loads(Path(file).read_bytes())
    results.fill(options.out, "factors", factors_table(data, options.sizes))


if __name__ == "__main__":
    main()
