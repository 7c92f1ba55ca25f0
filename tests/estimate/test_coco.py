from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Subset
from torchvision.datasets import CocoDetection

from alphafpn.estimate.annotations import read_annotations
from alphafpn.estimate.coco import decode
from tests.annotation_sets import (
    EXPECTED,
    assert_equals,
    coco_files,
    reference,
    write,
)
from tests.malformed import MALFORMED, annotation, coco


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
        assert found.boxes_per_image.tolist() == [2, 0]

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

    def test_no_garbage_is_looked_for_while_decoding(self, tmp_path: Path) -> None:
        path = write(tmp_path, coco(annotations=[annotation()] * 5000))
        phases: list[str] = []

        def note(phase: str, info: dict[str, int]) -> None:
            phases.append(phase)

        gc.callbacks.append(note)
        try:
            content = decode(path, "file")
            assert phases == []
        finally:
            gc.callbacks.remove(note)
        assert len(content.annotations) == 5000

    def test_an_id_may_be_repeated_more_than_once(self, tmp_path: Path) -> None:
        images = [{"id": n, "width": 9, "height": 9} for n in (4, 7, 7, 3, 7)]
        path = write(tmp_path, coco(images=images, annotations=[]))
        with pytest.raises(ValueError, match=r"images\[2\]: .* found 7, which images\[1\] has"):
            read_annotations(path)

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

    @pytest.mark.parametrize("at", [5, 30, 200])
    def test_broken_json_is_quoted_where_it_breaks(self, tmp_path: Path, at: int) -> None:
        content = b" " * at + bytes(range(ord("0"), ord("z")))
        path = tmp_path / "annotations.json"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="byte") as caught:
            read_annotations(path)
        byte = int(re.search(r"byte (\d+)", str(caught.value))[1])  # type: ignore[index]
        assert str(caught.value).endswith(f", near {content[max(0, byte - 20) : byte + 20]!r}")

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
        assert read_annotations(coco_detection).sizes.tolist() == [[25, 25]]
        coco_detection.ids = [20, 21]
        with pytest.raises(ValueError, match=r"CocoDetection: ids: .* 3 images, found 21"):
            read_annotations(coco_detection)

    def test_unknown_category(self, coco_detection: CocoDetection) -> None:
        with pytest.raises(ValueError, match=r"CocoDetection: expected .* among 1, 2, found 3"):
            read_annotations(coco_detection, category_ids=[1, 3])

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
