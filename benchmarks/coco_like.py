"""Write a COCO-format annotation file of any size, by default that of COCO train 2017.

The file has what makes COCO slow to read: polygons of uneven length, a few crowds as run lengths,
image ids with gaps in no order, and annotations in no order of images. Equal arguments give equal
bytes. Annotations are made and written in blocks, so any number of them fits in memory.

    python -m benchmarks.coco_like OUT [--images N] [--annotations N]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TextIO

import numpy as np

IMAGES = 118_287
ANNOTATIONS = 860_001
_SIZES = np.array([[480, 640], [640, 480], [427, 640], [640, 427], [500, 375], [640, 640]])
_CATEGORY_IDS = [n for n in range(1, 91) if n not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
_BLOCK = 10_000
_CROWD_SHARE = 0.012
_MEAN_CORNERS = 23


def write(out: TextIO, images: int = IMAGES, annotations: int = ANNOTATIONS) -> None:
    """Write an annotation file of the given number of images and annotations to `out`."""
    rng = np.random.default_rng(0)
    ids = rng.permutation(5 * images)[:images]
    sizes = _SIZES[rng.integers(len(_SIZES), size=images)]
    out.write('{"info": {"description": "COCO-like"}, "licenses": [], "images": [')
    for index, (image_id, (height, width)) in enumerate(
        zip(ids.tolist(), sizes.tolist(), strict=True)
    ):
        name = f"{image_id:012d}.jpg"
        out.write(
            f'{", " if index else ""}{{"license": 3, "file_name": "{name}", '
            f'"coco_url": "http://images.example.org/train2017/{name}", '
            f'"height": {height}, "width": {width}, "date_captured": "2013-11-14 11:18:45", '
            f'"flickr_url": "http://farm9.example.org/8186/{image_id:010d}_z.jpg", '
            f'"id": {image_id}}}'
        )
    out.write('], "annotations": [')
    # Numbers are looked up, not formatted: that is most of the work.
    text = [str(n / 100) for n in range(100 * int(_SIZES.max()) + 1)]
    for start in range(0, annotations, _BLOCK):
        count = min(_BLOCK, annotations - start)
        _write_annotations(out, rng, start, count, ids, sizes, text)
    out.write('], "categories": ')
    categories = [{"id": n, "name": f"category {n}", "supercategory": "any"} for n in _CATEGORY_IDS]
    out.write(json.dumps(categories) + "}")


def _write_annotations(
    out: TextIO,
    rng: np.random.Generator,
    start: int,
    count: int,
    ids: np.ndarray,
    sizes: np.ndarray,
    text: list[str],
) -> None:
    image = rng.integers(len(ids), size=count)
    canvas = 100 * sizes[image, ::-1]
    # Log-uniform sides, from 2 pixels to the whole image; everything in hundredths of a pixel.
    side = np.exp(rng.uniform(np.log(200), np.log(canvas)))
    extent = np.clip(side.astype(np.int64), 200, canvas)
    corner = rng.integers(0, canvas - extent, endpoint=True)
    corners = 3 + rng.geometric(1 / (_MEAN_CORNERS - 3), size=count)
    first = np.concatenate([[0], np.cumsum(corners)])
    owner = np.repeat(np.arange(count), corners)
    points = corner[owner] + (rng.random((len(owner), 2)) * extent[owner]).astype(np.int64)
    crowd = rng.random(count) < _CROWD_SHARE
    category = rng.integers(len(_CATEGORY_IDS), size=count).tolist()
    flat = points.reshape(-1).tolist()
    bbox = np.concatenate([corner, extent], axis=1)
    area = extent.prod(axis=1) / 1e4
    for n in range(count):
        if crowd[n]:
            height, width = sizes[image[n]].tolist()
            runs = ", ".join(str(v % 640) for v in flat[2 * first[n] : 2 * first[n + 1]])
            segmentation = f'{{"counts": [{runs}], "size": [{height}, {width}]}}'
        else:
            numbers = map(text.__getitem__, flat[2 * first[n] : 2 * first[n + 1]])
            segmentation = f"[[{', '.join(numbers)}]]"
        out.write(
            f'{", " if start + n else ""}{{"segmentation": {segmentation}, '
            f'"area": {area[n]:.4f}, "iscrowd": {int(crowd[n])}, "image_id": {ids[image[n]]}, '
            f'"bbox": [{", ".join(map(text.__getitem__, bbox[n].tolist()))}], '
            f'"category_id": {_CATEGORY_IDS[category[n]]}, "id": {start + n + 1}}}'
        )


def main() -> None:
    """Write the file that the command line asks for."""
    parser = argparse.ArgumentParser(description="Write a COCO-like annotation file.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--annotations", type=int, default=ANNOTATIONS)
    arguments = parser.parse_args()
    with arguments.out.open("w", encoding="utf-8", newline="\n") as out:
        write(out, arguments.images, arguments.annotations)


if __name__ == "__main__":
    main()
