"""A user's data, and a demo without processes."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from alphafpn.demo import run


@pytest.fixture
def own(tmp_path):
    """A user's data: six pictures in two folders, objects of about 40 pixels, two categories."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(6):
        name = f"{'ab'[i % 2]}/{i}.jpg"
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (400, 600, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / name)
        images.append({"id": 10 * i, "file_name": name, "width": 600, "height": 400})
        for x, y in rng.uniform(0, 350, (9, 2)).tolist():
            box = {"id": len(annotations) + 1, "image_id": 10 * i, "bbox": [x, y, 32, 50]}
            annotations.append(box | {"category_id": 1 + i % 2, "area": 1600, "iscrowd": 0})
    categories = [{"id": 1, "name": "boat"}, {"id": 2, "name": "bird"}]
    data = {"images": images, "annotations": annotations, "categories": categories}
    path = tmp_path / "own.json"
    path.write_text(json.dumps(data))
    return tmp_path / "images", path, data


@pytest.fixture
def quick(monkeypatch):
    """Spares the seconds that starting processes and drawing take."""
    monkeypatch.setattr(run, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(run, "draw_picture", lambda *args: b"picture")
