from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from alphafpn.estimate.annotations import read_annotations
from tests.annotation_sets import (
    CONTENT,
    DATASETS,
    Detection,
    pillow,
)


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
    "half an image": (
        lambda: (SimpleNamespace(height=5), {"boxes": BOX}),
        TypeError,
        "PIL image or a tensor, found SimpleNamespace",
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
    "empty, batched": (lambda: ((10, 20), torch.zeros(1, 0, 4)), ValueError, r"\(1, 0, 4\)"),
    "batched": (lambda: ((10, 20), torch.zeros(1, 2, 4)), ValueError, r"found \(1, 2, 4\)"),
    "scalar boxes": (lambda: ((10, 20), 5.0), ValueError, r"shape \(n, 4\), found \(\)"),
    "bool": (lambda: ((10, 20), torch.ones(1, 4) > 0), TypeError, "floats or ints, found bool"),
    "complex": (lambda: ((10, 20), np.ones((1, 4), complex)), TypeError, "found complex128"),
    "strings": (lambda: ((10, 20), [["1", "2", "3", "4"]]), TypeError, "floats or ints, found <U1"),
    "objects": (lambda: ((10, 20), [[None, 1, 2, 3]]), TypeError, "floats or ints, found object"),
    "no boxes at all": (lambda: ((10, 20), None), TypeError, "floats or ints, found object"),
    "ragged": (lambda: ((10, 20), [[1, 2, 3], [1, 2, 3, 4]]), TypeError, "a regular list, found"),
}


def test_images_from_one_pixel_to_the_most_that_float32_can_tell() -> None:
    found = read_annotations([((1, 2**24), [[0, 0, 2**24, 1]]), ((2**24, 1), [])])
    assert found.image_sizes.tolist() == [[1, 2**24], [2**24, 1]]
    assert found.boxes.tolist() == [[0, 0, 2**24, 1]]


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


@pytest.mark.parametrize("progress", [True, False])
def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str], progress: bool) -> None:
    read_annotations(CONTENT, progress=progress)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("3/3" in captured.err) == progress
