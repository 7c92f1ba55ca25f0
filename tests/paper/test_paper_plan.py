"""The plan: the paper's regime in numbers, its order, and going on elsewhere."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

pytest.importorskip("lightning")

from benchmarks.paper import plan, results
from benchmarks.paper.train import run
from tests.paper.runs import options

SMALL = {
    "steps": 2, "lr": 0.01, "backbone": "small", "crop": 32, "size": "64 96",
    "checkpoint-every": 250, "precision": "32-true",
}  # fmt: skip


def words(data: Path, out: Path, minutes: float) -> list[str]:
    """A plan of seconds."""
    given = options(data, out / "runs", **SMALL, results=out / "plan.jsonl")
    return ["--minutes", str(minutes), "--out", str(out), *given]


def in_this_process(configs, execution, jobs, deadline):
    """What `sweep` does, without its processes."""
    for config in configs:
        if time.time() < deadline:
            run(config, execution, deadline)
    return 0


def test_the_regime_is_the_papers(monkeypatch, tmp_path):
    monkeypatch.setenv("ALPHAFPN_DATA", str(tmp_path))
    base, execution, _ = plan.parse([])
    assert base.train_json == str(tmp_path / "tinyperson640" / "train.json")
    assert base.steps * base.batch == pytest.approx(2 * 19_236, abs=base.batch)
    assert base.lr / base.batch == pytest.approx(0.005 / 2)
    assert base.warmup / base.steps == pytest.approx(500 / 19_236, rel=0.02)
    assert base.crop**2 == pytest.approx(640 * 512, rel=0.02)
    assert (base.optimizer, base.detector, base.channels) == ("sgd", "retinanet", 256)
    assert execution.results == "runs/plan/plan.jsonl"
    smaller, _, _ = plan.parse(["--batch", "4", "--optimizer", "adamw"])
    assert (smaller.steps, smaller.lr) == (9618, pytest.approx(0.01))


def test_without_data_it_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.delenv("ALPHAFPN_DATA", raising=False)
    with pytest.raises(SystemExit):
        plan.parse([])
    assert "ALPHAFPN_DATA" in capsys.readouterr().err


def test_pairs_with_sgd_come_first_and_all_runs_differ(data, tmp_path):
    base, _, _ = plan.parse(words(data, tmp_path, 0))
    planned = list(plan.runs(base, 0.02))
    assert len({config.key() for config in planned}) == len(planned)
    first = planned[:4]
    assert [(c.alpha, c.start, c.optimizer, c.seed) for c in first] == [
        ("1", "", "sgd", 0), ("s-alpha", "", "sgd", 0), ("0.5", "", "sgd", 0),
        ("1", "s-alpha", "sgd", 0),
    ]  # fmt: skip
    assert [c.seed for c in planned[:16]] == [seed for seed in range(4) for _ in range(4)]
    assert {c.optimizer for c in planned[16:32]} == {"adamw"}
    assert {c.lr for c in planned if c.optimizer == "sgd"} == {0.02}
    assert all(config.seed != plan.pilots(base)[0].seed for config in planned)


def test_the_rate_is_that_of_the_best_pilot_that_did_not_diverge(data, tmp_path):
    base, _, _ = plan.parse(words(data, tmp_path, 0))
    first = plan.pilots(base)
    assert [config.lr for config in first] == [0.01, 0.005, 0.0025]

    def records(*outcomes):
        return [
            {"key": c.key(), "diverged_at": at, "figures": {"AP50_tiny": figure}}
            for c, (at, figure) in zip(first, outcomes, strict=False)
        ]

    assert plan.best_rate(first, records((None, 0.1), (None, 0.2))) is None
    assert plan.best_rate(first, records((3, 0.0), (None, 0.1), (None, 0.2))) == 0.0025
    assert plan.best_rate(first, records((None, 0.3), (None, 0.1), (None, 0.2))) == 0.01
    assert plan.best_rate(first, records((3, 0.0), (4, 0.0), (5, 0.0))) == 0.0025


def test_it_stops_in_time_and_goes_on_elsewhere(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "_CONSTANTS", ())
    monkeypatch.setattr(plan, "_SEEDS", 1)
    monkeypatch.setattr(plan, "_ROUNDS", 1)
    monkeypatch.setattr(plan, "sweep", in_this_process)
    here, there = tmp_path / "here", tmp_path / "there"
    assert plan.main(words(data, here, 0)) == 0
    assert "the rest waits" in capsys.readouterr().err
    assert results.read([here / "plan.jsonl"]) == []

    assert plan.main(words(data, here, 10)) == 0
    done = results.read([here / "plan.jsonl"])
    assert len(done) == 3 + 4 + 4
    printed = capsys.readouterr().out
    assert "adamw" in printed
    assert "S-alpha" in printed

    # Another machine, with all but the last two records, and nothing else.
    there.mkdir()
    lines = (here / "plan.jsonl").read_text().splitlines(keepends=True)
    (there / "plan.jsonl").write_text("".join(lines[:-2]))
    shutil.rmtree(here)
    assert plan.main(words(data, there, 10)) == 0
    again = results.read([there / "plan.jsonl"])
    assert [r["key"] for r in again] == [r["key"] for r in done]
    assert [r["figures"] for r in again] == [r["figures"] for r in done]
