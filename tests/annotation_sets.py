"""The same images and boxes in every form that `read_annotations` takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import ConcatDataset, Subset
from torchvision.ops import box_convert
from torchvision.tv_tensors import BoundingBoxes
from torchvision.tv_tensors import Image as TVImage

from alphafpn.estimate.annotations import Annotations
from tests.malformed import annotation, coco


def reference(content, category_ids=None):
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


def assert_equals(found, expected):
    assert found.image_sizes.dtype == found.boxes_per_image.dtype == np.int64
    assert found.boxes.dtype == np.float32
    assert found.image_sizes.tolist() == [list(size) for size, _ in expected]
    assert found.boxes_per_image.tolist() == [len(boxes) for _, boxes in expected]
    assert np.array_equal(found.boxes, torch.cat([boxes for _, boxes in expected]).numpy())


def assert_same(found, expected):
    assert np.array_equal(found.image_sizes, expected.image_sizes)
    assert np.array_equal(found.boxes, expected.boxes)
    assert np.array_equal(found.boxes_per_image, expected.boxes_per_image)
    assert found.num_clipped == expected.num_clipped
    assert found.left_out == expected.left_out


def write(directory, content):
    path = directory / "annotations.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


coordinates = st.one_of(
    st.floats(-50, 150, width=64), st.integers(-50, 150), st.floats(-1e38, 1e38), st.just(-0.0)
)
sides = st.one_of(st.floats(0, 200, width=64), st.integers(0, 200), st.sampled_from([0, 1e-9]))


@st.composite
def coco_files(draw):
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


class Detection(torch.utils.data.Dataset[Any]):
    """A map-style dataset as torchvision's tutorials write them: never raises an IndexError."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index % len(self.items)]


# Sizes and boxes whose every form is exact in float32.
CONTENT: list[tuple[tuple[int, int], list[list[float]]]] = [
    ((48, 64), [[1.5, 2, 10.5, 20.25], [60, 40, 70, 50]]),
    ((30, 20), []),
    ((25, 25), [[4, 4, 4, 9], [30, 30, 40, 40], [0, 0, 25, 25]]),
]
EXPECTED = Annotations(
    image_sizes=np.array([[48, 64], [30, 20], [25, 25]]),
    boxes=np.array([[1.5, 2, 10.5, 20.25], [60, 40, 64, 48], [0, 0, 25, 25]], np.float32),
    boxes_per_image=np.array([2, 0, 1]),
    num_clipped=1,
    left_out={"zero size": 1, "outside the image": 1},
)
LABELS = [[1, 2], [], [2, 2, 2]]


def content_as_coco():
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


def pairs(make_image, make_boxes):
    """An image and a target for each of the images."""
    return [
        (
            make_image(*size),
            {"boxes": make_boxes(boxes, size), "labels": torch.tensor(labels).int()},
        )
        for (size, boxes), labels in zip(CONTENT, LABELS, strict=True)
    ]


def pillow(height, width):
    return Image.new("RGB", (width, height))


def tensor(height, width):
    return torch.zeros(3, height, width)


def no_image(height, width):
    return None


def plain(boxes, size):
    return torch.tensor(boxes).reshape(-1, 4)


def bounding_boxes(name):
    def make(boxes, size):
        converted = box_convert(plain(boxes, size), "xyxy", name.lower()).tolist()
        return BoundingBoxes(converted, format=name, canvas_size=size, dtype=torch.float32)

    return make


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
    "PIL": lambda: Detection(pairs(pillow, plain)),
    "tensor": lambda: Detection(pairs(tensor, plain)),
    "tv_tensor": lambda: Detection(
        pairs(lambda *size: TVImage(tensor(*size)), bounding_boxes("XYXY"))
    ),
    "XYWH": lambda: Detection(pairs(pillow, bounding_boxes("XYWH"))),
    "CXCYWH": lambda: Detection(pairs(pillow, bounding_boxes("CXCYWH"))),
    "size from canvas": lambda: Detection(pairs(no_image, bounding_boxes("XYXY"))),
    "generator": lambda: (item for item in pairs(pillow, plain)),
    "triples, as DeepForest's": lambda: Detection([(*p, "a.png") for p in pairs(tensor, plain)]),
    "dictionaries": lambda: Detection(
        [{"image": i, **target} for i, target in pairs(pillow, plain)]
    ),
    "dictionaries, as TorchGeo's": lambda: Detection(
        [
            {"image": i, "bbox_xyxy": target["boxes"], "label": target["labels"], "crs": None}
            for i, target in pairs(tensor, plain)
        ]
    ),
    "subset of a subset": lambda: Subset(
        Subset(Detection(pairs(pillow, plain)), [2, 1, 0]), [2, 1, 0]
    ),
    "concatenated": lambda: ConcatDataset([Detection([item]) for item in pairs(pillow, plain)]),
}
