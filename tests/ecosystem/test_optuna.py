"""Optuna: the paper's brute force over factors (bf-alpha), as a grid on one detector."""

from __future__ import annotations

import copy

import pytest
import torch

from alphafpn.surgery import patch_detector
from tests.detectors import make_batch, make_detector, make_retinanet

optuna = pytest.importorskip("optuna")


def test_a_grid_finds_the_factors_that_made_the_target(tmp_path):
    """The objective is the distance to a pyramid with known factors, after a step of training."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    images, targets = make_batch()
    model = make_detector(make_retinanet)
    start = copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())

    def train(alpha):
        model.load_state_dict({k: v for k, v in start.items() if "fpn.alpha" not in k})
        patch_detector(model, alpha).train()
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        torch.manual_seed(0)
        sum(model(images, targets).values()).backward()
        optimizer.step()
        model.zero_grad()
        with torch.no_grad():
            return torch.cat([p.flatten() for p in model.eval().backbone(images[0][None]).values()])

    wanted = train([0.5, 0.25])
    search = {"alpha_0": [0.25, 0.5, 1.0], "alpha_1": [0.25, 0.5, 1.0]}

    def objective(trial):
        alpha = [trial.suggest_categorical(name, values) for name, values in search.items()]
        assert model.backbone.fpn is fpn
        return float((train(alpha) - wanted).norm())

    fpn = model.backbone.fpn
    study = optuna.create_study(
        sampler=optuna.samplers.GridSampler(search), storage=f"sqlite:///{tmp_path}/study.db"
    )
    study.optimize(objective)
    assert len(study.trials) == 9
    assert study.best_params == {"alpha_0": 0.5, "alpha_1": 0.25}
    assert study.best_value == 0
    assert sorted(trial.value for trial in study.trials)[1] > 1e-3
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
