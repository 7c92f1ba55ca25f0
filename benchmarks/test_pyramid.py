"""What a patched pyramid costs, in turns with the stock one."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from alphafpn import LearnableAlpha, patch_detector
from benchmarks.pairs import Pairs, in_turns

SIZES = {"512x640": (512, 640), "800x1088": (800, 1088)}
DETECTORS: dict[str, tuple[list[int], int, Callable[[], nn.Module]]] = {
    "RetinaNet": ([512, 1024, 2048], 8, lambda: LastLevelP6P7(2048, 256)),
    "Faster R-CNN": ([256, 512, 1024, 2048], 4, LastLevelMaxPool),
}
FIXED = [0.37, 0.39, 0.37]
# Time of the rounds of one case on a CPU.
SECONDS = 12.0


def stock(detector: str) -> FeaturePyramidNetwork:
    torch.manual_seed(0)
    channels, _, extra = DETECTORS[detector]
    return FeaturePyramidNetwork(channels, 256, extra())


def features(detector: str, size: str, device: str, memory_format: Any) -> OrderedDict[str, Tensor]:
    channels, stride, _ = DETECTORS[detector]
    height, width = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    return OrderedDict(
        (
            str(i),
            torch.randn(1, c, height // (stride << i), width // (stride << i), generator=generator)
            .to(device, memory_format=memory_format)
            .requires_grad_(),
        )
        for i, c in enumerate(channels)
    )


def forward(fpn: nn.Module, maps: OrderedDict[str, Tensor]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return fpn(OrderedDict(maps))

    return run


def forward_backward(fpn: nn.Module, maps: OrderedDict[str, Tensor]) -> Callable[[], object]:
    def run() -> object:
        fpn.zero_grad()
        for feature in maps.values():
            feature.grad = None
        outputs = fpn(OrderedDict(maps))
        return sum(output.mean() for output in outputs.values()).backward()

    return run


MODES = {"forward": forward, "forward+backward": forward_backward}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
KINDS: dict[str, Callable[[nn.Module, int], object]] = {
    "stock": lambda fpn, edges: None,
    "fixed": lambda fpn, edges: patch_detector(fpn, FIXED[:edges]),
    "learnable": lambda fpn, edges: patch_detector(fpn, LearnableAlpha(FIXED[:edges])),
}


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("detector", DETECTORS)
def test_pyramid(
    benchmark: Any,
    record: Any,
    device: str,
    detector: str,
    size: str,
    mode: str,
    memory_format: str,
) -> None:
    """All kinds in the same rounds. A second stock pyramid shows what the machine adds."""
    baseline = stock(detector).to(device, memory_format=FORMATS[memory_format])
    maps = features(detector, size, device, FORMATS[memory_format])
    runs = [MODES[mode](baseline, maps)]
    for change in KINDS.values():
        candidate = copy.deepcopy(baseline)
        change(candidate, len(baseline.inner_blocks) - 1)
        runs.append(MODES[mode](candidate, maps))
    times = in_turns(
        runs,
        device=device,
        seconds=SECONDS if device == "cpu" else 5.0,
        least=6,
        most=100 if device == "cpu" else 400,
        warm_up=1 if device == "cpu" else 3,
    )
    benchmark.pedantic(runs[2], rounds=1)
    for kind, own in zip(KINDS, times[1:], strict=True):
        name = f"pyramid/{kind}/{detector}/{size}/{mode}/{memory_format}"
        record(name, device, **Pairs(times[0], own).summary())


def test_train_step(benchmark: Any, record: Any, device: str) -> None:
    """The whole step of a Faster R-CNN: losses, backward, SGD; and its peak memory on a GPU."""
    edge = 256 if device == "cpu" else 640
    images = [torch.rand(3, edge, edge, device=device) for _ in range(1 if device == "cpu" else 2)]
    boxes = torch.rand(8, 2, generator=torch.Generator().manual_seed(0)) * (edge - 60)
    target = {
        "boxes": torch.cat([boxes, boxes + 30], 1).to(device),
        "labels": torch.ones(8, dtype=torch.int64, device=device),
    }

    def make(kind: str) -> Callable[[], object]:
        torch.manual_seed(0)
        model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=2, min_size=edge, max_size=edge
        ).to(device)
        KINDS[kind](model, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

        def step() -> object:
            torch.manual_seed(1)
            optimizer.zero_grad()
            sum(model(images, [target] * len(images)).values()).backward()
            return optimizer.step()

        return step

    baseline = make("stock")
    steps = {kind: make(kind) for kind in ("stock", "fixed", "learnable")}
    memory = {
        kind: {"saved_for_backward_ratio": saved_bytes(step) / saved_bytes(baseline)}
        for kind, step in steps.items()
    }
    if device == "cuda":
        for kind, step in steps.items():
            memory[kind]["peak_memory_ratio"] = peak_bytes(step) / peak_bytes(baseline)
    times = in_turns([baseline, *steps.values()], device=device, seconds=40, warm_up=1)
    benchmark.pedantic(steps["fixed"], rounds=1)
    for kind, own in zip(steps, times[1:], strict=True):
        record(f"train step/{kind}", device, **Pairs(times[0], own).summary(), **memory[kind])


def saved_bytes(step: Callable[[], object]) -> int:
    """What the graph of one step keeps for its backward pass, each storage once."""
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    step()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        step()
    return sum(saved.values())


def peak_bytes(step: Callable[[], object]) -> int:
    """The most that one step allocates on the GPU, beyond what is there before it."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
