from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from alphafpn.estimate.annotations import read_annotations
from tests.annotation_sets import (
    CONTENT,
    DATASETS,
    EXPECTED,
    ITERABLES,
    Detection,
    assert_equals,
    assert_same,
    coco_files,
    content_as_coco,
    pillow,
    reference,
    write,
)
from tests.malformed import annotation, coco
from tests.messages import pattern


@pytest.fixture
def coco_detection(tmp_path):
    """The content as a `CocoDetection` that cannot open an image."""
    return CocoDetection(tmp_path / "nowhere", str(write(tmp_path, content_as_coco())))


# Clipping


@pytest.mark.parametrize("edge", range(4))
@pytest.mark.parametrize(("by", "counted"), [(0, 0), (1, 0), (1.0625, 1)])
def test_more_than_a_pixel_beyond_the_image_is_counted(edge, by, counted):
    box = [0.0, 0.0, 10.0, 20.0]
    box[edge] += by * (-1, -1, 1, 1)[edge]
    found = read_annotations([((20, 10), [box])])
    assert found.num_clipped == counted
    assert found.boxes.tolist() == [[0, 0, 10, 20]]


def test_left_out_boxes_are_not_counted_as_clipped():
    boxes = [[3, 3, 3, 8], [11, 3, 15, 8], [2, 3, 4, 5], [-2, 3, -2, 9]]
    found = read_annotations([((20, 10), boxes)])
    assert found.left_out == {"zero size": 2, "outside the image": 1}
    assert found.boxes_per_image.tolist() == [1]
    assert found.num_clipped == 0


# Several files


@st.composite
def shards(draw):
    """Files whose ids may repeat, some of them empty, and the file that holds all of them."""
    parts = draw(st.lists(coco_files(), min_size=1, max_size=3))
    parts.insert(draw(st.integers(0, len(parts))), coco(images=[], annotations=[]))
    listed = sorted({category["id"] for part in parts for category in part["categories"]})
    merged = coco(images=[], annotations=[], categories=[{"id": n} for n in listed])
    for part in parts:
        new = {image["id"]: len(merged["images"]) + n for n, image in enumerate(part["images"])}
        merged["images"] += [{**image, "id": new[image["id"]]} for image in part["images"]]
        merged["annotations"] += [
            {**entry, "image_id": new[entry["image_id"]]} for entry in part["annotations"]
        ]
    return parts, merged


@settings(max_examples=100, deadline=None)
@given(files=shards(), category_ids=st.one_of(st.none(), st.sets(st.integers(1, 4))))
def test_equal_one_merged_file(files, category_ids, tmp_path_factory):
    parts, content = files
    directory = tmp_path_factory.getbasetemp()
    paths = [directory / f"{n}.json" for n in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        path.write_text(json.dumps(part))
    merged = write(directory, content)
    if sum(len(boxes) for _, boxes in reference(content, category_ids)) == 0:
        with pytest.raises(ValueError, match=rf"{re.escape(str(paths[0]))} and \d+ more: "):
            read_annotations(paths, category_ids=category_ids)
        return
    found = read_annotations(paths, category_ids=category_ids)
    expected = read_annotations(merged, category_ids=category_ids)
    assert_same(found, expected)
    places = [
        f"{path}: images[{n}]"
        for path, part in zip(paths, parts, strict=True)
        for n in range(len(part["images"]))
    ]
    assert [found.place(image) for image in range(len(places))] == places


def test_a_category_of_one_file_alone_is_known(tmp_path):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, category in zip(paths, (8, 9), strict=True):
        content = coco(annotations=[annotation(category_id=category)], categories=None)
        path.write_text(json.dumps(content))
    assert len(read_annotations(paths, category_ids=[9]).boxes) == 1
    with pytest.raises(ValueError, match=r"a\.json and 1 more: .* among 8, 9, found 1"):
        read_annotations(paths, category_ids=[1, 9])


def test_a_broken_file_is_named(tmp_path):
    good, bad = write(tmp_path, coco()), tmp_path / "bad.json"
    bad.write_bytes(b"{")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(bad))}: "):
        read_annotations([good, bad])


def test_a_list_of_paths_holds_nothing_else(tmp_path):
    path = write(tmp_path, coco())
    assert_same(read_annotations((str(path), path)), read_annotations([path, str(path)]))
    item = ((20, 10), torch.zeros(0, 4))
    with pytest.raises(TypeError, match=r"dataset\[1\]: expected a path like dataset\[0\]"):
        read_annotations([path, item])
    with pytest.raises(TypeError, match=r"dataset\[1\]: expected \(\(height, width\), boxes"):
        read_annotations([item, path])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        read_annotations([path, tmp_path / "nowhere.json"])


# CocoDetection


def test_subset_picks_and_repeats(coco_detection):
    found = read_annotations(Subset(coco_detection, [2, 0, 2]))
    assert found.image_sizes.tolist() == [[25, 25], [48, 64], [25, 25]]
    assert found.boxes_per_image.tolist() == [1, 2, 1]
    whole, first = [[0, 0, 25, 25]], EXPECTED.boxes[:2].tolist()
    assert found.boxes.tolist() == whole + first + whole
    assert found.left_out == {"zero size": 2, "outside the image": 2}


def test_own_ids(coco_detection):
    coco_detection.ids = [20]
    assert read_annotations(coco_detection).image_sizes.tolist() == [[25, 25]]
    coco_detection.ids = [20, 21]
    with pytest.raises(ValueError, match=r"CocoDetection: ids: .* 3 images, found 21"):
        read_annotations(coco_detection)


def test_errors_name_the_data_set_by_its_class(coco_detection):
    found = "CocoDetection: expected .* among 1 'person', 2 'boat', found 3"
    with pytest.raises(ValueError, match=found):
        read_annotations(coco_detection, category_ids=[1, 3])
    with pytest.raises(ValueError, match=r"Subset: .* none in 0 images"):
        read_annotations(Subset(coco_detection, []))


def test_broken_annotations(coco_detection):
    entries = coco_detection.coco.dataset["annotations"]
    entries[2]["bbox"] = [1, 2, 3]
    entries[3]["image_id"] = 5
    left_out = read_annotations(coco_detection).left_out
    assert left_out == {"not four finite numbers": 1, "on no image of the file": 1}
    # An annotation on no image is not the subset's.
    assert read_annotations(Subset(coco_detection, [0])).left_out == {}


# The same content in any form


COCO_DETECTIONS = {
    "CocoDetection": lambda dataset: dataset,
    "wrapped": wrap_dataset_for_transforms_v2,
    "subset": lambda dataset: Subset(dataset, range(3)),
    "subset of a subset": lambda dataset: Subset(
        Subset(dataset, [2, 0, 1]), torch.tensor([1, 2, 0])
    ),
    "subset of wrapped": lambda dataset: Subset(
        wrap_dataset_for_transforms_v2(dataset), np.arange(3)
    ),
}


def test_a_file_is_read_as_expected(tmp_path):
    assert_same(read_annotations(write(tmp_path, content_as_coco())), EXPECTED)


@pytest.mark.parametrize(
    "make", [*ITERABLES.values(), *DATASETS.values()], ids=[*ITERABLES, *DATASETS]
)
def test_items_equal_the_file(make):
    assert_same(read_annotations(make()), EXPECTED)


@pytest.mark.parametrize("kind", COCO_DETECTIONS)
def test_coco_detections_equal_the_file_without_images(coco_detection, kind):
    assert_same(read_annotations(COCO_DETECTIONS[kind](coco_detection)), EXPECTED)


def test_categories(tmp_path, coco_detection):
    path = write(tmp_path, content_as_coco())
    expected = read_annotations(path, category_ids=[2])
    assert expected.left_out == {"other categories": 1} | EXPECTED.left_out
    assert expected.boxes_per_image.tolist() == [1, 0, 1]
    for dataset in (DATASETS["PIL"](), DATASETS["XYWH"](), coco_detection):
        assert_same(read_annotations(dataset, category_ids=[2]), expected)


@settings(max_examples=100, deadline=None)
@given(content=coco_files())
def test_any_content(content):
    items = reference(content)
    if sum(len(boxes) for _, boxes in items) == 0:
        return
    found = read_annotations(items)
    assert_equals(found, items)
    assert found.left_out == {}


def test_inputs_stay_as_they_were():
    boxes = torch.tensor([[-5.0, -5, 100, 100]])
    read_annotations([((20, 10), boxes)])
    read_annotations([((20, 10), boxes.numpy())])
    assert boxes.tolist() == [[-5, -5, 100, 100]]


@pytest.mark.parametrize(
    "name",
    [
        "citypersons_train_boxes.json",
        "tinyperson_native_boxes.json",
        "tinyperson640/train.json",
        "tinyperson640/val.json",
    ],
)
def test_real_data(name, data_file):
    path = data_file(name)
    content = json.loads(path.read_text())
    by_image = {image["id"]: [] for image in content["images"]}
    for entry in content["annotations"]:
        by_image[entry["image_id"]].append(entry)
    expected = [
        part
        for image in content["images"]
        for part in reference({"images": [image], "annotations": by_image[image["id"]]})
    ]
    found = read_annotations(path)
    assert_equals(found, expected)
    assert sum(found.left_out.values()) + len(found.boxes) == len(content["annotations"])


# Mistakes


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ({"boxes": []}, "dict"),
        (None, "NoneType None"),
        (3, "int 3"),
        (b"annotations.json", "bytes"),
        (torch.zeros(2, 4), r"Tensor of shape \(2, 4\)"),
        (np.zeros((2, 4)), r"ndarray of shape \(2, 4\)"),
        (DataLoader(Detection([])), r"DataLoader; give its `\.dataset`"),
        (Detection, "type"),
    ],
)
def test_anything_else_is_refused_by_name(dataset, name):
    with pytest.raises(TypeError, match=f"expected a path to a COCO JSON file.* found {name}"):
        read_annotations(dataset)


def target(boxes, **more):
    return pillow(10, 20), {"boxes": boxes, **more}


BOX = [[1.0, 2.0, 3.0, 4.0]]
IMAGE, TENSOR, SIZE = pillow(10, 20), torch.zeros(3, 9, 9), (10, 20)
ITEM = "expected ((height, width), boxes), ...; found"
NO_IMAGE = "expected a PIL image or a tensor, found"
SIDES = "expected (height, width), two whole numbers from 1 to 16777216, found"
TYPE_ERRORS = {
    f"{ITEM} tuple ((10, 20), [[1.0, 2.0, 3.0, 4.0]], 1)": (SIZE, BOX, 1),
    f"{ITEM} tuple ([[1.0, 2.0, 3.0, 4.0]],)": (BOX,),
    f"{ITEM} tuple (tensor": (TENSOR,) * 3,
    f"{ITEM} str 'ab'": "ab",
    f"{ITEM} Image first": (IMAGE, 3),
    f"{ITEM} Tensor of shape (3, 9, 9) and dtype torch.float32 first": (TENSOR, []),
    f"{ITEM} tuple (10.0, 20.0) first": ((10.0, 20.0), BOX),
    f"{ITEM} tuple (10, 20, 3) first": ((10, 20, 3), BOX),
    f"{ITEM} int 10 first": (10, BOX),
    f"{ITEM} NoneType None first": (None, BOX),
    f"{NO_IMAGE} NoneType None": {"boxes": BOX},
    f"{NO_IMAGE} ndarray of shape (3, 9, 9)": (TENSOR.numpy(), {"boxes": BOX}),
    f"{NO_IMAGE} SimpleNamespace": (SimpleNamespace(height=5), {"boxes": BOX}),
    f"{NO_IMAGE} Tensor of shape ()": (torch.tensor(1), {"boxes": BOX}),
    "expected boxes of floats or ints, found bool": (SIZE, torch.ones(1, 4) > 0),
    "expected boxes of floats or ints, found complex128": (SIZE, np.ones((1, 4), complex)),
    "expected boxes of floats or ints, found <U1": (SIZE, [["1", "2", "3", "4"]]),
    "expected boxes of floats or ints, found object": (SIZE, [[None, 1, 2, 3]]),
    "expected a tensor, ... or a regular list, found list": (SIZE, [[1, 2, 3], [1, 2, 3, 4]]),
}
VALUE_ERRORS = {
    "expected `boxes` in the target, found ['image', 'mask']": {"image": TENSOR, "mask": BOX},
    "... found ['annotation'] ...wrap_dataset_for_transforms_v2": (IMAGE, {"annotation": {}}),
    f"{SIDES} (0, 20)": ((0, 20), BOX),
    f"{SIDES} (10, -20)": ((10, -20), BOX),
    f"{SIDES} (10, 33554432)": ((10, 2**25), BOX),
    f"{SIDES} (0, 9)": (TENSOR[:, :0], {"boxes": BOX}),
    "... image's (height, width) (10, 20), found canvas_size (20, 10)": target(
        BoundingBoxes(BOX, format="XYXY", canvas_size=(20, 10))
    ),
    "boxes[0]: ... found [1.0, 2.0, nan, 4.0]": (SIZE, [[1, 2, math.nan, 4]]),
    "boxes[0]: ... found [1.0, 2.0, 3.0, inf]": (SIZE, [[1, 2, 3, math.inf]]),
    "boxes[0]: ... finite in float32 ... 1e+39": (SIZE, [[0, 0, 1e39, 1]]),
    "boxes[0]: ... finite in float32 ... inf": (SIZE, torch.tensor([[0, 0, 1e39, 1]]).double()),
    "boxes[1]: expected [x1, y1, x2, y2] ... x1 <= x2 and y1 <= y2, found [5.0, 2.0, 3.0, 4.0]": (
        (SIZE, [*BOX, [5, 2, 3, 4]])
    ),
    "boxes[0]: ... found [1, 4, 3, 2]": target(torch.tensor([[1, 4, 3, 2]])),
    "boxes[0]: ... found [5.0, 5.0, 4.0, 7.0]": target(
        BoundingBoxes([[5, 5, -1, 2]], format="XYWH", canvas_size=SIZE)
    ),
    "expected boxes of shape (n, 4), found (4,)": (SIZE, BOX[0]),
    "expected boxes of shape (n, 4), found (2, 5)": (SIZE, torch.zeros(2, 5)),
    "expected boxes of shape (n, 4), found (0, 5)": (SIZE, torch.zeros(0, 5)),
    "expected boxes of shape (n, 4), found (1, 0, 4)": (SIZE, torch.zeros(1, 0, 4)),
    "expected boxes of shape (n, 4), found (1, 2, 4)": (SIZE, torch.zeros(1, 2, 4)),
    "expected boxes of shape (n, 4), found ()": (SIZE, 5.0),
}
if hasattr(BoundingBoxFormat, "XYWHR"):  # torchvision >= 0.23
    rotated = BoundingBoxes([[1.0, 2, 3, 4, 5]], format="XYWHR", canvas_size=SIZE)
    VALUE_ERRORS["expected unrotated boxes, found XYWHR"] = target(rotated)


@pytest.mark.parametrize(
    ("error", "message", "item"),
    [(TypeError, *pair) for pair in TYPE_ERRORS.items()]
    + [(ValueError, *pair) for pair in VALUE_ERRORS.items()],
    ids=[*TYPE_ERRORS, *VALUE_ERRORS],
)
def test_a_bad_item_is_named_by_its_index(error, message, item):
    with pytest.raises(error, match=f"^{pattern(f'dataset[1]: {message}')}") as caught:
        read_annotations(Detection([CONTENT[0], item]))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_images_from_one_pixel_to_the_most_that_float32_can_tell():
    found = read_annotations([((1, 2**24), [[0, 0, 2**24, 1]]), ((2**24, 1), [])])
    assert found.image_sizes.tolist() == [[1, 2**24], [2**24, 1]]
    assert found.boxes.tolist() == [[0, 0, 2**24, 1]]


def test_stops_at_the_first_bad_item():
    def items():
        yield (10, 20), [[5, 2, 3, 4]]
        pytest.fail("went on after a bad item")

    with pytest.raises(ValueError, match=r"dataset\[0\]"):
        read_annotations(items())


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (CONTENT[0], "expected `labels` to choose category_ids by, found none"),
        (target(BOX), "expected `labels` to choose category_ids by, found none"),
        (target(BOX, labels=[1, 2]), "one integer label for each of 1 boxes, found ndarray of sh"),
        (target(BOX, labels=[1.0]), "one integer label for each of 1 boxes, found .* float64"),
    ],
)
def test_labels_that_are_refused(item, message):
    with pytest.raises(ValueError, match=rf"^dataset\[0\]: .*{message}"):
        read_annotations([item], category_ids=[1])


def test_unknown_label():
    with pytest.raises(ValueError, match="expected category_ids among 1, 2, found 3, 7"):
        read_annotations(DATASETS["PIL"](), category_ids=[7, 2, 3])


@pytest.mark.parametrize("items", [[], [((10, 20), [])], [((10, 20), [[1, 1, 1, 1]])]])
def test_no_boxes(items):
    with pytest.raises(ValueError, match=r"^dataset: expected .* found none"):
        read_annotations(items)


@pytest.mark.parametrize("progress", [True, False])
def test_progress_goes_to_stderr(capsys, progress):
    read_annotations(CONTENT, progress=progress)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("3/3" in captured.err) == progress


@pytest.mark.parametrize("dataset", [[], [((9, 9), [])], coco(annotations=[])])
def test_a_share_of_a_data_set_may_be_empty(dataset):
    found = read_annotations(dataset, category_ids=None, allow_empty=True)
    assert found.boxes.shape == (0, 4)
    assert len(found.boxes_per_image) == len(found.image_sizes)


def test_a_share_may_lack_a_category():
    found = read_annotations([target(BOX, labels=[1])], category_ids=[2], allow_empty=True)
    assert found.left_out == {"other categories": 1}
