"""Lightning: detectors adapt, train and resume in a LightningModule, which stands for them."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from alphafpn import compare_anchors, estimate_alpha_for
from alphafpn.adapt import adapt_detector
from alphafpn.pyramid import AttentionAlpha, LearnableAlpha, alpha_parameters
from alphafpn.surgery import patch_detector
from tests.detectors import make_batch, make_detector, make_fcos, make_retinanet
from tests.test_adapt import make_retinanet as make_adaptable

lightning = pytest.importorskip("lightning")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    # Each batch is the same, so that the order of the data does not matter.
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint"),
]
FACTORS = [0.5, 0.25]


class Module(lightning.LightningModule):
    def __init__(self, alpha, adapted=False):
        super().__init__()
        if isinstance(alpha, list):  # what a checkpoint with `weights_only` holds
            self.save_hyperparameters({"alpha": alpha})
        self.detector = make_detector(make_adaptable if adapted else make_retinanet)
        if adapted:
            # The call is in the script, as a checkpoint knows no anchors.
            assert adapt_detector(self, 0.5, finer_level=True) is self
        patch_detector(self, alpha)

    def training_step(self, batch, index):
        torch.manual_seed(index)
        losses = self.detector(*batch)
        if hasattr(self.detector.backbone.fpn, "alpha"):
            factors = enumerate(self.detector.backbone.fpn.alpha.detach())
            self.log_dict({f"alpha/{i}": value for i, value in factors})
        return sum(losses.values())

    def configure_optimizers(self):
        factors = alpha_parameters(self)
        others = set(self.parameters()) - set(factors)
        return torch.optim.AdamW(
            [
                {"params": [p for p in self.parameters() if p in others]},
                {"params": factors, "lr": 1e-2, "weight_decay": 0.0},
            ],
            1e-3,
        )


def fit(path, steps, module, **options):
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        default_root_dir=path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([make_batch()] * 4, batch_size=None), **options)
    return trainer


@pytest.mark.parametrize(
    ("alpha", "adapted"),
    [
        (FACTORS, False),
        (LearnableAlpha(FACTORS), False),
        (AttentionAlpha(FACTORS), False),
        ([0.5, 0.4, 0.3], True),
    ],
)
def test_resumes_as_if_never_stopped(tmp_path, alpha, adapted):
    whole, half, resumed, start = (Module(alpha, adapted) for _ in range(4))
    trainer = fit(tmp_path, 4, whole)
    if alpha == FACTORS:
        logged = [float(trainer.callback_metrics[f"alpha/{i}"]) for i in range(2)]
        assert logged == FACTORS

    fit(tmp_path, 2, half).save_checkpoint(tmp_path / "half.ckpt")
    fit(tmp_path, 4, resumed, ckpt_path=tmp_path / "half.ckpt")
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    new = "detector.backbone.fpn.inner_blocks.0.0.weight"
    assert not torch.equal(start.state_dict()[new], whole.state_dict()[new])
    for found, parameter in zip(alpha_parameters(resumed), alpha_parameters(start), strict=True):
        assert not torch.equal(found, parameter)


def test_factors_as_a_list_are_a_hyperparameter_that_loads(tmp_path):
    fit(tmp_path, 1, Module(FACTORS)).save_checkpoint(tmp_path / "last.ckpt")
    loaded = Module.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.hparams.alpha == FACTORS
    assert loaded.detector.backbone.fpn.alpha.tolist() == FACTORS


def test_a_module_stands_for_the_one_detector_in_it():
    items = [((64, 64), [[4.0, 4, 14, 16], [20, 20, 52, 50]])]
    module = Module(FACTORS)
    assert estimate_alpha_for(module, items) == estimate_alpha_for(module.detector, items)
    found, expected = (compare_anchors(model, items) for model in (module, module.detector))
    assert found.to_list() == expected.to_list()
    module.teacher = make_detector(make_fcos)
    for call in (estimate_alpha_for, compare_anchors):
        with pytest.raises(TypeError, match=r"detector.*teacher"):
            call(module, items)
    with pytest.raises(TypeError, match=r"detector.*teacher"):
        adapt_detector(module, 0.5)
