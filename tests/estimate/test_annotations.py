from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from alphafpn.estimate.annotations import Annotations, read_annotations
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


def clipped(*boxes: list[float], size: tuple[int, int] = (20, 10)) -> Annotations:
    return read_annotations([(size, list(boxes))], allow_empty=True)


@pytest.mark.parametrize("edge", range(4))
def test_more_than_a_pixel_beyond_the_image_is_counted(edge: int) -> None:
    outward = np.array([-1, -1, 1, 1])[edge]
    for by, counted in ((0, 0), (1, 0), (1.0625, 1)):
        box = [0.0, 0.0, 10.0, 20.0]
        box[edge] += outward * by
        found = clipped(box)
        assert found.num_clipped == counted
        assert found.boxes.tolist() == [[0, 0, 10, 20]]


def test_left_out_boxes_are_not_counted_as_clipped() -> None:
    found = clipped([3, 3, 3, 8], [11, 3, 15, 8], [2, 3, 4, 5], [-2, 3, -2, 9])
    assert found.left_out == {"zero size": 2, "outside the image": 1}
    assert found.boxes_per_image.tolist() == [1]
    assert found.num_clipped == 0


@st.composite
def shards(draw: st.DrawFn) -> tuple[list[dict[str, Any]], dict[str, Any]]:
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


class TestShards:
    @settings(max_examples=100, deadline=None)
    @given(files=shards(), category_ids=st.one_of(st.none(), st.sets(st.integers(1, 4))))
    def test_equal_one_merged_file(
        self,
        files: tuple[list[dict[str, Any]], dict[str, Any]],
        category_ids: set[int] | None,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> None:
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

    def test_a_category_of_one_file_alone_is_known(self, tmp_path: Path) -> None:
        paths = [tmp_path / "a.json", tmp_path / "b.json"]
        for path, category in zip(paths, (8, 9), strict=True):
            content = coco(annotations=[annotation(category_id=category)], categories=None)
            path.write_text(json.dumps(content))
        assert len(read_annotations(paths, category_ids=[9]).boxes) == 1
        with pytest.raises(ValueError, match=r"a\.json and 1 more: .* among 8, 9, found 1"):
            read_annotations(paths, category_ids=[1, 9])

    def test_a_broken_file_is_named(self, tmp_path: Path) -> None:
        good, bad = write(tmp_path, coco()), tmp_path / "bad.json"
        bad.write_bytes(b"{")
        with pytest.raises(ValueError, match=rf"^{re.escape(str(bad))}: "):
            read_annotations([good, bad])

    def test_what_is_left_out_adds_up(self, tmp_path: Path) -> None:
        broken = [annotation(), annotation(bbox=[]), annotation(bbox=[1, 2, 3, -4])]
        path = write(tmp_path, coco(annotations=broken))
        assert read_annotations([path] * 3).left_out == {"no box": 3, "negative size": 3}

    def test_a_list_of_paths_holds_nothing_else(self, tmp_path: Path) -> None:
        path = write(tmp_path, coco())
        assert_same(read_annotations((str(path), path)), read_annotations([path, str(path)]))
        item = ((20, 10), torch.zeros(0, 4))
        with pytest.raises(TypeError, match=r"dataset\[1\]: expected a path like dataset\[0\]"):
            read_annotations([path, item])
        with pytest.raises(TypeError, match=r"dataset\[1\]: expected \(\(height, width\), boxes"):
            read_annotations([item, path])
        with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
            read_annotations([path, tmp_path / "nowhere.json"])


class TestCocoDetection:
    def test_subset_picks_and_repeats(self, coco_detection: CocoDetection) -> None:
        found = read_annotations(Subset(coco_detection, [2, 0, 2]))
        assert found.image_sizes.tolist() == [[25, 25], [48, 64], [25, 25]]
        assert found.boxes_per_image.tolist() == [1, 2, 1]
        whole, first = [[0, 0, 25, 25]], EXPECTED.boxes[:2].tolist()
        assert found.boxes.tolist() == whole + first + whole
        assert found.left_out == {"zero size": 2, "outside the image": 2}

    def test_own_ids(self, coco_detection: CocoDetection) -> None:
        coco_detection.ids = [20]
        assert read_annotations(coco_detection).image_sizes.tolist() == [[25, 25]]
        coco_detection.ids = [20, 21]
        with pytest.raises(ValueError, match=r"CocoDetection: ids: .* 3 images, found 21"):
            read_annotations(coco_detection)

    def test_unknown_category(self, coco_detection: CocoDetection) -> None:
        with pytest.raises(
            ValueError, match=r"CocoDetection: expected .* among 1 'person', 2 'boat', found 3"
        ):
            read_annotations(coco_detection, category_ids=[1, 3])

    def test_nothing_picked(self, coco_detection: CocoDetection) -> None:
        with pytest.raises(ValueError, match=r"Subset: .* none in 0 images"):
            read_annotations(Subset(coco_detection, []))

    def test_broken_annotations(self, coco_detection: CocoDetection) -> None:
        entries = coco_detection.coco.dataset["annotations"]
        entries[2]["bbox"] = [1, 2, 3]
        entries[3]["image_id"] = 5
        left_out = read_annotations(coco_detection).left_out
        assert left_out == {
            "not four finite numbers": 1,
            "on no image of the file": 1,
        }
        # An annotation on no image is not the subset's.
        assert read_annotations(Subset(coco_detection, [0])).left_out == {}


COCO_DETECTIONS: dict[str, Callable[[CocoDetection], Any]] = {
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


class TestSameContentSameAnnotations:
    def test_file(self, tmp_path: Path) -> None:
        assert_same(read_annotations(write(tmp_path, content_as_coco())), EXPECTED)

    @pytest.mark.parametrize("kind", ITERABLES)
    def test_iterables(self, kind: str) -> None:
        assert_same(read_annotations(ITERABLES[kind]()), EXPECTED)

    @pytest.mark.parametrize("kind", DATASETS)
    def test_datasets(self, kind: str) -> None:
        assert_same(read_annotations(DATASETS[kind]()), EXPECTED)

    @pytest.mark.parametrize("kind", COCO_DETECTIONS)
    def test_coco_detections_without_images(self, coco_detection: CocoDetection, kind: str) -> None:
        assert_same(read_annotations(COCO_DETECTIONS[kind](coco_detection)), EXPECTED)

    def test_categories(self, tmp_path: Path, coco_detection: CocoDetection) -> None:
        path = write(tmp_path, content_as_coco())
        expected = read_annotations(path, category_ids=[2])
        assert expected.left_out == {"other categories": 1} | EXPECTED.left_out
        assert expected.boxes_per_image.tolist() == [1, 0, 1]
        for dataset in (DATASETS["PIL"](), DATASETS["XYWH"](), coco_detection):
            assert_same(read_annotations(dataset, category_ids=[2]), expected)

    @settings(max_examples=100, deadline=None)
    @given(content=coco_files())
    def test_any_content(self, content: dict[str, Any]) -> None:
        items = reference(content)
        if sum(len(boxes) for _, boxes in items) == 0:
            return
        found = read_annotations(items)
        assert_equals(found, items)
        assert found.left_out == {}

    def test_inputs_stay_as_they_were(self) -> None:
        boxes = torch.tensor([[-5.0, -5, 100, 100]])
        read_annotations([((20, 10), boxes)])
        read_annotations([((20, 10), boxes.numpy())])
        assert boxes.tolist() == [[-5, -5, 100, 100]]


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
def test_anything_else_is_refused_by_name(dataset: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"expected a path to a COCO JSON file.* found {name}"):
        read_annotations(dataset)


@pytest.mark.parametrize(
    "name",
    [
        "citypersons_train_boxes.json",
        "tinyperson_native_boxes.json",
        "tinyperson640/train.json",
        "tinyperson640/val.json",
    ],
)
def test_real_data(name: str, data_file: Callable[[str], Path]) -> None:
    path = data_file(name)
    content = json.loads(path.read_text())
    by_image: dict[int, list[Any]] = {image["id"]: [] for image in content["images"]}
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


def target(boxes: Any, **more: Any) -> tuple[Any, dict[str, Any]]:
    return pillow(10, 20), {"boxes": boxes, **more}


BOX = [[1.0, 2.0, 3.0, 4.0]]
IMAGE, TENSOR, SIZE = pillow(10, 20), torch.zeros(3, 9, 9), (10, 20)
NO_IMAGE = "PIL image or a tensor, found"
ITEM = r"expected \(\(height, width\), boxes"
BAD_ITEMS: dict[str, tuple[Any, type[Exception], str]] = {
    # Not an item
    "a size and more": ((SIZE, BOX, 1), TypeError, ITEM),
    "a single": ((BOX,), TypeError, "found tuple"),
    "three tensors": ((TENSOR,) * 3, TypeError, r"found tuple \(tensor"),
    "a string": ("ab", TypeError, "found str 'ab'"),
    "a dict without image": ({"boxes": BOX}, TypeError, f"{NO_IMAGE} None"),
    "a dict without boxes": (
        {"image": TENSOR, "mask": BOX},
        ValueError,
        r"expected `boxes` in the target, found \['image', 'mask'\]",
    ),
    "classification": ((IMAGE, 3), TypeError, "expected .* found Image first"),
    "boxes beside an image": ((IMAGE, BOX), TypeError, "found Image first"),
    "list of dicts": ((TENSOR, []), TypeError, "found Tensor of shape"),
    "no boxes key": (
        (IMAGE, {"annotation": {}}),
        ValueError,
        r"`boxes` in the target, found \['annotation'\].*wrap_dataset_for_transforms_v2",
    ),
    "no image": ((None, {"boxes": BOX}), TypeError, f"{NO_IMAGE} NoneType"),
    "an image array": (
        (TENSOR.numpy(), {"boxes": BOX}),
        TypeError,
        rf"{NO_IMAGE} ndarray of shape \(3, 9, 9\)",
    ),
    "half an image": (
        (SimpleNamespace(height=5), {"boxes": BOX}),
        TypeError,
        f"{NO_IMAGE} SimpleNamespace",
    ),
    "a scalar image": ((torch.tensor(1), {"boxes": BOX}), TypeError, "found Tensor of shape"),
    # Sizes
    "zero height": (((0, 20), BOX), ValueError, r"from 1 to 16777216, found \(0, 20\)"),
    "negative width": (((10, -20), BOX), ValueError, r"found \(10, -20\)"),
    "huge": (((10, 2**25), BOX), ValueError, r"found \(10, 33554432\)"),
    "float size": (((10.0, 20.0), BOX), TypeError, r"found tuple \(10\.0, 20\.0\) first"),
    "size of 3": (((10, 20, 3), BOX), TypeError, r"found tuple \(10, 20, 3\) first"),
    "size is a number": ((10, BOX), TypeError, "found int 10 first"),
    "size is None": ((None, BOX), TypeError, "found NoneType None first"),
    "swapped canvas": (
        (IMAGE, {"boxes": BoundingBoxes(BOX, format="XYXY", canvas_size=(20, 10))}),
        ValueError,
        r"image's \(height, width\) \(10, 20\), found canvas_size \(20, 10\)",
    ),
    "empty image": ((TENSOR[:, :0], {"boxes": BOX}), ValueError, r"found \(0, 9\)"),
    # Boxes
    "NaN": ((SIZE, [[1, 2, math.nan, 4]]), ValueError, r"boxes\[0\].* nan, 4"),
    "infinite": ((SIZE, [[1, 2, 3, math.inf]]), ValueError, r"boxes\[0\].* inf\]"),
    "beyond float32": ((SIZE, [[0, 0, 1e39, 1]]), ValueError, r"float32.*1e\+39"),
    "beyond float32, tensor": (
        (SIZE, torch.tensor([[0, 0, 1e39, 1]], dtype=torch.float64)),
        ValueError,
        r"boxes\[0\]: .* float32.* inf",
    ),
    "inverted x": (
        (SIZE, [*BOX, [5, 2, 3, 4]]),
        ValueError,
        r"boxes\[1\]: expected \[x1, y1, x2, y2\] .* found \[5\.0, 2\.0, 3\.0, 4\.0\]",
    ),
    "inverted y": (target(torch.tensor([[1, 4, 3, 2]])), ValueError, r"found \[1, 4, 3, 2\]"),
    "negative XYWH": (
        target(BoundingBoxes([[5, 5, -1, 2]], format="XYWH", canvas_size=SIZE)),
        ValueError,
        r"boxes\[0\].* found \[5\.0, 5\.0, 4\.0, 7\.0\]",
    ),
    "one box": ((SIZE, BOX[0]), ValueError, r"shape \(n, 4\), found \(4,\)"),
    "five columns": ((SIZE, torch.zeros(2, 5)), ValueError, r"found \(2, 5\)"),
    "empty, five columns": ((SIZE, torch.zeros(0, 5)), ValueError, r"found \(0, 5\)"),
    "empty, batched": ((SIZE, torch.zeros(1, 0, 4)), ValueError, r"\(1, 0, 4\)"),
    "batched": ((SIZE, torch.zeros(1, 2, 4)), ValueError, r"found \(1, 2, 4\)"),
    "scalar boxes": ((SIZE, 5.0), ValueError, r"shape \(n, 4\), found \(\)"),
    "bool": ((SIZE, torch.ones(1, 4) > 0), TypeError, "floats or ints, found bool"),
    "complex": ((SIZE, np.ones((1, 4), complex)), TypeError, "found complex128"),
    "strings": ((SIZE, [["1", "2", "3", "4"]]), TypeError, "floats or ints, found <U1"),
    "objects": ((SIZE, [[None, 1, 2, 3]]), TypeError, "floats or ints, found object"),
    "no boxes at all": ((SIZE, None), TypeError, "floats or ints, found object"),
    "ragged": ((SIZE, [[1, 2, 3], [1, 2, 3, 4]]), TypeError, "a regular list, found"),
}
if hasattr(BoundingBoxFormat, "XYWHR"):  # torchvision >= 0.23
    rotated = BoundingBoxes([[1.0, 2, 3, 4, 5]], format="XYWHR", canvas_size=SIZE)
    message = "expected unrotated boxes, found XYWHR"
    BAD_ITEMS["rotated"] = target(rotated), ValueError, message


def test_images_from_one_pixel_to_the_most_that_float32_can_tell() -> None:
    found = read_annotations([((1, 2**24), [[0, 0, 2**24, 1]]), ((2**24, 1), [])])
    assert found.image_sizes.tolist() == [[1, 2**24], [2**24, 1]]
    assert found.boxes.tolist() == [[0, 0, 2**24, 1]]


class TestBadItems:
    @pytest.mark.parametrize("name", BAD_ITEMS)
    @pytest.mark.parametrize("generator", [True, False])
    def test_named_by_index(self, name: str, generator: bool) -> None:
        item, error, message = BAD_ITEMS[name]
        items = [CONTENT[0], item]
        with pytest.raises(error, match=rf"^dataset\[1\]: .*{message}") as caught:
            read_annotations(iter(items) if generator else Detection(items))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500

    def test_stops_at_the_first_bad_item(self) -> None:
        def items() -> Iterator[Any]:
            yield (10, 20), [[5, 2, 3, 4]]
            pytest.fail("went on after a bad item")

        with pytest.raises(ValueError, match=r"dataset\[0\]"):
            read_annotations(items())

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ({}, "expected `labels` to choose category_ids by, found none"),
            ({"labels": [1, 2]}, r"one integer label for each of 1 boxes, found ndarray of shape"),
            ({"labels": [1.0]}, "one integer label for each of 1 boxes, found .* float64"),
        ],
    )
    def test_labels(self, more: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=rf"^dataset\[0\]: .*{message}"):
            read_annotations([target(BOX, **more)], category_ids=[1])

    def test_iterables_have_no_categories(self) -> None:
        with pytest.raises(ValueError, match=r"dataset\[0\]: expected `labels`"):
            read_annotations(CONTENT, category_ids=[1])

    def test_unknown_label(self) -> None:
        with pytest.raises(ValueError, match="expected category_ids among 1, 2, found 3, 7"):
            read_annotations(DATASETS["PIL"](), category_ids=[7, 2, 3])

    @pytest.mark.parametrize("items", [[], [((10, 20), [])], [((10, 20), [[1, 1, 1, 1]])]])
    def test_no_boxes(self, items: Any) -> None:
        with pytest.raises(ValueError, match=r"^dataset: expected .* found none"):
            read_annotations(items)


@pytest.mark.parametrize("progress", [True, False])
def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str], progress: bool) -> None:
    read_annotations(CONTENT, progress=progress)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("3/3" in captured.err) == progress


@pytest.mark.parametrize("dataset", [[], [((9, 9), [])], coco(annotations=[])])
def test_a_share_of_a_data_set_may_be_empty(dataset: Any) -> None:
    found = read_annotations(dataset, category_ids=None, allow_empty=True)
    assert found.boxes.shape == (0, 4)
    assert len(found.boxes_per_image) == len(found.image_sizes)


def test_a_share_may_lack_a_category() -> None:
    found = read_annotations([target(BOX, labels=[1])], category_ids=[2], allow_empty=True)
    assert found.left_out == {"other categories": 1}
