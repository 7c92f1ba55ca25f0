"""Optuna: the paper's brute force over factors (bf-alpha), as a grid on one detector."""

from __future__ import annotations

import pytest
import torch

from alphafpn.surgery import patch_detector
from tests.detectors import make_batch, make_detector, make_retinanet

optuna = pytest.importorskip("optuna")


def test_a_grid_finds_the_factors_that_made_the_target(tmp_path):
    """The objective is the distance to a pyramid with known factors."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    image = make_batch()[0][0][None]
    backbone = make_detector(make_retinanet).eval().backbone.requires_grad_(False)

    def maps(alpha):
        return torch.cat([p.flatten() for p in patch_detector(backbone, alpha)(image).values()])

    wanted = maps([0.5, 0.25])
    search = {"alpha_0": [0.25, 0.5, 1.0], "alpha_1": [0.25, 0.5, 1.0]}

    def objective(trial):
        alpha = [trial.suggest_categorical(name, values) for name, values in search.items()]
        return float((maps(alpha) - wanted).norm())

    study = optuna.create_study(
        sampler=optuna.samplers.GridSampler(search), storage=f"sqlite:///{tmp_path}/study.db"
    )
    study.optimize(objective)
    assert len(study.trials) == 9
    assert study.best_params == {"alpha_0": 0.5, "alpha_1": 0.25}
    assert study.best_value == 0
    assert sorted(trial.value for trial in study.trials)[1] > 1e-3
