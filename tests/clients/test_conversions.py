"""Other formats become COCO JSON or pairs of size and boxes, as docs/recipes.md shows."""

from __future__ import annotations

import pytest
from PIL import Image

from alphafpn.estimate.annotations import read_annotations

VOC = """<annotation><filename>{name}.png</filename><size><width>{width}</width>
<height>{height}</height><depth>3</depth></size>{objects}</annotation>"""
OBJECT = """<object><name>{name}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>
<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"""
# (height, width) and boxes `xyxy` with their classes. Pascal VOC counts pixels from 1, and the last
# one belongs to the box.
IMAGES = {
    "a": ((96, 128), [(8, 24, 40, 72, "boat"), (64, 0, 128, 96, "person")]),
    "b": ((64, 64), [(16, 16, 24, 32, "person")]),
}
SIZES = [list(size) for size, _ in IMAGES.values()]
BOXES = [list(box[:4]) for _, boxes in IMAGES.values() for box in boxes]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for name, ((height, width), _) in IMAGES.items():
        Image.new("RGB", (width, height)).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def write_yolo(folder):
    (folder / "data.yaml").write_text("names: [boat, person]\n")
    for name, ((height, width), boxes) in IMAGES.items():
        lines = (
            f"{['boat', 'person'].index(label)} {(x1 + x2) / 2 / width} {(y1 + y2) / 2 / height}"
            f" {(x2 - x1) / width} {(y2 - y1) / height}\n"
            for x1, y1, x2, y2, label in boxes
        )
        (folder / "labels" / f"{name}.txt").write_text("".join(lines))


def write_voc(folder):
    for name, ((height, width), boxes) in IMAGES.items():
        objects = "".join(
            OBJECT.format(name=label, x1=x1 + 1, y1=y1 + 1, x2=x2, y2=y2)
            for x1, y1, x2, y2, label in boxes
        )
        text = VOC.format(name=name, width=width, height=height, objects=objects)
        (folder / "labels" / f"{name}.xml").write_text(text)


@pytest.mark.parametrize("kind", ["yolo", "pascal_voc"])
def test_supervision_converts_yolo_and_pascal_voc(folder, kind):
    sv = pytest.importorskip("supervision")
    if kind == "yolo":
        write_yolo(folder)
        dataset = sv.DetectionDataset.from_yolo("images", "labels", "data.yaml")
    else:
        write_voc(folder)
        dataset = sv.DetectionDataset.from_pascal_voc("images", "labels")
    dataset.as_coco(annotations_path="train.json")
    pairs = ((image.shape[:2], detections.xyxy) for _, image, detections in dataset)
    for found in (read_annotations("train.json"), read_annotations(pairs)):
        assert found.image_sizes.tolist() == SIZES
        assert found.boxes.tolist() == BOXES
    with pytest.raises(TypeError, match=r"dataset\[0\]: expected \(\(height, width\), boxes\)"):
        read_annotations(dataset)
    with pytest.raises(ValueError, match=r"recipe 'Convert annotations'"):
        read_annotations(folder / "labels")
