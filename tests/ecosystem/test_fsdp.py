"""FSDP2 (`fully_shard`) on whole detectors, in two processes with gloo on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from alphafpn.gradients import gradient_shares
from alphafpn.pyramid import AttentionAlpha, LearnableAlpha, alpha_parameters
from alphafpn.surgery import patch_detector
from tests.detectors import make_batch, make_detector, make_fcos

KINDS = [[0.5, 0.25], LearnableAlpha([0.5, 0.25]), AttentionAlpha([0.5, 0.25])]


def make_model(alpha) -> nn.Module:
    """Nothing random and nothing from the batch as a whole, so that two halves make one batch."""
    model = make_detector(make_fcos, alpha)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Dropout):
            module.eval()
    return model


def train(run, images, targets) -> nn.Module:
    """Two steps; the factors have a group of their own."""
    factors = alpha_parameters(run)
    others = [p for p in run.parameters() if p not in set(factors)]
    groups = [{"params": others}, {"params": factors, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, 1e-3, 0.9, weight_decay=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        for batch in zip(images, targets, strict=True):
            losses = run(*([part] for part in batch))
            (sum(losses.values()) / len(images)).backward()
        optimizer.step()
    return run


def work(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    images, targets = make_batch()
    mine = slice(rank, rank + 1)
    for alpha in KINDS:
        model = make_model(alpha)
        single = train(copy.deepcopy(model), images, targets)
        trained, start = alpha_parameters(single), alpha_parameters(make_model(alpha))
        for part in (model.backbone, model.head, model):
            fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
        train(model, images[mine], targets[mine])
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        if rank == 0:
            torch.testing.assert_close(state, dict(single.state_dict()), rtol=1e-4, atol=1e-6)
            if start:
                assert any(not torch.equal(*pair) for pair in zip(trained, start, strict=True))
            # The gathered checkpoint is an ordinary one.
            make_model(alpha).load_state_dict(state)
        with pytest.raises(TypeError, match="found a FSDPModule"):
            patch_detector(model, alpha)
        with pytest.raises(TypeError, match=r"found a FSDPModule .*before sharding"):
            gradient_shares(model, images, targets)
    dist.destroy_process_group()


@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason="this torch has no FSDP2 on a CPU, whose streams cannot record events",
)
def test_two_shards_train_as_one_model(tmp_path):
    torch.multiprocessing.spawn(work, ((tmp_path / "rendezvous").as_uri(),), nprocs=2)
