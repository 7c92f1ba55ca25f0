"""COCO data that the functions for tiny objects read: its forms, and mistakes in it."""

from __future__ import annotations

import copy
import functools
import json
import math

import numpy as np
import pytest

from alphafpn.tiny import box_sizes, cut_dataset, evaluate_tiny, merge_detections


def found(**changes):
    return {"image_id": 1, "category_id": 1, "bbox": [630, 5, 12, 10], "score": 0.5, **changes}


def people(*changes, **names):
    """A data set of two people, with changes to the first ones."""
    annotations = [
        {"id": 3, "image_id": 1, "category_id": 1, "bbox": [20, 5, 9, 9]},
        {"id": 5, "image_id": 1, "category_id": 1, "bbox": [630, 5, 12, 10]},
    ]
    for annotation, change in zip(annotations, changes, strict=False):
        annotation.update(change)
    images = [{"id": 1, "width": 700, "height": 50}]
    return {"images": images, "categories": [{"id": 1}], "annotations": annotations, **names}


TILES = cut_dataset(people())
every_data_set = pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda data: evaluate_tiny(data, [found()]), "ground_truth"),
        (cut_dataset, "dataset"),
        (lambda data: box_sizes(data).tolist(), "dataset"),
    ],
)
every_detections = pytest.mark.parametrize(
    "read",
    [functools.partial(evaluate_tiny, people()), lambda found: merge_detections(found, TILES)],
)


@every_data_set
def test_files_and_arrays_are_read_and_nothing_is_changed_or_printed(read, name, tmp_path, capfd):
    data, path = people(), tmp_path / "data.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(data).encode())
    expected = read(data)
    assert data == people()
    assert read(path) == read(str(path)) == expected
    for annotation in data["annotations"]:
        annotation["bbox"] = np.array(annotation["bbox"], np.float32)
    assert read(data) == expected
    assert capfd.readouterr() == ("", "")


@every_data_set
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_id": "1"}, "1 on no image of the file"),
        ({"bbox": [0, math.nan, 1, 1]}, "1 not four finite numbers"),
        ({"bbox": [0, 0, 1, -1]}, "1 negative size"),
    ],
)
def test_broken_annotations_are_left_out_with_a_warning(read, name, change, reason):
    data = people(change)
    with pytest.warns(UserWarning, match=f"^{name}: annotations left out: {reason}$"):
        results = read(data)
    assert results == read(people(annotations=data["annotations"][1:]))


@every_data_set
@pytest.mark.parametrize("data", [5, [], {"annotations": []}, {"images": []}])
def test_what_is_no_data_set_is_refused(read, name, data):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        read(data)
    with pytest.raises(TypeError, match=r"^COCO data: expected .* found a object"):
        read(people(info=object()))


@every_detections
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 999}, r": expected as image_id .* found 999"),
        ({"image_id": None}, r"\.image_id.*got `null`"),
        ({"score": math.nan}, r": expected as score a finite number, found nan"),
        ({"score": "0.5"}, r"\.score.*`float`.*`str`"),
        ({"bbox": [0, 0, 1, -2]}, r": expected as bbox .* found \[0, 0, 1, -2\]"),
        ({"bbox": [math.nan, 0, 1, 1]}, r": expected as bbox .* found .*nan"),
        ({"bbox": "box"}, r"\.bbox.*`array`.*`str`"),
    ],
)
def test_broken_detections_are_refused(read, change, message, tmp_path):
    detections, path = [found(), found(**change)], tmp_path / "found.json"
    before = copy.deepcopy(detections)
    with pytest.raises(ValueError, match=rf"^detections\[1\]{message}"):
        read(detections)
    assert str(detections) == str(before)
    path.write_text(json.dumps(detections))
    with pytest.raises(ValueError, match=rf"found\.json: detections\[1\]{message}"):
        read(path)
    del detections[1][next(iter(change))]
    with pytest.raises(ValueError, match=rf"^detections\[1\].*{next(iter(change))}"):
        read(detections)


@every_detections
@pytest.mark.parametrize("detections", [5, {}])
def test_what_is_no_list_of_detections_is_refused(read, detections):
    with pytest.raises(ValueError, match=r"^detections: Expected"):
        read(detections)
