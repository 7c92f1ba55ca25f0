"""Lightning: patched detectors train in a LightningModule, and resume as if never stopped."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from alphafpn.pyramid import AttentionAlpha, LearnableAlpha, alpha_parameters
from alphafpn.surgery import fold_alpha, patch_detector
from tests.detectors import make_batch, make_detector, make_retinanet

lightning = pytest.importorskip("lightning")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    # Each batch is the same, so that the order of the data does not matter.
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint"),
]
FACTORS = [0.5, 0.25]


class Module(lightning.LightningModule):
    def __init__(self, alpha):
        super().__init__()
        self.detector = make_detector(make_retinanet, alpha)

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


def loader():
    return DataLoader([make_batch()] * 4, batch_size=None)


def make_trainer(path, steps):
    return lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        default_root_dir=path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.mark.parametrize("alpha", [FACTORS, LearnableAlpha(FACTORS), AttentionAlpha(FACTORS)])
def test_resumes_as_if_never_stopped(tmp_path, alpha):
    whole = Module(alpha)
    trainer = make_trainer(tmp_path, 4)
    trainer.fit(whole, loader())
    if not isinstance(alpha, AttentionAlpha):
        logged = [float(trainer.callback_metrics[f"alpha/{i}"]) for i in range(2)]
        assert logged == pytest.approx(FACTORS, abs=0.05)

    trainer = make_trainer(tmp_path, 2)
    trainer.fit(Module(alpha), loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Module(alpha)
    make_trainer(tmp_path, 4).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")

    assert list(resumed.state_dict()) == list(whole.state_dict())
    start = Module(alpha)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    for found, parameter in zip(alpha_parameters(resumed), alpha_parameters(start), strict=True):
        assert not torch.equal(found, parameter)


def test_what_was_trained_folds(tmp_path):
    module = Module(FACTORS)
    make_trainer(tmp_path, 1).fit(module, loader())
    detector = module.detector.eval()
    with torch.no_grad():
        patched = detector.backbone(make_batch()[0][0][None])
        folded = fold_alpha(detector).backbone(make_batch()[0][0][None])
    torch.testing.assert_close(folded, patched)
    with pytest.raises(TypeError, match="found only stock pyramids"):
        fold_alpha(module)
    assert patch_detector(module, FACTORS) is module


class Remembering(Module):
    def __init__(self, alpha):
        super().__init__(alpha)
        self.save_hyperparameters()


def test_factors_as_a_list_are_a_hyperparameter_that_loads(tmp_path):
    trainer = make_trainer(tmp_path, 1)
    trainer.fit(Remembering(FACTORS), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = Remembering.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.hparams.alpha == FACTORS
    assert loaded.detector.backbone.fpn.alpha.tolist() == FACTORS
