"""The demo: what it reports, and what it leaves on the disk."""

from __future__ import annotations

import builtins
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alphafpn.demo import MEASURE, Settings, run, run_demo
from alphafpn.demo.scenes import SIDE, Scene
from alphafpn.demo.training import ESTIMATED, FIRST, ROWS

LITTLE = Settings(train=6, val=3, steps=1, seeds=(0, 1), processes=1)
FEWER = Settings(train=5, val=2, steps=1, seeds=(0,), processes=1)
ROOT = Path(__file__).resolve().parents[2]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# The outcome


def test_all_rows_are_reported_for_each_seed(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    random_state = torch.get_rng_state()
    outcome = run_demo(out, settings=LITTLE)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert set(contents(out)) == {"demo.png", "outcome.json"}
    assert json.loads((out / "outcome.json").read_text()) == outcome
    with Image.open(out / "demo.png") as picture:
        assert picture.format == "PNG"

    assert tuple(outcome["results"]) == ROWS["results"]
    assert tuple(outcome["far"]) == ROWS["far"]
    for family in ("results", "far"):
        for entries in outcome[family].values():
            assert [entry["seed"] for entry in entries] == [0, 1]
            assert all(0 <= entry[MEASURE] <= 1 for entry in entries)
        losses = {row: entries[0]["loss"] for row, entries in outcome[family].items()}
        # After one step the only loss is that of the first function.
        assert losses.pop(FIRST) == pytest.approx(losses[ESTIMATED], rel=1e-4)
        assert len({round(loss, 5) for loss in losses.values()}) == len(losses)

    best = next(row for row in outcome["comparison"] if row["best"])
    assert best["finer_level"]
    assert best["reached"] > outcome["comparison"][0]["reached"] + 0.3
    said = capsys.readouterr().out
    assert outcome["findings"][0] in said
    assert outcome["note"] in said
    assert all(re.search(f"^{row} .*%", said, re.MULTILINE) for row in ROWS["results"])


def test_own_images_become_scenes_of_tiny_objects(own, tmp_path, quick):
    images, path, _ = own
    outcome = run_demo(tmp_path / "out", images, path, settings=FEWER)
    assert outcome["data"]["scale"] == 0.25
    assert outcome["data"]["train_scenes"] == FEWER.train
    assert tuple(outcome["results"]) == ROWS["results"]
    assert "far" not in outcome
    assert "far:" not in outcome["note"]


# What is left behind


def test_a_second_run_replaces_its_own_files_and_no_others(tmp_path, quick, monkeypatch):
    first = run_demo(tmp_path, settings=FEWER)
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "outcome.json").write_text("damaged")
    second = run_demo(tmp_path, settings=FEWER)
    assert second["results"] == first["results"]
    after = contents(tmp_path)
    assert json.loads(after["outcome.json"]) == second
    assert after | {"outcome.json": None} == {
        "mine.txt": b"mine", "demo.png": b"picture", "outcome.json": None
    }  # fmt: skip

    def full(path, content):
        if path.name == "outcome.json":
            raise OSError("no space left")
        return write(path, content)

    write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        run_demo(tmp_path, settings=FEWER)
    assert contents(tmp_path) == after
    assert all(path.is_file() for path in tmp_path.iterdir())


SCRIPT = """
import signal
import sys
from pathlib import Path
from alphafpn.demo import Settings, run_demo

if __name__ == "__main__":
    # A shell may have started the tests with interrupts ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_demo(Path(sys.argv[1]), settings=Settings(train=6, val=3, steps=8, processes=1))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_leaves_the_earlier_outcome_and_no_process(tmp_path, how):
    out = tmp_path / "out"
    out.mkdir()
    (out / "outcome.json").write_text("earlier")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, str(script), str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as other:
        said = b""
        while not re.search(rb" [1-9]\d*/20 ", said):  # trainings that are done
            found = os.read(other.stderr.fileno(), 4096)
            assert found, said.decode()
            said += found
        other.send_signal(how)  # to the first process alone
        # It ends when the last process that writes there has ended.
        said = other.stderr.read()
    assert said.count(b"Traceback") == (how == signal.SIGINT)
    assert contents(out) == {"outcome.json": b"earlier"}


# Mistakes


def image(**changes):
    return lambda data: data["images"][5].update(changes)


def one_picture_smaller(data):
    for entry in data["images"]:
        entry["width"] = 700
    for annotation in data["annotations"]:
        annotation["bbox"][0] = 640


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (image(file_name=None), ValueError, r"own\.json: image .*expected a file_name"),
        (
            lambda data: data.update(annotations=data["annotations"][:9]),
            ValueError,
            r"own\.json: expected at least 2 images with objects, found 1",
        ),
        (image(file_name="a/missing.jpg"), FileNotFoundError, r"missing\.jpg"),
        (one_picture_smaller, ValueError, r"\.jpg: expected at least 700 x .*found 600 x 400"),
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
    large = Scene(np.zeros((SIDE, SIDE, 3), np.uint8), np.array([[0, 0, 60, 60]], np.float32))
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
