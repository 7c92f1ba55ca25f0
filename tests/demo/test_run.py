"""The demo: what it reports, and what it leaves on the disk."""

from __future__ import annotations

import builtins
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alphafpn.demo import BASELINE, MEASURE, Settings, run, run_demo
from alphafpn.demo.detector import DRAWN_RATIOS, DRAWN_SIZES, detector
from alphafpn.demo.scenes import Scene
from alphafpn.demo.training import ESTIMATED, FIRST, ROWS, Training, train_and_evaluate
from alphafpn.estimate.s_alpha import estimate_alpha_for

LITTLE = Settings(train=6, val=3, steps=1, seeds=(0, 1), processes=1)
FEWER = Settings(train=5, val=2, steps=1, seeds=(0,), processes=1)
FAMILIES = ("results", "near")
ROOT = Path(__file__).resolve().parents[2]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def coco(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo in its folder."""
    out = tmp_path_factory.mktemp("demo")
    random_state = torch.get_rng_state()
    outcome = run_demo(out, settings=LITTLE)
    assert torch.equal(torch.get_rng_state(), random_state)
    return out, outcome


# The outcome


def test_the_outcome_is_what_is_on_the_disk(finished):
    out, outcome = finished
    assert coco(out / "outcome.json") == outcome
    assert Image.open(out / "demo.png").format == "PNG"
    assert set(contents(out)) == {
        *(f"data/train/{i:04}.png" for i in range(LITTLE.train)),
        *(f"data/val/{i:04}.png" for i in range(LITTLE.val)),
        *(f"data/{family}{part}.json" for family in ("", "near_") for part in ("train", "val")),
        *("demo.png", "outcome.json", ".alphafpn-demo"),
    }


@pytest.mark.parametrize("prefix", ["", "near_"])
def test_the_files_are_a_data_set_with_the_factors_that_were_used(finished, prefix):
    out, outcome = finished
    model = detector(DRAWN_SIZES, DRAWN_RATIOS)
    estimate = estimate_alpha_for(model, out / "data" / f"{prefix}train.json")
    assert list(estimate.alpha) == outcome[f"{prefix}estimate"]["alpha"]
    assert list(estimate.counts) == outcome[f"{prefix}estimate"]["counts"]
    for entry in coco(out / "data" / f"{prefix}val.json")["images"]:
        image = Image.open(out / "data" / entry["file_name"])
        assert image.size == (entry["width"], entry["height"]) == (128, 128)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_rows_are_reported_for_each_seed(finished, family):
    _, outcome = finished
    results = outcome[family]
    assert tuple(results) == ROWS
    assert all([entry["seed"] for entry in entries] == [0, 1] for entries in results.values())
    losses = {row: entries[0]["last_loss"] for row, entries in results.items()}
    # After one step the only loss is that of the first function.
    assert losses.pop(FIRST) == pytest.approx(losses[ESTIMATED], rel=1e-4)
    assert len({round(loss, 5) for loss in losses.values()}) == 4
    for row, found in outcome["differences"][family].items():
        pairs = zip(results[row], results[BASELINE], strict=True)
        assert found == [pytest.approx(100 * (a[MEASURE] - b[MEASURE])) for a, b in pairs]


def test_the_words_say_what_is_not_shown(finished):
    _, outcome = finished
    assert len(outcome["findings"]) == 4
    assert outcome["note"].startswith("Not shown: two seeds rank no rows")
    assert "real images" in outcome["note"]


def test_the_folded_stock_detector_finds_the_same():
    task, _ = run._drawn((8, 4), far=False)
    settings = Settings(train=8, val=4, steps=40)
    trained = train_and_evaluate({"near": task}, settings, Training("near", ESTIMATED, 0))
    folding = run._folding(task, trained)
    assert folding["detections"] == sum(len(entry["boxes"]) for entry in trained.found) > 0
    assert folding["same"]
    assert folding["largest_difference_in_pixels"] < 1e-9
    assert folding["largest_difference_in_score"] < 1e-9


def test_detections_are_compared_whatever_their_order():
    boxes = torch.tensor([[0.0, 0, 8, 8], [20, 20, 30, 34]])
    found = [{"boxes": boxes, "scores": torch.tensor([0.9, 0.5])}]
    moved = [{"boxes": boxes.flip(0) + 1e-3, "scores": torch.tensor([0.5, 0.9])}]
    difference = run._difference(found, moved)
    assert difference["same"]
    assert difference["largest_difference_in_pixels"] == pytest.approx(1e-3, rel=1e-2)
    fewer = [{"boxes": boxes[:1], "scores": torch.tensor([0.9])}]
    assert run._difference(found, fewer)["without_partner"] == 1
    worse = [{"boxes": boxes, "scores": torch.tensor([0.9, 0.6])}]
    assert run._difference(found, worse)["without_partner"] == 2
    nothing = [{"boxes": boxes[:0], "scores": torch.zeros(0)}]
    assert run._difference(nothing, nothing)["same"]


# A user's own data


def test_own_images_become_scenes_of_tiny_objects(own, tmp_path, quick):
    images, path, _ = own
    outcome = run_demo(tmp_path / "out", images, path, settings=FEWER)
    assert outcome["data"]["scale"] == pytest.approx(0.25, rel=0.02)
    assert outcome["data"]["train_scenes"] == FEWER.train
    assert "near" not in outcome
    assert tuple(outcome["results"]) == ROWS
    assert "another one" in outcome["note"]
    for name in ("train", "val"):
        data = coco(tmp_path / "out" / "data" / f"{name}.json")
        assert {entry["category_id"] for entry in data["annotations"]} == {1}
        sizes = [math.sqrt(a["bbox"][2] * a["bbox"][3]) for a in data["annotations"]]
        assert np.median(sizes) == pytest.approx(10, rel=0.1)


# What is left behind


@pytest.fixture
def earlier(finished, tmp_path):
    """A copy of the folder."""
    return Path(shutil.copytree(finished[0], tmp_path / "out"))


def test_a_second_run_replaces_its_own_files_and_no_others(own, earlier, quick):
    (earlier / "data" / "mine.txt").write_text("mine")
    (earlier / "data" / "val.json").write_text("damaged")
    (earlier / ".alphafpn-demo-partial-of-a-killed-run").mkdir()
    images, path, _ = own
    outcome = run_demo(earlier, images, path, settings=FEWER)
    after = contents(earlier)
    assert after["data/mine.txt"] == b"mine"
    assert json.loads(after["outcome.json"]) == outcome
    assert len(json.loads(after["data/val.json"])["images"]) == FEWER.val
    assert set(after) == {
        *(f"data/train/{i:04}.png" for i in range(FEWER.train)),
        *(f"data/val/{i:04}.png" for i in range(FEWER.val)),
        *("data/train.json", "data/val.json", "data/mine.txt"),
        *("demo.png", "outcome.json", ".alphafpn-demo"),
    }
    assert {path.name for path in earlier.iterdir() if path.is_dir()} == {"data"}


@pytest.mark.parametrize("name", ["data", "demo.png", "outcome.json"])
def test_other_peoples_files_are_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("theirs")
    with pytest.raises(FileExistsError, match=f"{name}: not written by the demo"):
        run_demo(tmp_path, settings=FEWER)
    assert contents(tmp_path) == {name: b"theirs"}


SCRIPT = """
import sys
from pathlib import Path
from alphafpn.demo import Settings, run_demo

if __name__ == "__main__":
    run_demo(Path(sys.argv[1]), settings=Settings(train=6, val=3, steps=8, processes=1))
"""


def test_a_run_that_is_killed_leaves_the_earlier_outcome(finished, tmp_path):
    out, _ = finished
    before = contents(out)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, str(script), str(out)],
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as other:
        said = b""
        while not re.search(rb" [1-9]\d*/20 ", said):  # trainings that are done
            found = os.read(other.stderr.fileno(), 4096)
            assert found, said.decode()
            said += found
        other.kill()
        # It ends when the last process that writes there has ended.
        said += other.stderr.read()
    assert b"Traceback" not in said
    assert contents(out) == before


def test_a_disk_that_is_full_leaves_the_earlier_outcome(earlier, quick, monkeypatch):
    before = contents(earlier)
    real = Path.write_bytes

    def full(path, content):
        if path.name == "outcome.json":
            raise OSError("no space left")
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        run_demo(earlier, settings=FEWER)
    assert contents(earlier) == before
    assert {path.name for path in earlier.iterdir() if path.is_dir()} == {"data"}


# Mistakes


def without_names(data):
    for entry in data["images"]:
        del entry["file_name"]


def of_one_image(data):
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] == 10]


def negative(data):
    data["annotations"][4]["bbox"][2] = -1


def one_picture_missing(data):
    data["images"][5]["file_name"] = "a/missing.jpg"


def one_picture_smaller(data):
    for entry in data["images"]:
        entry["width"] = 700
    for annotation in data["annotations"]:
        annotation["bbox"][0] = 640


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (without_names, ValueError, r"own\.json: image .*expected a file_name"),
        (of_one_image, ValueError, r"own\.json: expected at least 2 images with objects, found 1"),
        (negative, ValueError, r"own\.json.*annotations\[4\]"),
        (one_picture_missing, FileNotFoundError, r"missing\.jpg"),
        (one_picture_smaller, ValueError, r"\.jpg: 600 x 400 pixels, expected at least 700"),
    ],
)
def test_mistakes_in_the_data_are_named_and_leave_nothing_behind(
    own, tmp_path, change, error, match
):
    images, path, data = own
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(error, match=match):
        run_demo(tmp_path / "out", images, path, settings=FEWER)
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_there(own, tmp_path):
    images, path, _ = own
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        run_demo(tmp_path / "out", images, tmp_path / "nothing.json")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run_demo(tmp_path / "out", tmp_path / "nowhere", path, settings=FEWER)
    with pytest.raises(ValueError, match="expected both or none"):
        run_demo(tmp_path / "out", images)
    assert not (tmp_path / "out").exists()


def test_without_tiny_objects_there_is_nothing_to_compare(tmp_path, monkeypatch):
    boxes = torch.tensor([[0.0, 0, 60, 60]])
    pixels = torch.zeros(3, 64, 64, dtype=torch.uint8)
    large = Scene(pixels, boxes, torch.ones(1, dtype=torch.int64))
    monkeypatch.setattr(run, "own_scenes", lambda *args: (1.0, [large], [large]))
    with pytest.raises(ValueError, match=r"large\.json: expected tiny objects"):
        run_demo(tmp_path / "out", tmp_path, tmp_path / "large.json", settings=FEWER)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["matplotlib", "PIL", "faster_coco_eval"])
def test_a_missing_extra_is_named_before_any_work(tmp_path, monkeypatch, module):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == module:
            raise ImportError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "alphafpn\[(demo|tiny)\]"'):
        run_demo(tmp_path / "out", settings=FEWER)
    assert not (tmp_path / "out").exists()
