"""COCO files as people have them: those that are read, those with broken parts, those that stop."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any

_HOW = ".*recipe .Convert annotations. in the documentation"
_OPTIONAL = ("area", "iscrowd", "ignore", "category_id", "segmentation", "id")


def coco(**changes: Any) -> dict[str, Any]:
    """Return a small valid COCO dict, with some of its keys replaced or, by `None`, removed."""
    valid = {
        "info": {"description": "made for a test"},
        "images": [
            {"id": 7, "file_name": "a.jpg", "width": 640, "height": 480},
            {"id": 3, "file_name": "b.jpg", "width": 100, "height": 200},
        ],
        "annotations": [annotation(id=11), annotation(id=12, image_id=3)],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "boat"}],
    }
    return {key: value for key, value in (valid | changes).items() if value is not None}


def annotation(**changes: Any) -> dict[str, Any]:
    """Return a valid annotation, with some of its keys replaced or, by `None`, removed."""
    valid = {
        "id": 1,
        "image_id": 7,
        "category_id": 1,
        "bbox": [10.0, 20.0, 30.0, 40.0],
        "segmentation": [[10.0, 20.0, 40.0, 20.0, 40.0, 60.0]],
        "iscrowd": 0,
        "area": 1200.0,
    }
    return {key: value for key, value in (valid | changes).items() if value is not None}


def _dump(**changes: Any) -> bytes:
    return json.dumps(coco(**changes)).encode()


def _images(**second: Any) -> bytes:
    first = {"id": 7, "width": 640, "height": 480}
    changed = {"id": 3, "width": 100, "height": 200} | second
    changed = {key: value for key, value in changed.items() if value is not None}
    return _dump(images=[first, changed])


def _with_ids(change: Callable[[int], Any]) -> bytes:
    content = coco()
    for image in content["images"]:
        image["id"] = change(image["id"])
    for entry in content["annotations"]:
        entry["image_id"] = change(entry["image_id"])
    return json.dumps(content).encode()


def _as_floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_floats(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_as_floats(part) for part in value]
    return float(value) if isinstance(value, int) else value


def _each(**changes: Any) -> bytes:
    """Changes keys of every annotation."""
    return _dump(annotations=[annotation(**changes), annotation(image_id=3, **changes)])


_VALID = json.dumps(coco()).encode()

# Read as if nothing were unusual: two boxes, nothing left out.
READ: dict[str, bytes] = {
    "image ids are file names": _with_ids(lambda i: f"{i}.jpg"),
    "image ids are numbers in quotes": _with_ids(str),
    "image ids are empty, odd or not UTF-8": _with_ids(lambda i: {7: "", 3: "HERE"}[i]).replace(
        b"HERE", b"B\xe4ume"
    ),
    "image ids have more than 64 bits": _with_ids(lambda i: i * 10**30),
    "image ids are negative": _with_ids(lambda i: -i),
    "every number is a float": json.dumps(_as_floats(coco())).encode(),
    "ids of images alone are floats": _dump(
        images=[{"id": i, "width": 640, "height": 480} for i in (7.0, 3.0)]
    ),
    "NaN in area": _each(area=float("nan")),
    "Infinity in area": _each(area=float("inf")) + b"\n",
    "NaN for what is missing": _each(**dict.fromkeys(_OPTIONAL, float("nan"))),
    "null for what is missing": _VALID.replace(b'"iscrowd": 0', b'"iscrowd": null, "ignore": null'),
    "byte order mark": b"\xef\xbb\xbf" + _VALID,
    "bytes that are no UTF-8": _VALID.replace(b"made for", b"B\xe4ume"),
    "such bytes and NaN": _each(area=float("nan")).replace(b"made for", b"B\xe4ume"),
    "white space around": b"\r\n\t " + _VALID + b"\r\n",
    "iscrowd is '0'": _each(iscrowd="0"),
    "iscrowd is 'False'": _each(iscrowd="False", ignore=" "),
    "iscrowd is missing": _each(iscrowd=None),
    "ids of annotations repeat": _each(id=0),
    "ids of annotations are missing": _each(id=None),
    "ids of annotations are odd": _each(id={"uuid": [1]}),
    "segmentation is empty": _each(segmentation=[]),
    "segmentation is missing": _each(segmentation=None),
    "segmentation is RLE": _each(segmentation={"counts": "a^b", "size": [640, 480]}),
    "categories are names": _dump(categories=["person", "boat"]),
    "categories are null": _VALID.replace(b'"categories": [', b'"categories": null, "others": ['),
    "categories are missing": _dump(categories=None),
    "categories are an object": _dump(categories={"1": "person"}),
    "categories without ids": _dump(categories=[{"name": "person"}, 5, None]),
    "category_id is a name": _each(category_id="person").replace(
        b'"id": 1, "n', b'"id": "person", "n'
    ),
    "category_id is missing": _each(category_id=None),
    "category_id is odd": _each(category_id=[1]),
    "a width as a number of numpy would write it": _VALID.replace(b"640", b"6.4e2"),
    "keys that nobody asked for": _each(attributes={"occluded": True}, track_id=1, rotation=0.0),
}

# Stands for JSON's null, as `annotation` takes None for a key that is not there.
NULL = "null"

# A further annotation, which is left out, and the reason.
LEFT_OUT: dict[str, tuple[dict[str, Any], str]] = {
    "only polygons": ({"bbox": None}, "no box"),
    "bbox is null": ({"bbox": NULL}, "no box"),
    "bbox is empty": ({"bbox": []}, "no box"),
    "bbox is NaN": ({"bbox": float("nan")}, "no box"),
    "three numbers": ({"bbox": [1, 2, 3]}, "not four finite numbers"),
    "five numbers": ({"bbox": [1, 2, 3, 4, 0.5]}, "not four finite numbers"),
    "eight numbers": ({"bbox": [1, 2, 3, 2, 3, 4, 1, 4]}, "not four finite numbers"),
    "two corners": ({"bbox": [[1, 2], [3, 4]]}, "not four finite numbers"),
    "four boxes": ({"bbox": [[1, 2, 3, 4]] * 4}, "not four finite numbers"),
    "a box of NaN": ({"bbox": [1, 2, float("nan"), 4]}, "not four finite numbers"),
    "a box of Infinity": ({"bbox": [1, 2, float("inf"), 4]}, "not four finite numbers"),
    "beyond float32": ({"bbox": [1, 2, 1e39, 4]}, "not four finite numbers"),
    "beyond float64": ({"bbox": [1, 2, 10**400, 4]}, "not four finite numbers"),
    "as far as float32 goes": ({"bbox": [1, (2 - 2**-23) * 2.0**127, 3, 4]}, "zero size"),
    "a box with null": ({"bbox": [1, 2, NULL, 4]}, "not four finite numbers"),
    "a box with true": ({"bbox": [1, 2, True, 4]}, "not four finite numbers"),
    "a box of strings": ({"bbox": ["1", "2", "3", "4"]}, "not four finite numbers"),
    "bbox is a string": ({"bbox": "1,2,3,4"}, "not four finite numbers"),
    "bbox is a number": ({"bbox": 5}, "not four finite numbers"),
    "bbox is a dictionary": ({"bbox": {"x": 1, "y": 2, "w": 3, "h": 4}}, "not four finite numbers"),
    "negative width": ({"bbox": [9, 9, -3, 4]}, "negative size"),
    "negative height": ({"bbox": [9, 9, 3, -4]}, "negative size"),
    "negative and a crowd": ({"bbox": [9, 9, 3, -4], "iscrowd": 1}, "negative size"),
    "an image that is not there": ({"image_id": 99}, "on no image of the file"),
    "an image id in quotes": ({"image_id": "7"}, "on no image of the file"),
    "an image id that is true": ({"image_id": True}, "on no image of the file"),
    "an image id of a fraction": ({"image_id": 7.5}, "on no image of the file"),
    "an image id of a list": ({"image_id": [7]}, "on no image of the file"),
    "no image_id": ({"image_id": None}, "on no image of the file"),
    "crowd": ({"iscrowd": 1}, "crowd"),
    "crowd as '1'": ({"iscrowd": "1"}, "crowd"),
    "crowd as 1.0": ({"iscrowd": 1.0}, "crowd"),
    "ignore": ({"ignore": True}, "ignore"),
    "zero width": ({"bbox": [10, 10, 0, 5]}, "zero size"),
    "zero height": ({"bbox": [10, 10, 5, 0]}, "zero size"),
    "zeros for no object": ({"bbox": [0, 0, 0, 0]}, "zero size"),
    "outside": ({"bbox": [700, 10, 5, 5]}, "outside the image"),
}

# A file that stops, and a regular expression that the message about it matches.
MALFORMED: dict[str, tuple[bytes, str]] = {
    # Not JSON
    "0 bytes": (b"", "found an empty file"),
    "only white space": (b" \n", "found an empty file"),
    "truncated": (_VALID[:-50], r"ends too early, at character \d+, after .*"),
    "truncated in a number": (_VALID[: _VALID.index(b"30.0") + 2], "one that ends too early, at"),
    "trailing comma": (_VALID[:-1] + b",}", "double quotes.* near .*,}"),
    "trailing text": (_VALID + b"]", r"Extra data.* at character \d+, near"),
    "JSON lines": (b'{"id": 1}\n{"id": 2}\n', "Extra data"),
    "HTML": (b"<html>Not found</html>", "found XML"),
    "an image": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "at character 0, near .*PNG"),
    "zeros": (bytes(100), r"at character 0"),
    "UTF-16": (json.dumps(coco()).encode("utf-16"), "found UTF-16 or UTF-32 text"),
    "UTF-16 without mark": (json.dumps(coco()).encode("utf-16-be"), "found UTF-16"),
    "UTF-32": (json.dumps(coco()).encode("utf-32-be"), "found UTF-16 or UTF-32 text"),
    "gzip": (gzip.compress(_VALID), "found a gzip file: unpack it first"),
    "zip": (b"PK\x03\x04" + bytes(50), "found a zip file: unpack it first"),
    "comment": (b"// boxes\n" + _VALID, "at character 0, near '// boxes"),
    "in a long line": (
        b'["' + b"a" * 99 + b'" x' + b"b" * 99,
        f"at character 103, near '{'a' * 18}\" x{'b' * 19}'$",
    ),
    "single quotes": (_VALID.replace(b'"', b"'"), r"double quotes.* at character 1"),
    "nested deeply": (
        _VALID.replace(b"[[", b"[" * 100_000, 1).replace(b"]]", b"]" * 100_000, 1),
        "too deeply",
    ),
    # Other formats
    "CSV of DeepForest": (
        b"image_path,xmin,ymin,xmax,ymax,label\na.jpg,1,2,3,4,Tree\n",
        f"found a CSV file{_HOW}",
    ),
    "YOLO": (b"0 0.5 0.5 0.1 0.2\n1 0.1 0.2 0.1 0.1\n", f"a YOLO label file{_HOW}"),
    "one line of YOLO polygons": (b"3 .5 .5 1e-1 .2 .3 .4", f"a YOLO label file{_HOW}"),
    "Pascal VOC": (
        b'<?xml version="1.0"?>\n<annotation></annotation>',
        f"found XML, such as .*VOC.*{_HOW}",
    ),
    # JSON, but not COCO annotations
    "a list of results": (
        json.dumps([{"image_id": 7, "bbox": [1, 2, 3, 4], "score": 0.5}]).encode(),
        "expected an object with `images` and `annotations`, found a list, such as detections",
    ),
    "null": (b"null", "expected an object with `images` .* found None"),
    "another object": (
        b'{"type": "FeatureCollection"}',
        r"expected a list of `images`, found only \['type'\]",
    ),
    "no annotations": (_dump(annotations=None), "expected a list of `annotations`"),
    "images by name": (_dump(images={"a.jpg": {}}), r"list of `images`, found \{'a.jpg'"),
    "no images": (_dump(images=[]), r"image_id 7 in annotations\[0\], no images"),
    # Images
    "image without id": (_images(id=None), r"images\[1\]: expected .* id, found None"),
    "image is null": (_dump(images=[None]), r"images\[0\]: expected .* id, found None"),
    "no width": (_images(width=None), r"images\[1\] \(id 3\): .* height 200 and no width"),
    "negative height": (
        _images(height=-200),
        r"images\[1\] \(id 3\): .* height -200 and width 100",
    ),
    **{
        f"width {width!r}": (
            _images(width=width),
            rf"images\[1\] \(id 3\): .* height 200 and width {width!r}",
        )
        for width in (0, -1, "100", 100.5, float("nan"), 10**12, 10**30)
    },
    "duplicate image ids": (_images(id=7), r"images\[1\].*found 7.* images\[0\]"),
    "the same id as a float": (_images(id=7.0), r"images\[1\].*found 7.* images\[0\]"),
    "no annotation finds an image": (
        _VALID.replace(b'"image_id": 7', b'"image_id": "7"').replace(
            b'"image_id": 3', b'"image_id": "3"'
        ),
        r"on the images of the file.*image_id '7' in annotations\[0\], id 7 in images\[0\]",
    ),
    # Nothing left to count
    "no boxes": (_dump(annotations=[]), "found none in 2 images"),
    "only crowds": (
        _dump(annotations=[annotation(iscrowd=1)]),
        r"found none in 2 images; left out were 1 crowd$",
    ),
    "only broken boxes": (
        _dump(annotations=[annotation(bbox=[]), annotation(bbox=[]), annotation(bbox=[5])]),
        r"found none in 2 images; left out were 2 no box, 1 not four finite numbers",
    ),
}
