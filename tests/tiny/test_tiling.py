from __future__ import annotations

import copy
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from alphafpn.tiny.tiling import cut_dataset, merge_detections, read_tile

unhurried = settings(deadline=None, max_examples=50)


def corners(width, height, **options):
    image = {"id": 1, "width": width, "height": height}
    tiles = cut_dataset({"images": [image], "annotations": []}, **options)["images"]
    return [tile["corner"] for tile in tiles]


def dataset(width, height, boxes, **keys):
    annotations = [
        {"id": 10 + index, "image_id": 5, "category_id": 1, "bbox": list(box), **keys}
        for index, box in enumerate(boxes)
    ]
    image = {"id": 5, "width": width, "height": height, "file_name": "a/b.jpg"}
    return {"images": [image], "annotations": annotations, "categories": [{"id": 1}]}


def test_tiles_of_the_published_example():
    assert corners(1280, 720) == [[x, y, x + 640, y + 512] for y in (0, 208) for x in (0, 590, 640)]


@unhurried
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 90), st.integers(1, 90), st.data())
def test_tiles_cover_the_image_and_overlap_enough(width, height, tile_width, tile_height, data):
    overlap = [data.draw(st.integers(0, side - 1)) for side in (tile_width, tile_height)]
    tiles = corners(width, height, tile_size=(tile_width, tile_height), overlap=tuple(overlap))
    assert len({tuple(tile) for tile in tiles}) == len(tiles)
    for axis, (length, side) in enumerate([(width, tile_width), (height, tile_height)]):
        spans = sorted({(tile[axis], tile[axis + 2]) for tile in tiles})
        assert spans[0][0] == 0
        assert spans[-1][1] == length
        assert all(end - start == min(side, length) for start, end in spans)
        pairs = list(itertools.pairwise(spans))
        assert all(end - start == overlap[axis] for (_, end), (start, _) in pairs[:-1])
        assert all(end - start >= overlap[axis] for (_, end), (start, _) in pairs[-1:])
        # No tile but the last is shifted, and none is there that the others make superfluous.
        assert all(end < length for _, end in spans[:-1])


def quarters(low, high):
    """Numbers whose sums and products are exact."""
    return st.integers(4 * low, 4 * high).map(lambda number: number / 4)


@unhurried
@given(
    st.lists(
        st.tuples(quarters(-30, 150), quarters(-30, 150), quarters(0, 80), quarters(0, 80)),
        max_size=6,
    ),
    st.sampled_from([0.0, 0.5, 0.7, 1.0]),
)
def test_boxes_are_those_of_the_rule_taken_literally(boxes, ratio):
    cut = cut_dataset(
        dataset(130, 90, boxes), tile_size=(64, 48), overlap=(8, 6), min_size_ratio=ratio
    )
    expected = []
    for tile in cut["images"]:
        x1, y1, x2, y2 = tile["corner"]
        for index, (x, y, w, h) in enumerate(boxes):
            left, top = max(x, x1), max(y, y1)
            wide, high = min(x + w, x2) - left, min(y + h, y2) - top
            if min(wide, high) > 0 and math.sqrt(wide * high) / math.sqrt(w * h) >= ratio:
                expected.append(
                    {
                        "image_id": tile["id"],
                        "original_annotation_id": 10 + index,
                        "bbox": [left - x1, top - y1, wide, high],
                        "area": wide * high,
                        "size": math.sqrt(wide * high),
                        "category_id": 1,
                        "id": len(expected) + 1,
                    }
                )
    assert cut["annotations"] == expected


@pytest.mark.parametrize(("corner", "there"), [((93, 43), True), ((93.25, 43), False)])
def test_a_box_needs_seven_tenths_of_its_size(corner, there):
    # 7 x 7 of 10 x 10 pixels in the first tile is exactly enough; the last tile has all of it.
    source = dataset(180, 90, [[*corner, 10, 10]])
    cut = cut_dataset(source, tile_size=(100, 50), overlap=(20, 10))
    tiles = [annotation["image_id"] for annotation in cut["annotations"]]
    assert (1 in tiles) == there
    assert 4 in tiles


def test_everything_else_is_kept():
    box = [90.25, 10.5, 5.3, 7.7]
    source = dataset(
        200, 50, [box], ignore=True, uncertain=False, iscrowd=0, attributes={"pose": [1, "sit"]},
        area=1.0, size=1.0, segmentation=[[0, 0, 1, 1, 2, 2]], keypoints=[1, 2, 2],
    )  # fmt: skip
    source["info"] = {"year": 2021}
    source["images"][0]["scene"] = "beach"
    before = copy.deepcopy(source)
    cut = cut_dataset(source, tile_size=(100, 50), overlap=(20, 0))
    assert source == before
    assert (cut["info"], cut["categories"]) == (source["info"], source["categories"])
    assert cut["images"][1] == {
        "id": 2, "width": 100, "height": 50, "file_name": "a/b.jpg", "scene": "beach",
        "corner": [80, 0, 180, 50], "original_image_id": 5,
    }  # fmt: skip
    first, second = cut["annotations"]
    assert first["bbox"] == box
    assert second == {
        "id": 2, "image_id": 2, "category_id": 1, "bbox": [10.25, 10.5, 5.3, 7.7],
        "ignore": True, "uncertain": False, "iscrowd": 0, "attributes": {"pose": [1, "sit"]},
        "area": 5.3 * 7.7, "size": math.sqrt(5.3 * 7.7), "original_annotation_id": 10,
    }  # fmt: skip


def test_empty_tiles_are_kept_or_not():
    source = dataset(400, 50, [[150, 10, 10, 10]])
    options = {"tile_size": (100, 50), "overlap": (0, 0)}
    every = cut_dataset(source, **options)
    some = cut_dataset(source, **options, keep_empty=False)
    assert [tile["corner"][0] for tile in every["images"]] == [0, 100, 200, 300]
    assert [(tile["id"], tile["corner"][0]) for tile in some["images"]] == [(1, 100)]
    assert [annotation["image_id"] for annotation in some["annotations"]] == [1]


def legacy_iou(a, b):
    inter = 1.0
    for axis in (0, 1):
        low = max(a[axis], b[axis])
        inter *= max(0, min(a[axis] + a[axis + 2], b[axis] + b[axis + 2]) - low + 1)
    areas = [(box[2] + 1) * (box[3] + 1) for box in (a, b)]
    return inter / (sum(areas) - inter)


def literal_merge(detections, tiles):
    whole = []
    for detection in detections:
        tile = next(t for t in tiles["images"] if t["id"] == detection["image_id"])
        x, y, w, h = detection["bbox"]
        box = [x + tile["corner"][0], y + tile["corner"][1], w, h]
        whole.append({**detection, "image_id": tile["original_image_id"], "bbox": box})
    kept = []
    for index in sorted(range(len(whole)), key=lambda i: -whole[i]["score"]):
        same = [k for k in kept if whole[k]["image_id"] == whole[index]["image_id"]]
        if all(legacy_iou(whole[k]["bbox"], whole[index]["bbox"]) < 0.5 for k in same):
            kept.append(index)
    return [whole[index] for index in sorted(kept)]


@unhurried
@given(st.data())
def test_merging_is_the_literal_suppression(data):
    images = [{"id": i, "width": 90, "height": 40} for i in (3, 8)]
    tiles = cut_dataset({"images": images, "annotations": []}, tile_size=(40, 40), overlap=(10, 0))
    # Whole numbers of few values, so that overlaps of about and of exactly one half occur. The
    # second tile begins at 30.
    down, side = st.integers(0, 6), st.sampled_from([0, 5, 8])
    across = down | st.integers(30, 36)
    detection = st.fixed_dictionaries(
        {
            "image_id": st.sampled_from([tile["id"] for tile in tiles["images"]]),
            "category_id": st.integers(1, 2),
            "bbox": st.tuples(across, down, side, side).map(list),
            "score": st.sampled_from([0.1, 0.25, 0.5, 0.9]),
        }
    )
    detections = data.draw(st.lists(detection, max_size=25))
    assert merge_detections(detections, tiles) == literal_merge(detections, tiles)


def test_a_tile_is_read_from_its_image_or_from_a_file_of_its_own(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a/b.png")
    source = dataset(90, 50, [])
    source["images"][0]["file_name"] = "a/b.png"
    for tile in cut_dataset(source, tile_size=(40, 30), overlap=(10, 5))["images"]:
        x1, y1, x2, y2 = tile["corner"]
        found = read_tile(tile, tmp_path)
        assert found.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(found), pixels[y1:y2, x1:x2])
        found.save(tmp_path / "own.png")
        np.testing.assert_array_equal(
            np.asarray(read_tile({**tile, "file_name": "own.png"}, tmp_path)), pixels[y1:y2, x1:x2]
        )


def test_bad_images_are_named(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (90, 50)).save(path)
    tile = {"id": 4, "width": 5, "height": 5, "corner": [60, 0, 91, 30], "file_name": "a.png"}
    with pytest.raises(ValueError, match=r"a\.png: expected at least 91 x 30.* found 90 x 50"):
        read_tile(tile, tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        read_tile(tile, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": (640, 0)}, "overlap"),
        ({"overlap": (-1, 0)}, "overlap"),
        ({"tile_size": (0, 10), "overlap": (0, 0)}, "tile_size"),
        ({"min_size_ratio": 1.1}, "min_size_ratio"),
        ({"min_size_ratio": math.nan}, "min_size_ratio"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        cut_dataset(dataset(10, 10, []), **options)


@pytest.mark.parametrize(
    ("key", "value"),
    [("width", 0), ("height", "9"), ("id", None), ("corner", [0, 0, 1, 1]), ("id", [5])],
)
def test_bad_images_of_a_dataset_are_named(key, value, tmp_path):
    source = dataset(10, 10, [[1, 1, 2, 2], [1, 1, 2, 2]])
    source["images"][0][key] = value
    (tmp_path / "x.json").write_text(json.dumps(source))
    for given_ in (source, tmp_path / "x.json"):
        with pytest.raises(ValueError, match=r"dataset: images\[0\].*: expected .* found"):
            cut_dataset(given_)


def test_ids_may_be_strings_and_annotations_have_none(tmp_path):
    source = dataset(700, 50, [[0, 0, 9, 9]])
    source["images"][0]["id"] = source["annotations"][0]["image_id"] = "beach.jpg"
    del source["annotations"][0]["id"]
    (tmp_path / "x.json").write_text(json.dumps(source))
    cut = cut_dataset(tmp_path / "x.json")
    assert [tile["original_image_id"] for tile in cut["images"]] == ["beach.jpg"] * 2
    assert "original_annotation_id" not in cut["annotations"][0]
    found = [{"image_id": n, "bbox": [x, 0, 9, 9], "score": n} for n, x in ((1, 600), (2, 540))]
    (merged,) = merge_detections(found, cut)
    assert (merged["image_id"], merged["bbox"]) == ("beach.jpg", [600, 0, 9, 9])


def test_nothing_merges_into_nothing():
    assert merge_detections([], cut_dataset({"images": [], "annotations": []})) == []
    with pytest.raises(ValueError, match=r"tiles: images\[0\].*original_image_id"):
        merge_detections([], dataset(10, 10, []))


def test_merging_keeps_what_it_knows_nothing_of_but_not_shapes_in_the_tiles_pixels():
    tiles = cut_dataset(dataset(100, 100, []))
    found = {"image_id": 1, "bbox": [0, 0, 5, 5], "score": 0.5, "category_id": 3, "note": ["x"]}
    given_ = copy.deepcopy(found) | {"segmentation": {"size": [1, 1], "counts": "1"}}
    before = copy.deepcopy(given_)
    assert merge_detections([given_], tiles) == [found | {"image_id": 5}]
    assert given_ == before
