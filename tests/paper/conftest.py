from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image


def write_dataset(folder, name, images=6, size=(120, 160), seed=0):
    """Bright rectangles on noise, with a region to ignore; the last image is dense."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(exist_ok=True)
    coco = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "thing"}]}
    for index in range(images):
        height, width = size
        pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
        for n in range(6):
            w, h = (int(v) for v in rng.integers(6, 20, 2))
            x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
            pixels[y : y + h, x : x + w] = rng.integers(180, 255, 3)
            annotation = {"id": len(coco["annotations"]) + 1, "image_id": index, "category_id": 7}
            annotation |= {"bbox": [x, y, w, h], "area": w * h, "ignore": n == 0, "iscrowd": 0}
            coco["annotations"].append(annotation)
        file = f"{name}{index}.png"
        Image.fromarray(pixels).save(folder / "images" / file)
        coco["images"].append({"id": index, "file_name": file, "height": height, "width": width})
    coco["images"][-1]["dense"] = True
    (folder / f"{name}.json").write_text(json.dumps(coco))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, "train")
    write_dataset(folder, "val", images=3, seed=1)
    return folder
