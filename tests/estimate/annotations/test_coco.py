from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat
from torchvision.tv_tensors import Image as TVImage

from alphafpn.estimate.annotations.columns import Annotations
from alphafpn.estimate.annotations.read import read_annotations
from tests.malformed import MALFORMED, annotation, coco


def reference(
    content: dict[str, Any], category_ids: set[int] | None = None
) -> list[tuple[tuple[int, int], torch.Tensor]]:
    """What torchvision's references make of a COCO dict: (height, width) and boxes of each image.

    The tensor operations are those of `ConvertCocoPolysToMask` in references/detection.
    """
    result = []
    for image in content["images"]:
        kept = [
            entry["bbox"]
            for entry in content["annotations"]
            if entry["image_id"] == image["id"]
            and not entry.get("iscrowd", 0)
            and not entry.get("ignore", 0)
            and (category_ids is None or entry["category_id"] in category_ids)
        ]
        boxes = torch.as_tensor(kept, dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(min=0, max=image["width"])
        boxes[:, 1::2].clamp_(min=0, max=image["height"])
        keep = (boxes[:, 3] > boxes[:, 1]) & (boxes[:, 2] > boxes[:, 0])
        result.append(((image["height"], image["width"]), boxes[keep]))
    return result


def assert_equals(found: Annotations, expected: list[tuple[tuple[int, int], torch.Tensor]]) -> None:
    assert found.sizes.dtype == found.counts.dtype == np.int64
    assert found.boxes.dtype == np.float32
    assert found.sizes.tolist() == [list(size) for size, _ in expected]
    assert found.counts.tolist() == [len(boxes) for _, boxes in expected]
    assert np.array_equal(found.boxes, torch.cat([boxes for _, boxes in expected]).numpy())


def assert_same(found: Annotations, expected: Annotations) -> None:
    assert np.array_equal(found.sizes, expected.sizes)
    assert np.array_equal(found.boxes, expected.boxes)
    assert np.array_equal(found.counts, expected.counts)
    assert found.num_clipped == expected.num_clipped
    assert found.left_out == expected.left_out


def write(directory: Path, content: dict[str, Any]) -> Path:
    path = directory / "annotations.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


coordinates = st.one_of(
    st.floats(-50, 150, width=64), st.integers(-50, 150), st.floats(-1e38, 1e38), st.just(-0.0)
)
sides = st.one_of(st.floats(0, 200, width=64), st.integers(0, 200), st.sampled_from([0, 1e-9]))


@st.composite
def coco_files(draw: st.DrawFn) -> dict[str, Any]:
    ids = draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5, unique=True))
    side = st.integers(1, 120)
    images = [{"id": i, "width": draw(side), "height": draw(side)} for i in ids]
    flags = st.sampled_from([None, 0, 1, True, False])
    annotations = [
        annotation(
            id=draw(st.one_of(st.none(), st.integers(0, 3), st.text(max_size=3))),
            image_id=draw(st.sampled_from(ids)),
            category_id=draw(st.integers(1, 3)),
            bbox=[draw(coordinates), draw(coordinates), draw(sides), draw(sides)],
            iscrowd=draw(flags),
            ignore=draw(flags),
        )
        for _ in range(draw(st.integers(0, 12)))
    ]
    return coco(images=images, annotations=annotations, categories=[{"id": n} for n in range(1, 5)])


class TestCocoFile:
    @settings(max_examples=100, deadline=None)
    @given(content=coco_files(), category_ids=st.one_of(st.none(), st.sets(st.integers(1, 4))))
    def test_equals_torchvisions_references(
        self,
        content: dict[str, Any],
        category_ids: set[int] | None,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> None:
        path = write(tmp_path_factory.getbasetemp(), content)
        expected = reference(content, category_ids)
        total = sum(len(boxes) for _, boxes in expected)
        if total == 0:
            with pytest.raises(ValueError, match="expected boxes to count, found none"):
                read_annotations(path, category_ids=category_ids)
            return
        found = read_annotations(path, category_ids=category_ids)
        assert_equals(found, expected)
        assert sum(found.left_out.values()) == len(content["annotations"]) - total
        assert all(found.left_out.values())

    def test_reasons(self, tmp_path: Path) -> None:
        annotations = [
            annotation(),
            annotation(category_id=2, iscrowd=1),
            annotation(iscrowd=1, ignore=True),
            annotation(iscrowd=True),
            annotation(ignore=True, bbox=[0, 0, 0, 0]),
            annotation(bbox=[10, 10, 0, 5]),
            # In float32, 640 + 1e-6 is 640.
            annotation(bbox=[600, 10, 1e-6, 5]),
            annotation(bbox=[700, 10, 5, 0]),
            annotation(bbox=[640, 0, 5, 5]),
            annotation(bbox=[-5, -5, 5, 10]),
            annotation(bbox=[-5, -5, 10, 10]),
        ]
        path = write(tmp_path, coco(annotations=annotations))
        found = read_annotations(path, category_ids=[1])
        assert found.left_out == {
            "other categories": 1,
            "crowd": 2,
            "ignore": 1,
            "zero size": 3,
            "outside the image": 2,
        }
        assert found.boxes.tolist() == [[10, 20, 40, 60], [0, 0, 5, 5]]
        assert found.num_clipped == 1
        assert found.counts.tolist() == [2, 0]

    def test_order_is_of_images_then_of_annotations(self, tmp_path: Path) -> None:
        annotations = [annotation(image_id=(3, 7)[n % 2], bbox=[n, 0, 1, 1]) for n in range(40)]
        found = read_annotations(write(tmp_path, coco(annotations=annotations)))
        assert found.boxes[:, 0].tolist() == [*range(1, 40, 2), *range(0, 40, 2)]

    def test_only_needed_keys_matter(self, tmp_path: Path) -> None:
        minimal = {
            "annotations": [{"bbox": [1, 2, 3, 4], "category_id": 9, "image_id": 0}],
            "images": [{"height": 10, "id": 0, "width": 20}],
        }
        path = write(tmp_path, minimal)
        assert read_annotations(path).boxes.tolist() == [[1, 2, 4, 6]]
        assert read_annotations(path, category_ids=[9]).boxes.tolist() == [[1, 2, 4, 6]]
        unread = '"text": "caf\xe9", "segmentation": [[{"a": "1e999"}]], "category_id"'
        text = path.read_text().replace('"category_id"', unread)
        path.write_bytes(text.encode("latin-1"))
        assert read_annotations(path).boxes.tolist() == [[1, 2, 4, 6]]

    def test_repeated_annotation_ids_are_boxes_of_their_own(self, tmp_path: Path) -> None:
        boxes = [annotation(id=5), annotation(id=5, bbox=[1, 1, 1, 1])]
        assert read_annotations(write(tmp_path, coco(annotations=boxes))).counts.tolist() == [2, 0]

    @pytest.mark.parametrize("as_path", [str, Path])
    def test_paths(self, tmp_path: Path, as_path: Callable[[Path], Any]) -> None:
        path = write(tmp_path, coco())
        assert_equals(read_annotations(as_path(path)), reference(coco()))

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    def test_pipe(self, tmp_path: Path) -> None:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        writer = threading.Thread(target=pipe.write_text, args=(json.dumps(coco()),))
        writer.start()
        found = read_annotations(pipe)
        writer.join()
        assert_equals(found, reference(coco()))

    @pytest.mark.parametrize("enabled", [True, False])
    @pytest.mark.parametrize("valid", [True, False])
    def test_garbage_collector_is_left_as_it_was(
        self, tmp_path: Path, enabled: bool, valid: bool
    ) -> None:
        path = write(tmp_path, coco() if valid else {})
        try:
            if not enabled:
                gc.disable()
            try:
                read_annotations(path)
            except ValueError:
                assert not valid
            assert gc.isenabled() == enabled
        finally:
            gc.enable()

    @pytest.mark.parametrize("name", MALFORMED)
    def test_malformed(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / "annotations.json"
        path.write_bytes(MALFORMED[name].content)
        with pytest.raises(ValueError, match=MALFORMED[name].message) as caught:
            read_annotations(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        assert len(message) < 500

    def test_largest_numbers(self, tmp_path: Path) -> None:
        largest = {"id": 2**63 - 1, "width": 2**24, "height": 2**24}
        content = coco(images=[largest], annotations=[annotation(image_id=2**63 - 1)])
        assert read_annotations(write(tmp_path, content)).sizes.tolist() == [[2**24, 2**24]]
        for key, value in (("id", 2**63), ("width", 2**24 + 1), ("height", 2**24 + 1)):
            content["images"] = [{**largest, key: value}]
            with pytest.raises(ValueError, match=r"images\[0\]"):
                read_annotations(write(tmp_path, content))

    def test_no_such_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
            read_annotations(tmp_path / "nowhere.json")

    def test_directory(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match=re.escape(tmp_path.name)):
            read_annotations(tmp_path)

    def test_unknown_category(self, tmp_path: Path) -> None:
        path = write(tmp_path, coco(annotations=[annotation(category_id=5)]))
        with pytest.raises(ValueError, match=r"json: expected category_ids among 1, 2, 5, found 4"):
            read_annotations(path, category_ids=[1, 4])
        many = coco(categories=[{"id": n} for n in range(1200)])
        with pytest.raises(ValueError, match=r"98, 99, \.\.\. \(1200 in all\), found 9999"):
            read_annotations(write(tmp_path, many), category_ids=[9999])

    def test_category_without_boxes(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"none in 2 images \(left out: 2 other categories\)"):
            read_annotations(write(tmp_path, coco()), category_ids=[2])

    @pytest.mark.parametrize("category_ids", [1, "person", ["person"], [1.0]])
    def test_category_ids_of_a_wrong_type(self, tmp_path: Path, category_ids: Any) -> None:
        with pytest.raises(TypeError, match=r"category_ids: expected a collection of ints, found"):
            read_annotations(write(tmp_path, coco()), category_ids=category_ids)


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


class Detection(torch.utils.data.Dataset[Any]):
    """A map-style dataset as torchvision's tutorials write them: never raises an IndexError."""

    def __init__(self, items: list[tuple[Any, Any]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.items[index % len(self.items)]


# Sizes and boxes whose every form is exact in float32.
CONTENT: list[tuple[tuple[int, int], list[list[float]]]] = [
    ((48, 64), [[1.5, 2, 10.5, 20.25], [60, 40, 70, 50]]),
    ((30, 20), []),
    ((25, 25), [[4, 4, 4, 9], [30, 30, 40, 40], [0, 0, 25, 25]]),
]
EXPECTED = Annotations(
    sizes=np.array([[48, 64], [30, 20], [25, 25]]),
    boxes=np.array([[1.5, 2, 10.5, 20.25], [60, 40, 64, 48], [0, 0, 25, 25]], np.float32),
    counts=np.array([2, 0, 1]),
    num_clipped=1,
    left_out={"zero size": 1, "outside the image": 1},
)
LABELS = [[1, 2], [], [2, 2, 2]]


def content_as_coco() -> dict[str, Any]:
    return coco(
        images=[
            {"id": 10 * n, "file_name": "missing.jpg", "height": height, "width": width}
            for n, ((height, width), _) in enumerate(CONTENT)
        ],
        annotations=[
            annotation(
                id=100 * n + k,
                image_id=10 * n,
                category_id=LABELS[n][k],
                bbox=[x1, y1, x2 - x1, y2 - y1],
            )
            for n, (_, boxes) in enumerate(CONTENT)
            for k, (x1, y1, x2, y2) in enumerate(boxes)
        ],
    )


def as_format(boxes: list[list[float]], name: str) -> list[list[float]]:
    convert = {
        "XYXY": lambda x1, y1, x2, y2: [x1, y1, x2, y2],
        "XYWH": lambda x1, y1, x2, y2: [x1, y1, x2 - x1, y2 - y1],
        "CXCYWH": lambda x1, y1, x2, y2: [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1],
    }[name]
    return [convert(*box) for box in boxes]


def targets(make: Callable[[list[list[float]], tuple[int, int]], Any]) -> list[dict[str, Any]]:
    return [
        {"boxes": make(boxes, size), "labels": torch.tensor(labels, dtype=torch.int64)}
        for (size, boxes), labels in zip(CONTENT, LABELS, strict=True)
    ]


def images(make: Callable[[int, int], Any]) -> list[Any]:
    return [make(height, width) for (height, width), _ in CONTENT]


def pillow(height: int, width: int) -> Image.Image:
    return Image.new("RGB", (width, height))


def bounding_boxes(name: str) -> Callable[[list[list[float]], tuple[int, int]], BoundingBoxes]:
    return lambda boxes, size: BoundingBoxes(
        as_format(boxes, name), format=name, canvas_size=size, dtype=torch.float32
    )


def plain(boxes: list[list[float]], size: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(boxes).reshape(-1, 4)


def pairs(first: list[Any], second: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(first, second, strict=True))


SIZES = [size for size, _ in CONTENT]
ITERABLES: dict[str, Callable[[], Any]] = {
    "lists": lambda: CONTENT,
    "generator": lambda: (item for item in CONTENT),
    "tensors": lambda: [(torch.Size(size), plain(boxes, size)) for size, boxes in CONTENT],
    "float64": lambda: [(torch.tensor(s), plain(b, s).double()) for s, b in CONTENT],
    "bfloat16 and gradients": lambda: [
        (size, plain(boxes, size).bfloat16().requires_grad_()) for size, boxes in CONTENT
    ],
    "arrays": lambda: [(np.array(size), plain(boxes, size).numpy()) for size, boxes in CONTENT],
    "lists of lists": lambda: [[list(size), boxes] for size, boxes in CONTENT],
    "subset of a list": lambda: Subset(CONTENT, range(3)),  # type: ignore[arg-type]
    "empty without shape": lambda: [
        (size, torch.tensor(boxes) if boxes else torch.tensor([])) for size, boxes in CONTENT
    ],
}
DATASETS: dict[str, Callable[[], Any]] = {
    "PIL": lambda: Detection(pairs(images(pillow), targets(plain))),
    "tensor": lambda: Detection(pairs(images(lambda h, w: torch.zeros(3, h, w)), targets(plain))),
    "tv_tensor": lambda: Detection(
        pairs(images(lambda h, w: TVImage(torch.zeros(1, h, w))), targets(bounding_boxes("XYXY")))
    ),
    "XYWH": lambda: Detection(pairs(images(pillow), targets(bounding_boxes("XYWH")))),
    "CXCYWH": lambda: Detection(pairs(images(pillow), targets(bounding_boxes("CXCYWH")))),
    "size from canvas": lambda: Detection(pairs([None] * 3, targets(bounding_boxes("XYXY")))),
    "generator": lambda: (item for item in pairs(images(pillow), targets(plain))),
    "subset of a subset": lambda: Subset(
        Subset(Detection(pairs(images(pillow), targets(plain))), [2, 1, 0]), [2, 1, 0]
    ),
    "concatenated": lambda: ConcatDataset(
        [Detection([item]) for item in pairs(images(pillow), targets(plain))]
    ),
}


@pytest.fixture
def coco_detection(tmp_path: Path) -> CocoDetection:
    """The content as a `CocoDetection` that cannot open an image."""
    return CocoDetection(tmp_path / "nowhere", str(write(tmp_path, content_as_coco())))


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
        assert expected.counts.tolist() == [1, 0, 1]
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


class TestCocoDetection:
    def test_subset_picks_and_repeats(self, coco_detection: CocoDetection) -> None:
        found = read_annotations(Subset(coco_detection, [2, 0, 2]))
        assert found.sizes.tolist() == [[25, 25], [48, 64], [25, 25]]
        assert found.counts.tolist() == [1, 2, 1]
        whole, first = [[0, 0, 25, 25]], EXPECTED.boxes[:2].tolist()
        assert found.boxes.tolist() == whole + first + whole
        assert found.left_out == {"zero size": 2, "outside the image": 2}

    def test_own_ids(self, coco_detection: CocoDetection) -> None:
        coco_detection.ids = [20]
        assert read_annotations(coco_detection).sizes.tolist() == [[25, 25]]
        coco_detection.ids = [20, 21]
        with pytest.raises(ValueError, match=r"CocoDetection: ids: .* 3 images, found 21"):
            read_annotations(coco_detection)

    def test_nothing_picked(self, coco_detection: CocoDetection) -> None:
        with pytest.raises(ValueError, match=r"Subset: .* none in 0 images"):
            read_annotations(Subset(coco_detection, []))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"bbox": [1, 2, 3]}, r"CocoDetection: .*length 4.* `\$\.annotations\[2\]\.bbox`"),
            ({"bbox": [1, 2, float("nan"), 4]}, r"annotations\[2\] \(id 200\): .* nan"),
            ({"image_id": 5}, r"annotations\[2\] \(id 200\): .* found 5"),
        ],
    )
    def test_malformed(
        self, coco_detection: CocoDetection, change: dict[str, Any], message: str
    ) -> None:
        coco_detection.coco.dataset["annotations"][2].update(change)
        with pytest.raises(ValueError, match=message):
            read_annotations(coco_detection)


def second(item: Any) -> list[Any]:
    return [CONTENT[0], item]


def target(boxes: Any, **more: Any) -> tuple[Any, dict[str, Any]]:
    return pillow(10, 20), {"boxes": boxes, **more}


def rotated() -> tuple[Any, dict[str, Any]]:
    boxes = BoundingBoxes([[1.0, 2, 3, 4, 5]], format="XYWHR", canvas_size=(10, 20))
    return target(boxes)


BOX = [[1.0, 2.0, 3.0, 4.0]]
BAD_ITEMS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # Not an item
    "not a pair": (lambda: ((10, 20), BOX, 1), TypeError, r"expected \(\(height, width\), boxes\)"),
    "three tensors": (lambda: (torch.rand(3, 9, 9),) * 3, TypeError, r"found tuple \(tensor"),
    "a string": (lambda: "ab", TypeError, "found str 'ab'"),
    "a dict": (lambda: {"boxes": BOX}, TypeError, "found dict"),
    "classification": (lambda: (pillow(10, 20), 3), TypeError, "expected .* found Image first"),
    "boxes beside an image": (lambda: (pillow(10, 20), BOX), TypeError, "found Image first"),
    "list of dicts": (lambda: (torch.zeros(3, 9, 9), []), TypeError, "found Tensor of shape"),
    "no boxes key": (
        lambda: (pillow(10, 20), {"annotation": {}}),
        ValueError,
        r"expected `boxes` in the target, found \['annotation'\].*wrap_dataset_for_transforms_v2",
    ),
    "no image": (
        lambda: (None, {"boxes": BOX}),
        TypeError,
        "PIL image or a tensor, found NoneType",
    ),
    "an image array": (
        lambda: (np.zeros((10, 20, 3)), {"boxes": BOX}),
        TypeError,
        r"PIL image or a tensor, found ndarray of shape \(10, 20, 3\)",
    ),
    "a scalar image": (
        lambda: (torch.tensor(1), {"boxes": BOX}),
        TypeError,
        "found Tensor of shape",
    ),
    # Sizes
    "zero height": (lambda: ((0, 20), BOX), ValueError, r"from 1 to 16777216, found \(0, 20\)"),
    "negative width": (lambda: ((10, -20), BOX), ValueError, r"found \(10, -20\)"),
    "huge": (lambda: ((10, 2**25), BOX), ValueError, r"found \(10, 33554432\)"),
    "float size": (lambda: ((10.0, 20.0), BOX), TypeError, r"found tuple \(10\.0, 20\.0\) first"),
    "size of 3": (lambda: ((10, 20, 3), BOX), TypeError, r"found tuple \(10, 20, 3\) first"),
    "size is a number": (lambda: (10, BOX), TypeError, "found int 10 first"),
    "size is None": (lambda: (None, BOX), TypeError, "found NoneType None first"),
    "swapped canvas": (
        lambda: target(BoundingBoxes(BOX, format="XYXY", canvas_size=(20, 10))),
        ValueError,
        r"image's \(height, width\) \(10, 20\), found canvas_size \(20, 10\)",
    ),
    "empty image": (lambda: (torch.zeros(3, 0, 5), {"boxes": BOX}), ValueError, r"found \(0, 5\)"),
    # Boxes
    "NaN": (lambda: ((10, 20), [[1, 2, float("nan"), 4]]), ValueError, r"boxes\[0\].* nan, 4"),
    "infinite": (lambda: ((10, 20), [[1, 2, 3, float("inf")]]), ValueError, r"boxes\[0\].* inf\]"),
    "beyond float32": (lambda: ((10, 20), [[0, 0, 1e39, 1]]), ValueError, r"float32.*1e\+39"),
    "beyond float32, tensor": (
        lambda: ((10, 20), torch.tensor([[0, 0, 1e39, 1]], dtype=torch.float64)),
        ValueError,
        r"boxes\[0\]: .* float32.* inf",
    ),
    "inverted x": (
        lambda: ((10, 20), [*BOX, [5, 2, 3, 4]]),
        ValueError,
        r"boxes\[1\]: expected \[x1, y1, x2, y2\] .* found \[5\.0, 2\.0, 3\.0, 4\.0\]",
    ),
    "inverted y": (
        lambda: target(torch.tensor([[1, 4, 3, 2]])),
        ValueError,
        r"found \[1, 4, 3, 2\]",
    ),
    "negative XYWH": (
        lambda: target(BoundingBoxes([[5, 5, -1, 2]], format="XYWH", canvas_size=(10, 20))),
        ValueError,
        r"boxes\[0\].* found \[5\.0, 5\.0, 4\.0, 7\.0\]",
    ),
    "one box": (lambda: ((10, 20), BOX[0]), ValueError, r"shape \(n, 4\), found \(4,\)"),
    "five columns": (lambda: ((10, 20), torch.zeros(2, 5)), ValueError, r"found \(2, 5\)"),
    "empty, five columns": (lambda: ((10, 20), torch.zeros(0, 5)), ValueError, r"found \(0, 5\)"),
    "batched": (lambda: ((10, 20), torch.zeros(1, 2, 4)), ValueError, r"found \(1, 2, 4\)"),
    "scalar boxes": (lambda: ((10, 20), 5.0), ValueError, r"shape \(n, 4\), found \(\)"),
    "bool": (lambda: ((10, 20), torch.ones(1, 4) > 0), TypeError, "floats or ints, found bool"),
    "complex": (lambda: ((10, 20), np.ones((1, 4), complex)), TypeError, "found complex128"),
    "strings": (lambda: ((10, 20), [["1", "2", "3", "4"]]), TypeError, "floats or ints, found <U1"),
    "objects": (lambda: ((10, 20), [[None, 1, 2, 3]]), TypeError, "floats or ints, found object"),
    "no boxes at all": (lambda: ((10, 20), None), TypeError, "floats or ints, found object"),
    "ragged": (lambda: ((10, 20), [[1, 2, 3], [1, 2, 3, 4]]), TypeError, "a regular list, found"),
}


class TestBadItems:
    @pytest.mark.parametrize("name", BAD_ITEMS)
    @pytest.mark.parametrize("generator", [True, False])
    def test_named_by_index(self, name: str, generator: bool) -> None:
        make, error, message = BAD_ITEMS[name]
        items = second(make())
        with pytest.raises(error, match=rf"^dataset\[1\]: .*{message}") as caught:
            read_annotations(iter(items) if generator else Detection(items))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500

    @pytest.mark.skipif(not hasattr(BoundingBoxFormat, "XYWHR"), reason="torchvision >= 0.23")
    def test_rotated_boxes(self) -> None:
        with pytest.raises(
            ValueError, match=r"dataset\[1\]: expected unrotated boxes, found XYWHR"
        ):
            read_annotations(second(rotated()))

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


@pytest.mark.parametrize("progress", [True, False])
def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str], progress: bool) -> None:
    read_annotations(CONTENT, progress=progress)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("3/3" in captured.err) == progress


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


def test_coco_like_script_is_deterministic_and_valid(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "benchmarks.coco_like",
                path,
                "--images=30",
                "--annotations=400",
            ],
            check=True,
            cwd=Path(__file__).resolve().parents[3],
        )
    assert paths[0].read_bytes() == paths[1].read_bytes()
    content = json.loads(paths[0].read_text())
    assert (len(content["images"]), len(content["annotations"])) == (30, 400)
    found = read_annotations(paths[0])
    assert_equals(found, reference(content))
    assert found.left_out.keys() == {"crowd"}
