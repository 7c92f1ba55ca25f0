from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import threading
import tracemalloc
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from alphafpn.estimate.annotations import read_annotations
from alphafpn.estimate.coco import read_coco
from tests.annotation_sets import assert_equals, coco_files, reference, write
from tests.malformed import LEFT_OUT, MALFORMED, READ, annotation, coco

ROOT = Path(__file__).resolve().parents[2]
BOXES = [[10, 20, 40, 60], [10, 20, 40, 60]]


def read_bytes(path, content):
    path.write_bytes(content)
    return read_annotations(path)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "annotations.json"


@settings(max_examples=100, deadline=None)
@given(
    content=coco_files(),
    category_ids=st.one_of(st.none(), st.sets(st.integers(1, 4))),
    tolerant=st.booleans(),
)
def test_equals_torchvisions_references(content, category_ids, tolerant, tmp_path_factory):
    if tolerant:
        content["annotations"].append(annotation(image_id=content["images"][0]["id"], bbox=[]))
    path = write(tmp_path_factory.getbasetemp(), content)
    if tolerant:
        content["annotations"].pop()
    expected = reference(content, category_ids)
    total = sum(len(boxes) for _, boxes in expected)
    if total == 0:
        with pytest.raises(ValueError, match="expected boxes to count, found none"):
            read_annotations(path, category_ids=category_ids)
        return
    found = read_annotations(path, category_ids=category_ids)
    assert_equals(found, expected)
    assert sum(found.left_out.values()) == len(content["annotations"]) - total + tolerant
    assert all(found.left_out.values())


@pytest.mark.parametrize("content", READ.values(), ids=READ)
def test_files_as_people_have_them(path, content):
    found = read_bytes(path, content)
    assert found.boxes.tolist() == BOXES
    assert found.boxes_per_image.tolist() == [1, 1]
    assert found.left_out == {}
    assert set(found.notes) <= {"boxes are of a category that `categories` does not list"}


@pytest.mark.parametrize(
    ("entry", "reason"),
    [(annotation(**changes), reason) for changes, reason in LEFT_OUT.values()]
    + [(entry, "no box") for entry in (None, [], 5, "annotation", {})],
    ids=[*LEFT_OUT, "null", "a list", "a number", "a string", "an empty object"],
)
def test_a_broken_annotation_is_left_out_for_a_reason(path, entry, reason):
    content = coco()
    content["annotations"].insert(1, entry)
    found = read_bytes(path, json.dumps(content).replace('"null"', "null").encode())
    assert found.boxes.tolist() == BOXES
    assert found.boxes_per_image.tolist() == [1, 1]
    assert found.left_out == {reason: 1}


@pytest.mark.parametrize(("content", "found"), MALFORMED.values(), ids=MALFORMED)
def test_a_broken_file_stops(path, content, found):
    with pytest.raises(ValueError, match=found) as caught:
        read_bytes(path, content)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 500


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="file, found a folder; the recipe 'Convert annotations'"):
        read_annotations(tmp_path)


def test_the_first_reason_counts(tmp_path):
    annotations = [
        annotation(),
        annotation(category_id=2, bbox=[]),
        annotation(image_id=99, bbox=[], iscrowd=1),
        annotation(image_id=99, bbox=[1, 2, -3, math.nan]),
        annotation(image_id=99, bbox=[1, 2, -3, 4]),
        annotation(image_id=99, iscrowd=1),
        annotation(iscrowd=1, ignore=True),
        annotation(ignore=True, bbox=[0, 0, 0, 0]),
        # In float32, 640 + 1e-6 is 640.
        annotation(bbox=[600, 10, 1e-6, 5]),
        annotation(bbox=[700, 10, 5, 0]),
        annotation(bbox=[640, 0, 5, 5]),
        annotation(bbox=[-5, -5, 5, 10]),
        annotation(bbox=[-5, -5, 10, 10]),
    ]
    path = write(tmp_path, coco(annotations=annotations))
    found = read_annotations(path, category_ids=[1])
    assert list(found.left_out.items()) == [
        ("other categories", 1),
        ("no box", 1),
        ("not four finite numbers", 1),
        ("negative size", 1),
        ("on no image of the file", 1),
        ("crowd", 1),
        ("ignore", 1),
        ("zero size", 2),
        ("outside the image", 2),
    ]
    assert found.boxes.tolist() == [[10, 20, 40, 60], [0, 0, 5, 5]]
    assert found.num_clipped == 1
    assert found.boxes_per_image.tolist() == [2, 0]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("order", [1, -1], ids=["annotations last", "annotations first"])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"segmentation": {"counts": [1, 2], "size": [9, 9]}},
        {"attributes": [{"a": 1}, {"b": [{"c": 2}, {"d": 3}]}]},
        {"note": '}, {"annotations": [{"image_id": 1}, {'},
    ],
    ids=["plain", "mask", "objects in lists", "text like JSON"],
)
def test_large_files(path, indent, order, extra):
    """They are read in pieces of about a megabyte."""
    content = coco(
        images=[{"id": i, "width": 640, "height": 480, "note": "x" * 2000} for i in range(900)],
        annotations=[
            annotation(id=i, image_id=i % 900, bbox=[i % 500, 7, 9 + i % 5, 11], **extra)
            for i in range(20_000)
        ],
    )
    content["annotations"][9_000]["segmentation"] = [[0.5] * 500_000]  # longer than a piece
    content = dict(list(content.items())[::order])  # images and categories on both sides
    path.write_text(json.dumps(content, indent=indent))
    assert path.stat().st_size > 3_000_000
    read, expected = read_coco(path, ""), read_coco(content, "")
    for name in ("image_sizes", "image_index", "boxes", "reasons"):
        np.testing.assert_array_equal(getattr(read, name), getattr(expected, name))
    assert read.image_ids == expected.image_ids
    assert read.listed == expected.listed
    assert read.category_ids == expected.category_ids
    text = path.read_bytes()
    for end in (1 << 20, 2_500_000, len(text) - 2):
        with pytest.raises(ValueError, match="at character"):
            read_bytes(path, text[:end])


def test_polygons_take_no_memory(path):
    polygon = [[0.5] * 400]
    annotations = [annotation(id=i, segmentation=polygon) for i in range(10_000)]
    path.write_text(json.dumps(coco(annotations=annotations)))
    assert path.stat().st_size > 20_000_000
    tracemalloc.start()
    try:
        assert len(read_coco(path, "").boxes) == 10_000
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_largest_numbers(tmp_path):
    largest = {"id": 2**63 - 1, "width": 2**24, "height": 2**24}
    content = coco(images=[largest], annotations=[annotation(image_id=2**63 - 1)])
    assert read_annotations(write(tmp_path, content)).image_sizes.tolist() == [[2**24, 2**24]]
    for key in ("width", "height"):
        content["images"] = [{**largest, key: 2**24 + 1}]
        with pytest.raises(ValueError, match=r"images\[0\]"):
            read_annotations(write(tmp_path, content))


@pytest.mark.parametrize("wrap", [dict, MappingProxyType])
def test_a_dictionary_in_memory(wrap):
    assert read_annotations(wrap(coco())).boxes.tolist() == BOXES
    content = coco()
    content["images"][0]["width"] = np.int64(640)
    content["annotations"][0] |= {"bbox": np.array([10.0, 20, 30, 40]), "image_id": torch.tensor(7)}
    content["annotations"][1] |= {"bbox": torch.tensor([10, 20, 30, 40]), "iscrowd": np.False_}
    assert read_annotations(wrap(content)).boxes.tolist() == BOXES
    with pytest.raises(ValueError, match=r"^dataset: expected a list of `annotations`, found onl"):
        read_annotations(wrap({"images": []}))


# Categories


def test_names_select_boxes(tmp_path):
    content = coco(categories=["person", "boat"])
    content["annotations"][0]["category_id"] = "boat"
    path = write(tmp_path, content)
    assert read_annotations(path, category_ids=["boat"]).left_out == {"other categories": 1}
    with pytest.raises(ValueError, match="category_ids among 1, 'boat', found 'person'"):
        read_annotations(path, category_ids=["person"])


def test_one_and_one_point_zero_are_the_same_but_not_the_string():
    content = coco(annotations=[annotation(category_id=c) for c in (1, 1.0, "1")])
    for category, boxes in ((1, 2), (1.0, 2), (np.int32(1), 2), ("1", 1)):
        assert len(read_annotations(content, category_ids=[category]).boxes) == boxes


def test_unknown_category(tmp_path):
    path = write(tmp_path, coco(annotations=[annotation(category_id=5)]))
    found = "json: expected category_ids among 1 'person', 2 'boat', 5, found 4"
    with pytest.raises(ValueError, match=found):
        read_annotations(path, category_ids=[1, 4])
    for count, end in ((100, "98, 99, found 9999"), (101, r"99, \.\.\. \(101 in all\), found")):
        many = coco(categories=[{"id": n} for n in range(count)])
        with pytest.raises(ValueError, match=f"among 0, 1, .* {end}"):
            read_annotations(many, category_ids=[9999])
    with pytest.raises(ValueError, match=r"none in 2 images; left out were 2 other categories"):
        read_annotations(coco(), category_ids=[2])


@pytest.mark.parametrize("categories", [[], None, ["person"]])
def test_no_category_is_unlisted_without_a_list(path, categories):
    assert read_annotations(write(path.parent, coco(categories=categories))).notes == {}


@pytest.mark.parametrize("category_ids", [1, "person", [1.5], [None], [True], b"1"])
def test_category_ids_of_a_wrong_type(category_ids):
    with pytest.raises(TypeError, match=r"category_ids: expected a collection of ints or strin"):
        read_annotations(coco(), category_ids=category_ids)


def test_notes(tmp_path):
    categories = (0, 1, 1, 9, "person", None, 0)
    entries = [annotation(category_id=c) for c in categories]
    entries += [annotation(bbox=None), annotation(bbox=[], segmentation=[])]
    entries += [annotation(category_id=0, iscrowd=1)]
    path = write(tmp_path, coco(annotations=entries))
    assert read_annotations([path, path]).notes == {
        "annotations have polygons but no box, and were left out": 2,
        "boxes are of category 0, which torchvision's R-CNNs take for the background": 4,
        "boxes are of a category that `categories` does not list": 8,
    }
    # Roboflow's root category has no boxes.
    content = coco(categories=[{"id": 0, "name": "root"}, {"id": 1, "name": "person"}])
    assert read_annotations(content).notes == {}


def read_on_high_image(*boxes):
    """Boxes xywh on an image of 100 x 200."""
    image = {"id": 7, "width": 100, "height": 200}
    return read_annotations(coco(images=[image], annotations=[annotation(bbox=b) for b in boxes]))


def test_boxes_that_fit_the_image_turned_by_a_quarter_are_counted():
    fit = [90, 10, 20, 20], [150, 50, 40, 50]  # the second lies outside
    others = [10, 10, 20, 20], [90, 150, 20, 20], [90, 0, 200, 9]
    found = read_on_high_image(*fit, *others)
    assert (found.num_clipped, found.num_fit_swapped) == (3, 2)
    assert found.left_out == {"outside the image": 1}


@pytest.mark.parametrize("edge", range(4))
def test_a_box_may_be_a_pixel_beyond_the_turned_image(edge):
    for by, counted in ((1, 1), (1.0625, 0)):
        low_x, low_y, high_x, high_y = (by if i == edge else 1 for i in range(4))
        found = read_on_high_image([-low_x, -low_y, 200 + high_x + low_x, 100 + high_y + low_y])
        assert (found.num_clipped, found.num_fit_swapped) == (1, counted)


# Damage: whatever is in a file, it is read or refused in one line


FLAT = json.dumps(coco(info=None)).encode()


def survive(path, content):
    message = f"{path}: "
    try:
        read_bytes(path, content)
    except ValueError as error:
        message = str(error)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


def test_cut_off_anywhere(path):
    for end in range(len(FLAT)):
        with pytest.raises(ValueError, match="expected a COCO JSON file, found") as caught:
            read_bytes(path, FLAT[:end])
        assert "\n" not in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, len(FLAT)),
            st.integers(0, 8),
            st.one_of(
                st.binary(max_size=4),
                st.sampled_from(
                    [
                        *(b"NaN", b"-Infinity", b"null", b"true", b'"7"', b"7.0", b"1e400"),
                        *(b"[]", b"{}", b"[[1]]", b'"\\ud800"', b"\xff", b"\n", b"9" * 30),
                    ]
                ),
            ),
        ),
        min_size=1,
        max_size=4,
    )
)
@example(edits=[(FLAT.index(b"7"), 1, b'"\\ud800"')])
def test_bytes(edits, tmp_path_factory):
    content = FLAT
    for start, length, new in edits:
        content = content[:start] + new + content[start + length :]
    survive(tmp_path_factory.getbasetemp() / "edited.json", content)


def places(part):
    """Yields each list and dictionary within `part`, once with each of its keys."""
    for key in range(len(part)) if isinstance(part, list) else part:
        yield part, key
        if isinstance(part[key], list | dict):
            yield from places(part[key])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_values(data, tmp_path_factory):
    content = coco()
    values = st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.sampled_from([7, 3, 7.0, "7", "", 10**400, 2**63]),
        lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=2),
        max_leaves=6,
    )
    for _ in range(data.draw(st.integers(1, 3))):
        part, key = data.draw(st.sampled_from([*places(content)]))
        if data.draw(st.integers(0, 3)):
            part[key] = data.draw(values)
        else:
            del part[key]
    survive(tmp_path_factory.getbasetemp() / "changed.json", json.dumps(content).encode())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"\xef\xbb\xbf" + FLAT,))
    writer.start()
    found = read_annotations(pipe)
    writer.join()
    assert_equals(found, reference(coco()))


def in_a_process(program, path):
    """What a program prints that is given a path."""
    command = [sys.executable, "-c", program, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_file_that_is_cut_off_while_it_is_read(tmp_path):
    """In a process of its own: one that maps the file would be killed."""
    path = write(tmp_path, coco(annotations=[annotation()] * 20_000))
    program = """
import os, sys, msgspec
from alphafpn.estimate import coco
decode = msgspec.json.decode
def shortened(*args, **options):
    os.truncate(sys.argv[1], 100)
    return decode(*args, **options)
msgspec.json.decode = shortened
print(len(coco.read_coco(sys.argv[1], "file").image_index))
"""
    assert in_a_process(program, path) == "20000\n"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits the memory as Linux does")
def test_memory_that_runs_out(tmp_path):
    path = write(tmp_path, coco(info={"text": "x" * 300_000_000}))
    program = """
import resource, sys
from alphafpn.estimate import coco
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000, -1))
try:
    coco.read_coco(sys.argv[1], "file")
except ValueError as error:
    print(error)
"""
    found = in_a_process(program, path)
    assert found == "file: expected a file that fits into memory, found none left\n"


# While it is read


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("content", [coco(), {}])
def test_garbage_collector_is_left_as_it_was(tmp_path, enabled, content):
    path = write(tmp_path, content)
    (gc.enable if enabled else gc.disable)()
    try:
        with nullcontext() if content else pytest.raises(ValueError, match="list of `images`"):
            read_annotations(path)
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


@pytest.mark.parametrize("box", [[1, 2, 3, 4], []])
def test_no_garbage_is_looked_for_while_decoding(tmp_path, box):
    path = write(tmp_path, coco(annotations=[annotation()] * 5000 + [annotation(bbox=box)]))
    phases = []

    def note(phase, info):
        phases.append(phase)

    gc.callbacks.append(note)
    try:
        content = read_coco(str(path), "file")
        assert phases.count("start") <= 1  # once it is over
    finally:
        gc.callbacks.remove(note)
    assert len(content.boxes) == 5001


def test_coco_like_script_is_deterministic_and_valid(tmp_path):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        options = ["-m", "benchmarks.coco_like", path, "--images=30", "--annotations=400"]
        subprocess.run([sys.executable, *options], check=True, cwd=ROOT)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    content = json.loads(paths[0].read_text())
    assert (len(content["images"]), len(content["annotations"])) == (30, 400)
    found = read_annotations(paths[0])
    assert_equals(found, reference(content))
    assert found.left_out.keys() == {"crowd"}
