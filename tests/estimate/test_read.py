from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2

from alphafpn.estimate.annotations import read_annotations
from tests.annotation_sets import (
    DATASETS,
    EXPECTED,
    ITERABLES,
    Detection,
    assert_equals,
    assert_same,
    coco_files,
    content_as_coco,
    reference,
    write,
)
from tests.malformed import MALFORMED, annotation, coco


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

    @pytest.mark.parametrize("name", [n for n in MALFORMED if n not in ("no boxes", "only crowds")])
    def test_messages_name_the_file(self, tmp_path: Path, name: str) -> None:
        good, bad = write(tmp_path, coco()), tmp_path / "bad.json"
        bad.write_bytes(MALFORMED[name].content)
        with pytest.raises(ValueError, match=MALFORMED[name].message) as caught:
            read_annotations([good, bad])
        assert str(caught.value).startswith(f"{bad}: ")

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
        (coco(), "dict"),
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
    with pytest.raises(TypeError, match=f"expected a path to a COCO-format JSON.* found {name}"):
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
