"""Trainings: what their rows start from, what they see, and what is reported of them."""

from __future__ import annotations

import pytest
import torch

from alphafpn import compare_anchors
from alphafpn.demo import training
from alphafpn.demo.detector import detector
from alphafpn.demo.scenes import SIDE, draw
from alphafpn.demo.training import (
    ADAPTED,
    ESTIMATED,
    FIRST,
    HALF,
    MEASURE,
    NONE,
    ROWS,
    STOCK,
    Task,
    as_images,
    rows,
    run,
    start,
)


@pytest.fixture(scope="module")
def task():
    scenes = draw(8, 0, far=False)
    boxes = [((SIDE, SIDE), torch.from_numpy(scene.boxes)) for scene in scenes]
    return Task(scenes, scenes[:4], compare_anchors(detector(), boxes).best)


def started(task, row):
    torch.manual_seed(0)
    return start(row, task.fit)


def test_rows_have_their_anchors_and_factors(task):
    alpha = list(task.fit.estimate)
    models = {row: started(task, row) for row in ROWS["results"]}
    sizes = {row: models[row].anchor_generator.sizes for row in ROWS["results"]}
    assert sizes.pop(STOCK) == ((32,), (64,), (128,), (256,))
    assert set(sizes.values()) == {task.fit.anchor_sizes}
    assert task.fit.anchor_sizes[0] < (16,)
    found = {row: getattr(m.backbone.fpn, "alpha", torch.ones(3)) for row, m in models.items()}
    expected = {STOCK: 1, ADAPTED: 1, HALF: 0.5, ESTIMATED: alpha, NONE: 0, FIRST: 1}
    for row, factors in expected.items():
        torch.testing.assert_close(found[row], torch.tensor(factors).float().expand(3))


def test_rows_start_from_the_same_weights_but_for_the_first_function(task):
    states = {row: started(task, row).state_dict() for row in ROWS["results"]}
    stock, adapted = states[STOCK], states[ADAPTED]
    assert sum(map(torch.numel, stock.values())) < sum(map(torch.numel, adapted.values()))
    body = [name for name in stock if "fpn" not in name]
    assert all(torch.equal(stock[name], adapted[name]) for name in body)
    for row in (HALF, ESTIMATED, NONE):
        assert all(
            torch.equal(tensor, adapted[name])
            for name, tensor in states[row].items()
            if not name.endswith("alpha")
        )

    def outputs(row):
        images = torch.stack(as_images(task.val))
        maps = started(task, row).eval().backbone(images)
        return torch.cat([level.flatten() for level in maps.values()])

    torch.testing.assert_close(outputs(FIRST), outputs(ESTIMATED))
    assert not torch.allclose(outputs(FIRST), outputs(ADAPTED), rtol=0.1)


def test_rows_see_the_same_batches(task, monkeypatch):
    seen = []

    def recording():
        model = detector()
        batches = []
        model.register_forward_pre_hook(
            lambda m, args: batches.append(torch.stack(args[0])) if m.training else None
        )
        seen.append(batches)
        return model

    monkeypatch.setattr(training, "detector", recording)
    for row in (STOCK, NONE):
        run(task, row, 0, 3)
    first, second = seen
    assert len(first) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_training_learns_and_repeats(task):
    (short, _), (again, _) = (run(task, ESTIMATED, 0, 1) for _ in range(2))
    assert short == again
    entry, found = run(task, ESTIMATED, 0, 50)
    assert entry["loss"] < 0.7 * short["loss"]
    assert found.shape[1] == 4
    assert 0 < entry[MEASURE] <= 1


def test_every_image_is_seen_once_before_any_is_twice():
    found = rows(5, 2, 0)
    seen = [row for _ in range(5) for row in next(found)]
    for part in (seen[:5], seen[5:]):
        assert sorted(row % 5 for row in part) == list(range(5))
    assert any(row >= 5 for row in seen)
    assert any(row < 5 for row in seen)
