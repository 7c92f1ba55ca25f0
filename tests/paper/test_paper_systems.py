"""Data at several sizes, the sweep over all systems, and the tables that show both."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("lightning")

from benchmarks.paper import results, scenes, sizes, sweep, tables
from benchmarks.paper.config import DETECTORS, Config
from benchmarks.paper.data import Split
from benchmarks.paper.train import lacks_weights, run
from tests.paper.runs import options
from tests.paper.test_paper_report import record
from tests.paper.test_paper_runs import parsed

NAMES = [*DETECTORS]


@pytest.mark.parametrize(
    ("size", "expected"),
    [("full", (480, 640)), ("100", (100, 133)), ("800", (800, 1067)), ("/4", (120, 160))],
)
def test_a_size_is_that_of_the_shorter_side_or_a_divisor(size, expected):
    assert sizes.scaled_size(480, 640, size) == expected
    assert sizes.scaled_size(640, 480, size) == expected[::-1]


@pytest.mark.parametrize("size", ["", "half", "/0", "-3", "nan", "inf"])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(ValueError, match=r"size: expected full, pixels or a divisor"):
        sizes.scaled_size(480, 640, size)


def test_images_of_any_shape_keep_their_proportions_and_their_boxes(tmp_path):
    coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    for index, (width, height) in enumerate([(80, 40), (40, 90)]):
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[10:30, 10:34] = 250
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        coco["images"].append(
            {"id": index, "file_name": f"{index}.png", "width": width, "height": height}
        )
        coco["annotations"].append(
            {"id": index + 1, "image_id": index, "category_id": 1, "bbox": [10, 10, 24, 20]}
        )
    path = tmp_path / "all.json"
    path.write_text(json.dumps(coco))
    paths = (str(path), str(path), str(tmp_path))
    found = sizes.derive(*paths, "20", 1.0, tmp_path / "out")
    assert found["size"] == (45, 40)
    split = Split(Config(**found), found["train_json"], str(tmp_path / "runs"), erase=True)
    for image, boxes in zip(split.open(), split.boxes, strict=True):
        ((x1, y1, x2, y2),) = boxes.round().astype(int).tolist()
        assert (x1, y1, x2, y2) == (5, 5, 17, 15)
        assert image[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].min() > 200
        assert image[y2 + 2 : 20, :20].max() < 50
    assert (split.open()[0, 20:] == 114).all()
    assert (split.open()[1, :, 20:] == 114).all()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.png")}
    assert sizes.derive(*paths, "20", 1.0, tmp_path / "out") == found
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_a_smaller_share_is_a_part_of_a_larger_one(data, tmp_path):
    names = []
    for share in (0.2, 0.6, 1.0):
        paths = (str(data / "train.json"), str(data / "val.json"), str(data / "images"))
        found = sizes.derive(*paths, "/2", share, tmp_path)
        coco = json.loads((tmp_path / found["train_json"]).read_text())
        names.append({image["file_name"] for image in coco["images"]})
        assert {a["image_id"] for a in coco["annotations"]} == {i["id"] for i in coco["images"]}
        assert not any(image.get("dense") for image in coco["images"])
    assert [len(part) for part in names] == [1, 3, 5]
    assert names[0] < names[1] < names[2]
    with pytest.raises(ValueError, match="share"):
        sizes.derive(*paths, "/2", 0.0, tmp_path)


def test_factors_fall_as_images_shrink():
    rng = np.random.default_rng(0)
    coco = {"images": [], "annotations": []}
    for index in range(20):
        coco["images"].append({"id": index, "width": 640, "height": 480})
        for side in np.exp(rng.normal(np.log(40), 0.6, 10)).clip(4, 300):
            x, y = rng.uniform(0, 640 - side), rng.uniform(0, 480 - side)
            entry = {"image_id": index, "bbox": [x, y, side, side], "ignore": side > 250}
            coco["annotations"].append(entry)
    head, _, full, half, quarter = sizes.factors_table({"drawn": coco}, ("full", "240", "/4"))
    assert head.count("|") == full.count("|") == 9
    cells = [[part.strip() for part in row.split("|")[1:-1]] for row in (full, half, quarter)]
    assert [row[:2] for row in cells] == [["drawn", "480"], ["drawn", "240"], ["drawn", "120 (/4)"]]
    assert float(cells[0][3]) == pytest.approx(4 * float(cells[2][3]), rel=0.02)
    for column in range(4, 8):
        first = [float(row[column].split()[0]) for row in cells]
        assert first[0] > first[1] > first[2]


def test_the_sweep_of_sizes_pairs_factors_at_each_size(data, tmp_path):
    words = ["sizes", "--sizes", "96", "64", "--shares", "1", "0.5", "--grid", "0.3"]
    planned = sweep.plan(sweep.parse([*words, "--seeds", "2", *options(data, tmp_path, crop=96)]))
    assert len(planned) == 2 * 2 * 2 * 3
    assert [(c.size, c.crop, c.alpha) for c in planned[:7]] == [
        *(((96, 128), 96, alpha) for alpha in ("1", "s-alpha", "0.3")),
        *(((96, 128), 96, alpha) for alpha in ("1", "s-alpha", "0.3")),
        ((64, 85), 64, "1"),
    ]
    assert len({config.train_json for config in planned}) == 4


def test_each_detector_starts_from_its_own_scale_match_weights(data, tmp_path):
    words = ["table4", "--detectors", "fcos", "retinanet_p3p7", "--seeds", "1", "--pretrain-json"]
    changes = {"steps": 1, "backbone": "small", "channels": 32}
    words += [str(data / "train.json"), "--pretrain-size", "160", "192"]
    parsed_words = sweep.parse([*words, *options(data, tmp_path, **changes)])
    first = sweep.pretraining(parsed_words)
    assert [(c.scale_match, c.size, c.alpha) for c in first.values()] == [
        ("sm", (160, 192), "1")
    ] * 2
    execution = dataclasses.replace(parsed(options(data, tmp_path))[1], keep_weights=True)
    for config in first.values():
        run(config, execution)
    paths = {name: sweep.weights_path(config, execution) for name, config in first.items()}
    assert all(path.exists() for path in paths.values())
    parsed_words.inits = {name: str(path) for name, path in paths.items()}
    planned = sweep.plan(parsed_words)
    assert [(c.detector, c.init, c.alpha) for c in planned] == [
        (name, init, alpha)
        for name, path in paths.items()
        for init in ("", str(path))
        for alpha in ("1", "s-alpha")
    ]
    found = run(planned[-1], execution)
    assert len(found["alpha"]) == 2
    assert found["config"]["init"].startswith(first["retinanet_p3p7"].key())
    # Figures alone do not make up for weights that somebody deleted.
    paths["fcos"].unlink()
    assert lacks_weights(first["fcos"], execution)
    assert sweep.sweep([first["fcos"]], execution, jobs=1, deadline=0.0) == 0
    assert not paths["fcos"].exists()
    assert run(first["fcos"], execution)["config"]["detector"] == "fcos"
    assert paths["fcos"].exists()
    assert sweep.pretraining(sweep.parse(["table4", *options(data, tmp_path)])) == {}


def test_categories_are_judged_one_by_one(data, tmp_path):
    for name in ("train", "val"):
        coco = json.loads((data / f"{name}.json").read_text())
        coco["categories"] = [{"id": 7, "name": "thing"}, {"id": 9, "name": "other"}]
        for annotation in coco["annotations"][::3]:
            annotation["category_id"] = 9
        (tmp_path / f"{name}.json").write_text(json.dumps(coco))
    files = {f"{name}-json": tmp_path / f"{name}.json" for name in ("train", "val")}
    found = run(*parsed(options(data, tmp_path, **files, backbone="small", channels=32, steps=2)))
    assert found["counts"]["categories"] == {"thing": 20, "other": 5}
    assert {"AP50_all/thing", "AP50_all/other"} < set(found["figures"])
    whole = found["figures"]["AP50_all"]
    parts = [found["figures"][f"AP50_all/{name}"] for name in ("thing", "other")]
    assert whole == pytest.approx(np.mean(parts), abs=1e-4)


def test_scenes_are_written_as_data_sets(tmp_path):
    scenes.write(tmp_path, 64, {"train": 2, "val": 1})
    coco = json.loads((tmp_path / "train.json").read_text())
    assert [image["width"] for image in coco["images"]] == [64, 64]
    with Image.open(tmp_path / coco["images"][0]["file_name"]) as image:
        assert image.size == (64, 64)


def system(detector, alpha, seed, value, **changes):
    made = record(alpha, seed, value, detector=detector, train_json="t", val_json="v", **changes)
    made["figures"] |= {f"{kind}{c}": value for kind in ("AP", "MR") for c in tables.COLUMNS}
    made["figures"]["AP50_all"] = value
    return made


def test_tables_3_and_4_set_our_figures_beside_the_published_ones():
    records = [
        system(detector, alpha, seed, 0.2 + 0.1 * seed, init=init)
        for detector in NAMES
        for alpha in ("1", "s-alpha")
        for init in ("", f"{detector} digest")
        for seed in (0, 1)
    ]
    records += [system(name, "1", 0, 0.9, scale_match="sm") for name in NAMES]
    lines = tables.tables34(records)
    ours = [line for line in lines if "here, 2 seeds" in line]
    assert len(ours) == 2 * len(NAMES) * 4
    assert all("25.00 ± 63.53" in line for line in ours)
    assert "90.00" not in "".join(lines).replace("90.00 ±", "")
    published = [line for line in lines if "authors'" in line]
    assert len(published) == 2 * len(tables.PUBLISHED)
    assert any(
        "Adaptive RetinaNet | ImageNet | S-alpha" in line and "48.34" in line for line in published
    )
    assert sum(line.startswith("| detector") for line in lines) == 2
    assert sum(" Scale Match |" in line for line in ours) == len(ours) / 2
    assert set(tables.NAMES) == set(DETECTORS)


def test_runs_that_diverged_are_told_of():
    records = [system(name, "1", seed, 0.2) for name in NAMES[:2] for seed in (0, 1)]
    records[0]["diverged_at"] = 3
    lines = tables.tables34(records)
    assert sum("here, 1 seeds, 1 diverged" in line for line in lines) == 2
    assert tables.tables34(records[:2]) == []


def test_the_range_over_factors_is_taken_seed_by_seed():
    values = {("1", 0): 0.1, ("s-alpha", 0): 0.3, ("1", 1): 0.5, ("s-alpha", 1): 0.4}
    records = []
    for side, shrunk in ((64, 0.5), (128, 1.0)):
        for (alpha, seed), value in values.items():
            made = system("retinanet", alpha, seed, shrunk * value, size=[side, side], crop=side)
            made["figures"] |= {"AP50_all/rare": value / 2, "AP50_all/common": value}
            made["counts"] |= {"categories": {"common": 50, "rare": 5}}
            records.append(made)
    # A seed that lacks a factor has no range.
    records.append({**records[0], "config": {**records[0]["config"], "seed": 2}})
    lines = tables.sizes(records)
    rows = [line for line in lines if " images (" in line and line.startswith("| ")]
    assert [row.split("|")[1].strip()[:7] for row in rows] == ["128x128", "64x64, "]
    large, small = ([part.strip() for part in row.split("|")[3:-1]] for row in rows)
    assert (large[0], large[-2], large[-1].split()[0]) == ("2", "5.00", "15.00")
    assert (small[0], small[-2], small[-1].split()[0]) == ("2", "2.50", "7.50")
    names = [
        line.split("|")[1].strip() for line in lines if line.startswith(("| rare", "| common"))
    ]
    assert names == ["rare: 5", "common: 50"] * 2


def test_only_what_is_between_the_marks_is_written(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A\n<!-- x: begin -->\nold\n<!-- x: end -->\nB\n")
    results.fill(page, "x", ["new"])
    assert page.read_text() == "# A\n<!-- x: begin -->\n\nnew\n\n<!-- x: end -->\nB\n"
    with pytest.raises(ValueError, match="y: begin"):
        results.fill(page, "y", ["new"])
    assert "new" in page.read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["page.md"]
