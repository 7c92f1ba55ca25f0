"""The plan on TinyPerson: its data, its regime and order, what its rows are, and going on."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("faster_coco_eval")

from benchmarks.paper import plan
from benchmarks.paper.data import Batches, Split
from benchmarks.records import read
from benchmarks.training import Checkpoint, Interrupted, train


def words(data, out, *more):
    """A plan of seconds."""
    files = ["--train-json", data / "train.json", "--val-json", data / "val.json"]
    small = ["--backbone", "toy", "--channels", 16, "--size", 64, 96, "--crop", 64]
    small += ["--batch", 2, "--steps", 8, "--images", data / "images", "--out", out]
    return [str(word) for word in (*files, *small, *more)]


@pytest.fixture
def laboratory(data, tmp_path):
    return plan.Laboratory(plan.parse(words(data, tmp_path)))


def test_images_and_boxes_are_at_the_size_of_the_network(data, tmp_path):
    options = (data / "images", (240, 320), tmp_path)
    train = Split(data / "train.json", *options, erase=True)
    val = Split(data / "val.json", *options, erase=False)
    assert train.pixels.shape == (5, 240, 320, 3)  # the dense image is left out
    assert [len(boxes) for boxes in train.boxes] == [5] * 5  # one of six is to be ignored
    assert sum(a["ignore"] for a in val.coco["annotations"]) == 2
    for index, (ignored, *_) in enumerate(zip(train.coco["annotations"][::6], strict=True)):
        x, y, w, h = (round(v) for v in ignored["bbox"])
        inside = train.pixels[index, y + 2 : y + h - 2, x + 2 : x + w - 2].float()
        assert inside.std() < 90  # painted over with one colour, apart from objects on it
    for boxes, pixels in zip(val.boxes, val.pixels, strict=True):
        x1, y1, x2, y2 = boxes[-1].round().astype(int).tolist()
        assert pixels[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].min() > 150


def test_batches_follow_from_seed_and_step(data, tmp_path):
    split = Split(data / "train.json", data / "images", (120, 160), tmp_path, erase=True)
    batches = Batches(split, 64, 3, seed=1)
    pixels, boxes = batches.at(7, split.pixels)
    again, same = Batches(split, 64, 3, seed=1).at(7, split.pixels)
    assert torch.equal(pixels, again)
    assert all(torch.equal(a, b) for a, b in zip(boxes, same, strict=True))
    assert not torch.equal(pixels, Batches(split, 64, 3, seed=2).at(7, split.pixels)[0])
    assert pixels.shape == (3, 64, 64, 3)
    for image, found in zip(pixels, boxes, strict=True):
        for x1, y1, x2, y2 in found.round().int().tolist():
            assert 0 <= x1 < x2 <= 64
            assert 0 <= y1 < y2 <= 64
            if min(x2 - x1, y2 - y1) > 4:  # mirrored or not, boxes lie on their objects
                assert image[(y1 + y2) // 2, (x1 + x2) // 2].min() > 100
    counted = batches.items(6)
    assert [size for size, _ in counted] == [(64, 64)] * 6
    assert torch.equal(counted[4][1], batches.at(1, split.pixels)[1][1])


def test_the_regime_is_the_papers(data, tmp_path, capsys, monkeypatch):
    common = plan.base(plan.parse([*words(data, tmp_path), "--steps", "0", "--batch", "16"]))
    assert common["steps"] * 16 == pytest.approx(2 * 19_236, abs=16)
    assert common["warmup"] / common["steps"] == pytest.approx(500 / 19_236, rel=0.02)
    first = plan.pilots(common)
    assert max(config["lr"] for config in first) / 16 == pytest.approx(0.005 / 2)
    factors = [plan.rate_at(step, common) for step in (0, 500, 1300, 2300)]
    assert factors == pytest.approx([1 / 3, 1, 0.1, 0.01])
    monkeypatch.delenv("ALPHAFPN_DATA", raising=False)
    with pytest.raises(SystemExit):
        plan.parse([])
    assert "ALPHAFPN_DATA" in capsys.readouterr().err


def test_the_rows_that_tell_most_come_first(data, tmp_path):
    common = plan.base(plan.parse(words(data, tmp_path)))
    rates = {plan.STOCK: 1.0, plan.ADAPTED: 2.0, plan.PAPER: 3.0}
    planned = list(plan.runs(common, rates))
    assert [c["row"] for c in planned[:8]] == [
        "stock", "adapted", "adapted, S-alpha", "adapted, alpha = 0.5"
    ] * 2  # fmt: skip
    assert [c["seed"] for c in planned[:16]] == [seed for seed in range(4) for _ in range(4)]
    assert [c["lr"] for c in planned[:4]] == [1.0, 2.0, 2.0, 2.0]
    assert len({plan.key_of(config) for config in planned}) == len(planned)


def test_rates_are_those_of_the_best_pilots():
    def pilot(row, rate, figure, diverged=False):
        config = {"row": row, "lr": rate}
        return {"config": config, "AP50_tiny": figure, "diverged": diverged}

    tried = [pilot("stock", 4.0, None, True), pilot("stock", 2.0, 3.0), pilot("stock", 1.0, 2.0)]
    lost = [pilot("paper", rate, None, True) for rate in (4.0, 1.0)]
    assert plan.best_rates([*tried, *lost]) == {"stock": 2.0, "paper": 1.0}


@pytest.mark.parametrize("kind", ["retinanet", "fasterrcnn"])
def test_rows_differ_in_levels_anchors_and_factors_alone(laboratory, data, tmp_path, kind):
    common = {**plan.base(laboratory.options), "detector": kind, "seed": 3, "optimizer": "sgd"}
    made = {
        row: laboratory.prepared({**common, "row": row})
        for row in (*plan.FIRST_ROWS, *plan.PAPER_ROWS)
    }
    alpha = {row: counted["alpha"] for row, (_, counted) in made.items()}
    assert set(alpha["stock"]) == {1.0}
    assert set(alpha["adapted, alpha = 0.5"]) == {0.5}
    assert set(alpha["paper, first function"]) == {1.0}
    assert len(alpha["paper"]) == 3
    fit = made["adapted"][1]["fit"]
    assert len(alpha["adapted"]) == len(alpha["stock"]) + fit[1]
    assert fit[0] < 1  # the objects are smaller than the stock anchors
    weights = [made[row][0].state_dict() for row in plan.FIRST_ROWS[1:]]
    for other in weights[1:]:
        assert all(torch.equal(weights[0][k], v) for k, v in other.items() if "alpha" not in k)
    same = [made[row][0].state_dict() for row in ("paper", "paper, first function")]
    changed = {k for k, v in same[0].items() if not torch.equal(v, same[1][k])}
    assert changed
    assert all(".fpn.inner_blocks" in k or ".fpn.layer_blocks" in k for k in changed)


def test_an_interrupted_training_ends_as_an_uninterrupted_one(tmp_path):
    def trained(path, deadline=float("inf")):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

        def loss(step):
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
            return (model(x) - x.sum(1, keepdim=True)).square().mean()

        saved = Checkpoint(path, model, every=4, deadline=deadline)
        curve = train(loss, optimizer, range(100), 10, schedule=lambda s: 0.9**s, checkpoint=saved)
        return curve, [p.detach().clone() for p in model.parameters()]

    expected = trained(tmp_path / "never.pt")
    path = tmp_path / "state.pt"
    for _ in range(2):  # after 4 steps, and after 8
        with pytest.raises(Interrupted):
            trained(path, deadline=0)
    found = trained(path)
    assert found[0] == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


def test_a_training_that_diverges_stops():
    weight, seen = torch.nn.Parameter(torch.ones(1)), []

    def loss(batch):
        seen.append(batch)
        return (weight * (math.nan if len(seen) == 3 else 1.0)).sum()

    curve, diverged = train(loss, torch.optim.SGD([weight], 0.1), range(50), 10)
    assert diverged
    assert len(curve) == len(seen) == 3


def test_the_plan_goes_on_where_it_stopped(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "_SEEDS", 1)
    monkeypatch.setattr(plan, "_ROUNDS", 1)
    monkeypatch.setattr(plan, "_PILOT_RATES", (1.0,))
    monkeypatch.setattr(plan, "PAPER_ROWS", plan.PAPER_ROWS[:1])
    assert plan.main(words(data, tmp_path, "--minutes", "0")) == 3
    assert "pilots are not finished" in capsys.readouterr().err
    assert plan.main(words(data, tmp_path)) == 0
    records = read([tmp_path / "plan.jsonl"])
    assert len(records) == 3 + 4 + 1
    assert all(record["diverged"] or record["AP50_tiny"] is not None for record in records)
    before = (tmp_path / "plan.jsonl").read_bytes()
    assert plan.main(words(data, tmp_path)) == 0
    assert (tmp_path / "plan.jsonl").read_bytes() == before
    assert "| adapted, S-alpha | 1 |" in capsys.readouterr().out
