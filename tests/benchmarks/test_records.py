"""Records can be compressed, and a run that another process does is left to it."""

from __future__ import annotations

import gzip
import json
import math

from benchmarks import records


def test_a_record_is_written_once_and_a_broken_last_line_is_repaired(tmp_path):
    file, packed = tmp_path / "results.jsonl", tmp_path / "packed.jsonl.gz"
    records.append(file, {"key": "a", "value": [math.nan, 1.0]})
    file.write_bytes(file.read_bytes() + b'{"key":"b","val')  # a writer that was killed
    assert records.read([file]) == [{"key": "a", "value": [None, 1.0]}]
    records.append(file, {"key": "b", "value": 2})
    records.append(file, {"key": "a", "value": 3})
    packed.write_bytes(gzip.compress(file.read_bytes()))
    expected = [{"key": "a", "value": [None, 1.0]}, {"key": "b", "value": 2}]
    assert records.read([file]) == records.read([packed]) == expected
    assert records.read([tmp_path / "missing.jsonl"]) == []


def test_records_are_apart_by_what_their_configurations_say():
    found = [
        {"config": {"row": row, "rate": rate, "seed": seed}}
        for row, rate in (("a", 1), ("b", 1), ("a", 2))
        for seed in range(2)
    ]
    assert records.settings(found, ("row", "seed")) == [found[:4], found[4:]]
    assert records.by_seed(found[:4], "row") == {
        ("a",): {0: found[0], 1: found[1]},
        ("b",): {0: found[2], 1: found[3]},
    }


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


def test_the_records_that_are_kept_can_be_read():
    counts = {path.name: len(records.read([path])) for path in records.FOLDER.glob("*.jsonl.gz")}
    assert counts["factors.jsonl.gz"] == 2200
    assert all(counts.values())
    for path in records.FOLDER.glob("*.json.gz"):
        assert json.loads(gzip.decompress(path.read_bytes()))
