"""Malformed COCO files: what a user's file may look like, and what the message has to say."""

from __future__ import annotations

import json
from typing import Any, NamedTuple


class Malformed(NamedTuple):
    """The bytes of a file, and a regular expression that the message about it matches."""

    content: bytes
    message: str


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


def _images(**second: Any) -> bytes:
    first = {"id": 7, "width": 640, "height": 480}
    changed = {"id": 3, "width": 100, "height": 200} | second
    changed = {key: value for key, value in changed.items() if value is not None}
    return json.dumps(coco(images=[first, changed])).encode()


def _second(**changes: Any) -> bytes:
    return json.dumps(coco(annotations=[annotation(id=11), annotation(**changes)])).encode()


def _bbox(text: str) -> bytes:
    return _second(bbox="HERE").replace(b'"HERE"', text.encode())


_VALID = json.dumps(coco()).encode()

MALFORMED: dict[str, Malformed] = {
    # Not JSON
    "0 bytes": Malformed(b"", "empty file"),
    "only whitespace": Malformed(b" \n", "truncated"),
    "truncated": Malformed(_VALID[:-50], r"truncated, near .*categories"),
    "truncated in a number": Malformed(_VALID[: _VALID.index(b"30.0") + 2], "truncated"),
    "trailing text": Malformed(_VALID + b"]", r"trailing characters \(byte \d+\), near"),
    "not JSON": Malformed(b"<html>Not found</html>", r"malformed.*\(byte 0\), near .*html"),
    "an image": Malformed(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", r"malformed.*\(byte 0\), near .*PNG"),
    "zeros": Malformed(bytes(100), r"malformed.*\(byte 0\)"),
    "UTF-16": Malformed(json.dumps(coco()).encode("utf-16"), r"malformed.*\(byte 0\)"),
    "byte order mark": Malformed(b"\xef\xbb\xbf" + _VALID, r"malformed.*\(byte 0\), near .*xef"),
    "not UTF-8": Malformed(
        _second(id="HERE").replace(b"HERE", b"B\xe4ume"), r"expected UTF-8, found .*B\\xe4ume"
    ),
    "comment": Malformed(b"// boxes\n" + _VALID, r"malformed.*\(byte 0\), near .*boxes"),
    "single quotes": Malformed(_VALID.replace(b'"', b"'"), r"malformed.*\(byte 1\)"),
    "NaN": Malformed(_bbox("[1, NaN, 3, 4]"), r"malformed.*\(byte \d+\), near .*NaN"),
    "Infinity": Malformed(_bbox("[1, 2, Infinity, 4]"), r"malformed.*near .*Infinity"),
    "nested deeply": Malformed(
        _second(segmentation="HERE").replace(b'"HERE"', b"[" * 100_000 + b"]" * 100_000),
        "nested too deeply",
    ),
    # JSON, but not COCO annotations
    "a list of results": Malformed(
        json.dumps([{"image_id": 7, "bbox": [1, 2, 3, 4], "score": 0.5}]).encode(),
        "Expected `object`, got `array`.*`images` and `annotations`",
    ),
    "null": Malformed(b"null", "Expected `object`, got `null`"),
    "another object": Malformed(
        b'{"type": "FeatureCollection"}', "missing required field `images`"
    ),
    "no annotations": Malformed(
        json.dumps(coco(annotations=None)).encode(), "missing required field `annotations`"
    ),
    "images by name": Malformed(
        json.dumps(coco(images={"a.jpg": {}})).encode(),
        r"Expected `array`, got `object` - at `\$\.images`",
    ),
    "no images": Malformed(json.dumps(coco(images=[])).encode(), "expected images.* empty list"),
    # Images
    "image without width": Malformed(
        _images(width=None), r"missing required field `width` - at `\$\.images\[1\]`"
    ),
    "image without id": Malformed(_images(id=None), r"field `id` - at `\$\.images\[1\]`"),
    "width 0": Malformed(_images(width=0), r"images\[1\] \(id 3\).* found \(200, 0\)"),
    "negative height": Malformed(_images(height=-200), r"images\[1\] \(id 3\).*\(-200, 100\)"),
    "width of a string": Malformed(
        _images(width="100"), r"Expected `int`, got `str` - at `\$\.images\[1\]\.width`"
    ),
    "width of a fraction": Malformed(
        _images(width=100.5), r"Expected `int`, got `float` - at `\$\.images\[1\]\.width`"
    ),
    "huge width": Malformed(_images(width=10**12), r"images\[1\] \(id 3\).*1000000000000\)"),
    "width beyond 64 bits": Malformed(_images(width=10**30), r"at `\$\.images\[1\]\.width`"),
    "duplicate image ids": Malformed(_images(id=7), r"images\[1\].*found 7.* images\[0\]"),
    "image id of a string": Malformed(
        _images(id="3"), r"Expected `int`, got `str` - at `\$\.images\[1\]\.id`"
    ),
    # Annotations
    "missing image": Malformed(
        _second(id=12, image_id=99), r"annotations\[1\] \(id 12\).*found 99"
    ),
    "image_id of a string": Malformed(
        _second(image_id="7"), r"Expected `int`, got `str` - at `\$\.annotations\[1\]\.image_id`"
    ),
    "image_id beyond 64 bits": Malformed(
        _second(image_id=10**30), r"at `\$\.annotations\[1\]\.image_id`"
    ),
    "no image_id": Malformed(
        _second(image_id=None), r"field `image_id` - at `\$\.annotations\[1\]`"
    ),
    "no bbox": Malformed(_second(bbox=None), r"field `bbox` - at `\$\.annotations\[1\]`"),
    "no category_id": Malformed(
        _second(category_id=None), r"field `category_id` - at `\$\.annotations\[1\]`"
    ),
    "annotation is null": Malformed(
        json.dumps(coco(annotations=[annotation(), None])).encode(),
        r"got `null` - at `\$\.annotations\[1\]`",
    ),
    "bbox of 3": Malformed(_bbox("[1, 2, 3]"), r"of length 4 - at `\$\.annotations\[1\]\.bbox`"),
    "bbox of 5": Malformed(_bbox("[1, 2, 3, 4, 5]"), r"length 4 - at `\$\.annotations\[1\]\.bbox`"),
    "empty bbox": Malformed(_bbox("[]"), r"of length 4 - at `\$\.annotations\[1\]\.bbox`"),
    "bbox of strings": Malformed(
        _bbox('[1, "2", 3, 4]'),
        r"Expected `float`, got `str` - at `\$\.annotations\[1\]\.bbox\[1\]`",
    ),
    "bbox with null": Malformed(
        _bbox("[1, 2, null, 4]"), r"got `null` - at `\$\.annotations\[1\]\.bbox\[2\]`"
    ),
    "bbox of an object": Malformed(
        _bbox('{"x": 1}'), r"Expected `array`, got `object` - at `\$\.annotations\[1\]\.bbox`"
    ),
    "1e999": Malformed(_bbox("[1, 2, 1e999, 4]"), r"out of range - at `\$\.annotations\[1\]\.bbox"),
    "400 digits": Malformed(
        _bbox(f"[1, 2, {'9' * 400}, 4]"), r"out of range - at `\$\.annotations\[1\]\.bbox"
    ),
    "beyond float32": Malformed(
        _second(id=12, bbox=[1, 2, 1e39, 4]), r"annotations\[1\] \(id 12\).*float32.* 1e\+39"
    ),
    "negative width": Malformed(
        _second(id=12, bbox=[1, 2, -3, 4]),
        r"annotations\[1\] \(id 12\).*no negative size.*\[1\.0, 2\.0, -3\.0, 4\.0\]",
    ),
    "negative height of a crowd": Malformed(
        _second(id=12, bbox=[1, 2, 3, -4], iscrowd=1), r"annotations\[1\] \(id 12\).*-4\.0"
    ),
    "iscrowd of a string": Malformed(
        _second(iscrowd="no"), r"got `str` - at `\$\.annotations\[1\]\.iscrowd`"
    ),
    # Nothing left to count
    "no boxes": Malformed(json.dumps(coco(annotations=[])).encode(), "found none in 2 images"),
    "only crowds": Malformed(
        json.dumps(coco(annotations=[annotation(iscrowd=1)])).encode(),
        r"found none in 2 images \(left out: 1 crowd\)",
    ),
}
