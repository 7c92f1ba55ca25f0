"""Trainings: what their rows start from, and what they see."""

from __future__ import annotations

import pytest
import torch

from alphafpn.demo import training
from alphafpn.demo.detector import DRAWN_RATIOS, DRAWN_SIZES
from alphafpn.demo.scenes import Family, as_coco, draw
from alphafpn.demo.training import (
    ESTIMATED,
    FIRST,
    NONE,
    ROWS,
    Settings,
    Task,
    Training,
    as_images,
    as_results,
    rows,
    start_of,
    train_and_evaluate,
    train_detector,
)

S_ALPHA = [0.3, 0.4, 0.5]


@pytest.fixture(scope="module")
def task():
    scenes = draw(Family((0.4, 0.4, 0.4), far=False), 8, 0)
    truth = as_coco("val", (scene.marked() for scene in scenes[:2]))
    return Task(scenes, scenes[:2], truth, DRAWN_SIZES, DRAWN_RATIOS, S_ALPHA)


def started(task, row):
    torch.manual_seed(0)
    return start_of(task, row)


def output(model, task):
    features = model.backbone(torch.stack(as_images(task.val)))
    return torch.cat([level.flatten() for level in features.values()])


def test_rows_have_their_factors(task):
    found = {row: start_of(task, row).backbone.fpn.alpha.tolist() for row in ROWS}
    assert found.pop(ESTIMATED) == pytest.approx(S_ALPHA)
    assert found == {row: [1.0] * 3 for row in ("alpha = 1", FIRST)} | {
        "alpha = 0.5": [0.5] * 3,
        NONE: [0.0] * 3,
    }


def test_the_first_function_is_that_of_s_alpha(task):
    first, estimated, stock = (output(started(task, row), task) for row in (FIRST, *ROWS[1::-1]))
    torch.testing.assert_close(first, estimated)
    assert not torch.allclose(first, stock, rtol=0.1)


def test_rows_start_from_the_same_weights_and_see_the_same_batches(task, monkeypatch):
    seen = []
    real = training.detector

    def recording(*args):
        model = real(*args)
        weights = {name: t.clone() for name, t in model.state_dict().items()}
        batches = []
        model.register_forward_pre_hook(lambda m, args: batches.append(torch.stack(args[0])))
        seen.append((weights, batches))
        return model

    monkeypatch.setattr(training, "detector", recording)
    for row in ROWS:
        train_detector(task, row, 0, Settings(steps=3))
    (weights, batches), *others = seen
    assert len(batches) == 3
    for other_weights, other_batches in others:
        assert all(torch.equal(t, other_weights[name]) for name, t in weights.items())
        assert all(torch.equal(a, b) for a, b in zip(batches, other_batches, strict=True))


def test_a_training_learns_and_repeats(task):
    _, first = train_detector(task, ESTIMATED, 0, Settings(steps=1))
    _, last = train_detector(task, ESTIMATED, 0, Settings(steps=30))
    assert last < 0.8 * first
    one, two = (
        train_and_evaluate({"a": task}, Settings(steps=3), Training("a", FIRST, 1))
        for _ in range(2)
    )
    assert one.figures == two.figures
    assert one.last_loss == two.last_loss
    assert all(torch.equal(t, two.weights[name]) for name, t in one.weights.items())
    assert one.cpu_seconds > 0


def test_every_image_is_seen_once_before_any_is_twice():
    found = rows(5, 2, 0)
    seen = [row for _ in range(5) for row in next(found)]
    for part in (seen[:5], seen[5:]):
        assert sorted(row % 5 for row in part) == list(range(5))
    assert any(row >= 5 for row in seen)
    assert any(row < 5 for row in seen)


def test_detections_become_coco_results():
    boxes = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    found = {"boxes": boxes, "scores": torch.tensor([0.5]), "labels": torch.tensor([3])}
    nothing = {name: part[:0] for name, part in found.items()}
    expected = {"image_id": 1, "category_id": 3, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 0.5}
    assert as_results([nothing, found]) == [expected]
