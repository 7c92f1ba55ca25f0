"""Patched pyramids in two processes, with gloo on the CPU: DDP and FSDP."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from alphafpn.pyramid import AttentionAlpha, LearnableAlpha, alpha_parameters
from alphafpn.surgery import patch_detector
from tests.detectors import make_batch, make_retinanet
from tests.pyramids import make_features, make_pyramid

KINDS = [
    0.367,
    LearnableAlpha(0.367),
    LearnableAlpha(0.367, shared=True),
    AttentionAlpha(0.367, reduction=1),
]

OLD = torch.__version__.startswith("2.6.")


def gradients(run, model: nn.Module, images, targets) -> dict[str, torch.Tensor]:
    model.zero_grad()
    sum(run(images, targets).values()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def check_ddp(alpha, rank: int) -> None:
    torch.manual_seed(0)
    single = patch_detector(make_retinanet().train(), alpha)
    single.backbone.body.eval()  # no statistics of the batch, no dropout
    for parameter in alpha_parameters(single):
        parameter.data.add_(0.1)
    model = copy.deepcopy(single)
    wrapped = DistributedDataParallel(model)
    assert len(alpha_parameters(wrapped)) == len(alpha_parameters(single))

    images, targets = make_batch()
    images[1] = images[0].flip(-1)  # images of one size are padded as each of them alone
    mine = slice(rank, rank + 1)
    expected = gradients(single, single, images, targets)
    for parameter in alpha_parameters(single):
        assert parameter.grad.any()
    # The second pass fails if the first left a parameter without its gradient.
    for _ in range(2):
        found = gradients(wrapped, model, images[mine], targets[mine])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)

    # Each forward pass broadcasts the buffers, which must not spoil those that went before; DDP of
    # old torch writes to them in place, whatever they belong to.
    if not OLD:
        first, second = wrapped(images[mine], targets[mine]), wrapped(images, targets)
        sum([*first.values(), *second.values()]).backward()

    with pytest.raises(TypeError, match=r"found a DistributedDataParallel .*; patch before"):
        patch_detector(wrapped, alpha)
    # Fixed factors may be ramped through the module that is wrapped.
    patch_detector(wrapped.module, 1.0 if alpha == KINDS[0] else alpha)
    found = gradients(wrapped, model, images[mine], targets[mine])
    expected = gradients(
        patch_detector(single, 1.0 if alpha == KINDS[0] else alpha), single, images, targets
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def check_fsdp(alpha) -> None:
    single = patch_detector(make_pyramid(), alpha)
    sharded = fully_shard(copy.deepcopy(single), mesh=init_device_mesh("cpu", (2,)))
    x = make_features()
    for fpn in (single, sharded):
        sum(p.square().sum() for p in fpn(x).values()).backward()
    for name, parameter in single.named_parameters():
        torch.testing.assert_close(sharded.get_parameter(name).grad.full_tensor(), parameter.grad)
    assert "alpha=[" in repr(sharded)
    with pytest.raises(TypeError, match=r"found a FSDPModule .*; patch before"):
        patch_detector(sharded, alpha)
    with pytest.raises(TypeError, match=r"found a FullyShardedDataParallel .*; patch before"):
        patch_detector(FullyShardedDataParallel(single, device_id=torch.device("cpu")), alpha)


def check_deferred(alpha) -> None:
    """Made on meta, sharded, then filled from a stock checkpoint."""
    expected, stock = patch_detector(make_pyramid(), alpha), make_pyramid()
    sharded = fully_shard(
        copy.deepcopy(expected).to("meta"), mesh=init_device_mesh("cpu", (2,))
    ).to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, strict=not hasattr(expected, "gates"))
    set_model_state_dict(sharded, stock.state_dict(), options=options)

    device = torch.device("cpu")
    wrapped = FullyShardedDataParallel(copy.deepcopy(expected).to("meta"), device_id=device)
    with FullyShardedDataParallel.summon_full_params(wrapped):
        wrapped.module.load_state_dict(stock.state_dict(), strict=False)
    for fpn in (sharded, wrapped):
        torch.testing.assert_close(fpn(make_features()), expected(make_features()))


def work(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    for alpha in KINDS:
        check_ddp(alpha, rank)
        # FSDP2 of old torch knows no CPU.
        if not OLD:
            check_fsdp(alpha)
    if not OLD:
        for alpha in (0.367, LearnableAlpha([0.1, 0.2, 0.3]), KINDS[-1]):
            check_deferred(alpha)
    dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path):
    torch.multiprocessing.spawn(work, ((tmp_path / "rendezvous").as_uri(),), nprocs=2)
