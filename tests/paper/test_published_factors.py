"""The paper's anchors and factors, rebuilt."""

from __future__ import annotations

import functools
import json

import pytest
import torch

from benchmarks.paper import published


def sides(cells):
    return [(round(w, 3), round(h, 3)) for w, h in (cells[:, 2:] - cells[:, :2]).tolist()]


def test_anchors_are_those_of_the_paper_s_code():
    cells = [published.legacy_cells(s, [2 * s], (0.5, 1.0, 2.0)) for s in (4, 8, 16, 32, 64)]
    assert [sides(level) for level in cells] == [
        [(12, 6), (8, 8), (6, 12)],
        [(22, 12), (16, 16), (12, 24)],
        [(46, 24), (32, 32), (22, 44)],
        [(90, 44), (64, 64), (46, 92)],
        [(182, 92), (128, 128), (90, 180)],
    ]
    cells = published.legacy_cells(8, [12.5], (0.5, 1.3, 2.0))
    assert sides(cells) == [(17.188, 9.375), (10.938, 14.062), (9.375, 18.75)]
    assert torch.equal(cells[:, :2] + cells[:, 2:], torch.full((3, 2), 8.0))


def test_grids_are_the_tile_s():
    layout = published.legacy_layout(published.RETINANET, (512, 640))
    assert list(layout.grid_sizes) == [(128, 160), (64, 80), (32, 40), (16, 20), (8, 10)]


def test_larger_anchors_stay_on_the_centres_of_their_cells():
    small = published.legacy_layout(published.RETINANET, (256, 256)).anchors()
    large = published.legacy_layout(published.RETINANET, (256, 256), scale=4).anchors()
    for before, after in zip(small, large, strict=True):
        centres = before[:, :2] + before[:, 2:]
        assert torch.allclose(centres, after[:, :2] + after[:, 2:], atol=1e-3)


def test_images_and_anchors_enlarged_alike_give_the_same_counts():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(500, 2, generator=generator) * 200
    boxes = torch.cat([corner, corner + 2 + 40 * torch.rand(500, 2, generator=generator)], 1)
    images, enlarged = [((256, 256), boxes)], [((1024, 1024), 4 * boxes)]
    counts = [
        published.count(images, published.RETINANET).counts,
        published.count(enlarged, published.RETINANET, scale=4, strides=4).counts,
    ]
    assert counts[0] == counts[1]


def test_boxes_of_a_pixel_and_ignored_ones_do_not_count():
    coco = {
        "images": [{"id": 1, "height": 5, "width": 9, "dense": False}],
        "annotations": [
            {"id": n, "image_id": 1, "bbox": [0, 0, w, 3], "ignore": ignore}
            for n, (w, ignore) in enumerate([(1, False), (2, False), (4, True)])
        ],
    }
    ((size, boxes),) = published.tiles_of(coco, dense=True)
    assert size == (5, 9)
    assert boxes.tolist() == [[0, 0, 2, 3]]


@functools.cache
def tiles_of(path, dense):
    return published.tiles_of(json.loads(path.read_bytes()), dense=dense)


@pytest.mark.parametrize(
    ("detector", "dense", "expected"),
    [
        ("Adaptive RetinaNet", True, (0.345, 0.336, 0.332)),
        ("Adaptive RetinaNet", False, (0.414, 0.374, 0.356)),
        ("Faster R-CNN", True, (0.460, 0.657, 0.950)),
        ("Faster R-CNN", False, (0.530, 0.701, 1.056)),
    ],
)
def test_tinyperson_s_factors(data_file, detector, dense, expected):
    tiles = tiles_of(data_file("tinyperson_native_boxes.json"), dense)
    estimate = published.count(tiles, published.ANCHORS[detector])
    assert estimate.ratios == pytest.approx(expected, abs=0.001)
