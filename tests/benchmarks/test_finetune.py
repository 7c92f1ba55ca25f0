"""The fine-tuning experiment: what its ways do to a detector, its records, and its tables."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest
import torch

pytest.importorskip("scipy")

from benchmarks import finetune
from benchmarks.clutter import Settings, as_tensors, drawn_scenes, small_detector
from benchmarks.finetune import JUMP, RAMP, RESCALE, STAY, Laboratory, Plan, change, run, table
from benchmarks.paper import results

TOY = Plan(
    Settings(side=64, train=4, val=2, steps=2, channels=8, batch=2),
    steps=4,
    ramp=2,
    rates=(("SGD", 1e-3),),
)
TARGET = [0.5, 0.4, 0.2]


def losses(model):
    ((image, boxes),) = as_tensors(list(drawn_scenes(1, 64, 0)))
    targets = [{"boxes": boxes.double(), "labels": torch.ones(len(boxes), dtype=torch.int64)}]
    return model([image.double()], targets)


def test_cluttered_scenes_stay_as_they_are():
    # The records of this experiment were made on scenes that are drawn like this one.
    ((pixels, marks),) = drawn_scenes(1, 128, 0)
    assert len(marks) == 15
    assert hashlib.sha256(pixels.tobytes()).hexdigest().startswith("fd9f9f9c0236c861")


@pytest.mark.parametrize(
    ("way", "same"), [(STAY, True), (RAMP, True), (RESCALE, True), (JUMP, False)]
)
def test_all_ways_but_to_jump_keep_the_outputs(way, same):
    torch.manual_seed(0)
    model = small_detector(TOY.pretraining, 1.0).double()
    expected = losses(model)
    change(model, way, [1.0] * 3 if way == STAY else TARGET)
    found = losses(model)
    assert all(torch.allclose(found[name], expected[name], rtol=1e-9) for name in found) is same
    alpha = TARGET if way in (JUMP, RESCALE) else [1.0] * 3
    torch.testing.assert_close(model.backbone.fpn.alpha.tolist(), alpha)


def test_runs_are_paired_and_none_is_repeated(tmp_path, monkeypatch):
    file = tmp_path / "results.jsonl"
    run(TOY, 1, file, tmp_path, minutes=0)
    assert not file.exists()
    run(TOY, 1, file, tmp_path)
    # An interrupted writer, and a run that is missing.
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
    run(TOY, 1, file, tmp_path)
    records = results.read([file])
    assert [record["config"] for record in records] == list(TOY.runs(0))
    assert json.loads(lines[-1]) | {"seconds": 0} == records[-1] | {"seconds": 0}
    monkeypatch.setattr(finetune, "Laboratory", None)
    run(TOY, 1, file, tmp_path)

    assert len({record["start"] for record in records}) == 1
    assert len({record["figures"]["before"] for record in records}) == 1
    stay, jump, ramp, rescaled, *others = records
    assert [record["config"]["way"] for record in (stay, jump, ramp, rescaled)] == [
        STAY, JUMP, RAMP, RESCALE
    ]  # fmt: skip
    for record in (jump, ramp, rescaled):
        assert record["alpha"] == pytest.approx(jump["alpha"])
    assert stay["alpha"] == [1.0] * 3
    for record in others:
        assert record["alpha"] == pytest.approx([0.2] * 3)
    # The same first batch, seen by the same function.
    assert ramp["loss"][0] == stay["loss"][0] != jump["loss"][0]


def test_what_diverges_stops_and_has_no_result(tmp_path):
    plan = dataclasses.replace(TOY, rates=(("SGD", 1e30),))
    laboratory = Laboratory(plan, tmp_path)
    record = results.finite(laboratory.run(next(plan.runs(0))))
    assert 0 < record["diverged_at"] < plan.steps
    assert "end" not in record["figures"]
    assert json.dumps(record, allow_nan=False)
    assert "| 1 | stay at 1 | 0 (1 diverged) |" in table([record])


def record(way, target, seed, end, **changes):
    figures = {"before": 0.4, "after": 0.1, "ramped": 0.2, "end": end}
    return {
        "config": {"optimizer": "SGD", "rate": 0.1, "way": way, "target": target, "seed": seed},
        "start": str(seed),
        "figures": figures,
        "diverged_at": None,
        "loss": [2.0, 1.5],
        **changes,
    }


def test_differences_are_paired():
    records = [
        *(record(STAY, "1", seed, 0.3 + 0.1 * seed) for seed in range(3)),
        *(record(JUMP, "0.2", seed, 0.2 + 0.1 * seed) for seed in range(3)),
        # The seeds differ by much, the pairs by 1, 2 and 3 points: 2 +- 4.303 * 1 / sqrt(3).
        *(record(RAMP, "0.2", seed, 0.21 + 0.11 * seed) for seed in range(3)),
    ]
    rows = [line.strip("| ").split(" | ") for line in table(records).splitlines()[4:]]
    assert rows[0][:3] + rows[0][6:] == ["1", STAY, "3", "40.0", "", "", "1.500"]
    assert rows[2] == [
        "0.2", RAMP, "3", "40.0", "10.0", "20.0", "32.0", "-8.0 ± 2.5", "+2.0 ± 2.5", "1.500"
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"seeds \[1\]"):
        table([*records, record(RESCALE, "0.2", 1, 0.5, start="other")])
