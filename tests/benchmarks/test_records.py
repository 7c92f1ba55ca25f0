"""Records survive killed writers, runs are done once, and pages are changed where they may be."""

from __future__ import annotations

import gzip
import json
import math

import pytest

from benchmarks import markdown, records


def test_records_survive_a_writer_that_was_killed(tmp_path):
    path = tmp_path / "results.jsonl"
    records.append(path, {"key": "a"})
    with path.open("ab") as file:
        file.write(b'{"key": "b", "fig')
    records.append(path, {"key": "c", "loss": [math.nan, 1.0]})
    records.append(path, {"key": "a", "again": True})
    expected = [{"key": "a"}, {"key": "c", "loss": [None, 1.0]}]
    assert records.read([path, tmp_path / "missing"]) == expected
    packed = tmp_path / "results.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert records.read([packed]) == expected


def test_runs_on_record_and_claimed_ones_are_not_done(tmp_path):
    file, todo, done = tmp_path / "runs.jsonl", [{"seed": seed} for seed in range(4)], []

    def run(config):
        done.append(config["seed"])
        # Another process, asked for the same, finds this run claimed and does the others.
        if config["seed"] == 1:
            records.work(todo[:3], run, file, tmp_path / "claims")
        return None if config["seed"] == 3 else {"figure": config["seed"]}

    records.work(todo, run, file, tmp_path / "claims", minutes=0)
    assert not file.exists()
    records.work(todo[:1], run, file, tmp_path / "claims")
    records.work(todo, run, file, tmp_path / "claims")
    assert done == [0, 1, 2, 3]
    found = records.read([file])
    assert [record["config"]["seed"] for record in found] == [0, 2, 1]
    assert found[0]["key"] == records.key_of({"seed": 0})
    assert not list((tmp_path / "claims").iterdir())


def test_only_what_is_between_the_marks_is_written(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A\n<!-- x: begin -->\nold\n<!-- x: end -->\nB\n")
    markdown.fill(page, "x", markdown.table(("a", "b"), [(1, 2)]))
    table = "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert page.read_text() == f"# A\n<!-- x: begin -->\n\n{table}\n\n<!-- x: end -->\nB\n"
    with pytest.raises(ValueError, match="y: begin"):
        markdown.fill(page, "y", "new")
    assert [file.name for file in tmp_path.iterdir()] == ["page.md"]


def test_the_records_that_are_kept_can_be_read():
    counts = {path.name: len(records.read([path])) for path in records.FOLDER.glob("*.jsonl.gz")}
    assert counts["factors.jsonl.gz"] == 2200
    assert all(counts.values())
    for path in records.FOLDER.glob("*.json.gz"):
        assert json.loads(gzip.decompress(path.read_bytes()))
