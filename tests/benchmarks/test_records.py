"""Records can be compressed, and a run that another process does is left to it."""

from __future__ import annotations

import gzip
import json
import math

from benchmarks import records


def test_compressed_files_are_read_as_plain_ones(tmp_path):
    path, packed = tmp_path / "results.jsonl", tmp_path / "packed.jsonl.gz"
    records.append(path, {"key": "a", "loss": [math.nan, 1.0]})
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert records.read([packed]) == [{"key": "a", "loss": [None, 1.0]}]


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
