"""supervision: its data sets as input of the estimate."""

from __future__ import annotations

import numpy as np
import pytest

from alphafpn.estimate.s_alpha import estimate_alpha_for
from tests.detectors import make_detector, make_retinanet

sv = pytest.importorskip("supervision")
Image = pytest.importorskip("PIL.Image")


def make_dataset(folder):
    """Three images, one without boxes, and what their sizes and boxes are."""
    generator = np.random.default_rng(0)
    items, annotations = [], {}
    for i, (height, width) in enumerate([(64, 96), (120, 80), (64, 64)]):
        corner = generator.uniform(0, 30, (20 * (i != 1), 2))
        boxes = np.concatenate([corner, corner + generator.uniform(4, 34, corner.shape)], 1)
        path = str(folder / f"{i}.png")
        Image.new("RGB", (width, height)).save(path)
        annotations[path] = sv.Detections(boxes, class_id=np.zeros(len(boxes), dtype=int))
        items.append(((height, width), boxes))
    return sv.DetectionDataset(["person"], list(annotations), annotations), items


def test_datasets_are_read_through_pairs_of_size_and_boxes(tmp_path):
    dataset, items = make_dataset(tmp_path)
    model = make_detector(make_retinanet)
    expected = estimate_alpha_for(model, items)
    assert expected.num_boxes == 40
    assert expected.num_images == 3
    pairs = ((image.shape[:2], detections.xyxy) for _, image, detections in dataset)
    assert estimate_alpha_for(model, pairs) == expected


def test_sizes_can_come_from_the_files_heads(tmp_path):
    dataset, items = make_dataset(tmp_path)

    def pairs():
        for path in dataset.image_paths:
            with Image.open(path) as image:
                yield (image.height, image.width), dataset.annotations[path].xyxy

    model = make_detector(make_retinanet)
    assert estimate_alpha_for(model, pairs()) == estimate_alpha_for(model, items)


def test_a_dataset_given_as_it_is_is_refused(tmp_path):
    dataset, _ = make_dataset(tmp_path)
    with pytest.raises(TypeError, match=r"dataset\[0\]: expected \(\(height, width\), boxes\)"):
        estimate_alpha_for(make_detector(make_retinanet), dataset)
