"""What a patched pyramid costs, in interleaved pairs with the stock one."""

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

from alphafpn import LearnableAlpha, fold_alpha, patch_detector
from benchmarks.pairs import interleave, spread

SIZES = {"512x640": (512, 640), "800x1088": (800, 1088)}
DETECTORS: dict[str, tuple[list[int], int, Callable[[], nn.Module]]] = {
    "RetinaNet": ([512, 1024, 2048], 8, lambda: LastLevelP6P7(2048, 256)),
    "Faster R-CNN": ([256, 512, 1024, 2048], 4, LastLevelMaxPool),
}
FIXED = [0.37, 0.39, 0.37]
# Time per case on a CPU; a GPU has hundreds of pairs long before.
SECONDS = 6.0


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
    "folded": lambda fpn, edges: fold_alpha(patch_detector(fpn, FIXED[:edges])),
}
CASES = [
    (kind, detector, size, mode, memory_format)
    for kind in KINDS
    for detector in DETECTORS
    for size in SIZES
    for mode in MODES
    for memory_format in FORMATS
    if not (kind == "folded" and mode != "forward")
    # The large size only where the bound is tight, to keep the run short.
    if size == "512x640" or (kind == "fixed" and memory_format == "contiguous")
]


@pytest.mark.parametrize(("kind", "detector", "size", "mode", "memory_format"), CASES)
def test_pyramid(
    benchmark: Any,
    record: Any,
    device: str,
    kind: str,
    detector: str,
    size: str,
    mode: str,
    memory_format: str,
) -> None:
    baseline = stock(detector).to(device, memory_format=FORMATS[memory_format])
    candidate = copy.deepcopy(baseline)
    KINDS[kind](candidate, len(baseline.inner_blocks) - 1)
    maps = features(detector, size, device, FORMATS[memory_format])
    run = MODES[mode]
    pairs = interleave(
        run(baseline, maps),
        run(candidate, maps),
        device=device,
        seconds=SECONDS if device == "cpu" else 1.5,
        least=12,
        most=100 if device == "cpu" else 400,
    )
    benchmark.pedantic(run(candidate, maps), rounds=1)
    record(f"pyramid/{kind}/{detector}/{size}/{mode}/{memory_format}", device, **pairs.summary())


@pytest.mark.parametrize("kind", ["stock", "fixed", "learnable"])
def test_train_step(benchmark: Any, record: Any, device: str, kind: str) -> None:
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

    baseline, candidate = make("stock"), make(kind)
    memory = {"saved_for_backward_ratio": saved_bytes(candidate) / saved_bytes(baseline)}
    if device == "cuda":
        memory["peak_memory_ratio"] = peak_bytes(candidate) / peak_bytes(baseline)
    pairs = interleave(baseline, candidate, device=device, seconds=20, least=12)
    benchmark.pedantic(candidate, rounds=1)
    record(f"train step/{kind}", device, **pairs.summary(), **memory)


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
    """The most that one step allocates on the GPU."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def test_folded_inference(benchmark: Any, record: Any, device: str) -> None:
    """A folded detector runs the stock graph."""
    model = torchvision.models.detection.retinanet_resnet50_fpn_v2(
        weights=None, weights_backbone=None, min_size=256, max_size=256
    )
    model = model.to(device).eval()
    folded = fold_alpha(patch_detector(copy.deepcopy(model), FIXED[:2]))
    assert [type(m) for m in folded.modules()] == [type(m) for m in model.modules()]
    image = [torch.rand(3, 256, 256, device=device)]

    def run(detector: nn.Module) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return detector(image)

        return call

    pairs = interleave(run(model), run(folded), device=device, seconds=8)
    times = spread(pairs.candidate)
    benchmark.pedantic(run(folded), rounds=1)
    record("inference/folded", device, **{**pairs.summary(), **times})
