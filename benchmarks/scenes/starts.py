"""What a run starts from: its factors, its first function, its backbone."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from alphafpn import AlphaEstimate, LearnableAlpha, fold_alpha, patch_detector
from alphafpn.demo.detector import CHANNELS, DEVIATION, MEAN, body
from alphafpn.demo.scenes import Family, draw
from benchmarks.paper.models import LITE_FROZEN, LITE_TAPS, LITE_WIDTHS, lite0_body

_SCENES, _STEPS, _BATCH, _SEED = 1600, 500, 16, 7_000_000
_MAPS = 32  # images at once
_SIZES = (9.6, 19.2, 38.4)  # figures below these sizes are counted


def factors(kind: str, estimate: AlphaEstimate) -> Any:
    """What `patch_detector` takes for a kind of factors.

    Args:
        kind: A number; `S-alpha`; `S-alpha unclamped`, where an empty level keeps the clamp's
            value; `half-way`, the mean of S-alpha and 1; `learnable N` or `learnable S-alpha`.
        estimate: S-alpha of the data set.
    """
    name, _, rest = kind.partition(" ")
    if name == "learnable":
        return LearnableAlpha(init=factors(rest, estimate))
    if kind == "S-alpha":
        return list(estimate)
    if kind == "S-alpha unclamped":
        pairs = zip(estimate.ratios, estimate, strict=True)
        return [ratio if 0 < ratio < float("inf") else kept for ratio, kept in pairs]
    if kind == "half-way":
        return [(1 + factor) / 2 for factor in estimate]
    return [float(kind)] * len(estimate)


def prepare(model: Any, alpha: Any, start: Any, images: Tensor | None) -> None:
    """Gives a fresh detector its factors and its first function, in place.

    Args:
        model: A detector whose factors were never set.
        alpha: Its factors, for `patch_detector`.
        start: Factors whose function the first weights compute; None: those of `alpha`.
        images: If given, [N, 3, H, W]: laterals are brought to equal RMS on them first.
    """
    if images is not None:
        equalise(model, images)
    if start is not None:
        fold_alpha(patch_detector(model, start))
        # What `alpha` does to the function is undone beforehand.
        if alpha != [1.0] * len(start):
            fold_alpha(patch_detector(model, [1 / factor for factor in alpha]))
    patch_detector(model, alpha)


@torch.no_grad()
def equalise(model: Any, images: Tensor) -> None:
    """Scales the laterals' convolutions so that all have the RMS of the finest one on `images`."""
    laterals = _laterals(model, images)
    aim = _rms(laterals[0])
    for block, lateral in zip(model.backbone.fpn.inner_blocks, laterals, strict=True):
        for parameter in block.parameters():
            parameter.mul_(aim / _rms(lateral))


@torch.no_grad()
def forward_shares(model: Any, images: Tensor) -> list[float]:
    """RMS of what comes from above over RMS of the sum, at each edge, finest first."""
    fpn = model.backbone.fpn
    laterals = _laterals(model, images)
    alpha = fpn.alpha.detach().expand(len(laterals) - 1)
    total, shares = laterals[-1], []
    for edge in range(len(laterals) - 2, -1, -1):
        size = laterals[edge].shape[-2:]
        above = alpha[edge] * nn.functional.interpolate(total, size=size, mode="nearest")
        total = laterals[edge] + above
        shares.insert(0, _rms(above) / _rms(total))
    return shares


def _laterals(model: Any, images: Tensor) -> list[Tensor]:
    # Batch statistics, as in the first steps of training, without moving the running ones.
    kept = {name: tensor.clone() for name, tensor in model.backbone.body.named_buffers()}
    features = model.backbone.body(images)
    for name, tensor in model.backbone.body.named_buffers():
        tensor.copy_(kept[name])
    fpn = model.backbone.fpn
    return [fpn.inner_blocks[i][0](feature) for i, feature in enumerate(features.values())]


def _rms(tensor: Tensor) -> float:
    return float(tensor.detach().square().mean().sqrt())


def pretrained(folder: Path) -> dict[str, Tensor]:
    """Weights of the residual network, trained on scenes of its own as a classifier.

    It tells from the mean of C5 what kind of landmark a scene has, and how many figures of the
    first kind there are below each of three sizes. No pyramid takes part in it.
    """
    path = folder / f"body-{_SCENES}-{_STEPS}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        torch.save(_train_body(), partial)
        partial.replace(path)
    weights: dict[str, Tensor] = torch.load(path, weights_only=True)
    return weights


def _train_body() -> dict[str, Tensor]:
    ratios = (0.4, 0.4, 0.4)
    scenes = draw(Family(ratios, far=False), _SCENES, _SEED)
    pixels = torch.stack([scene.pixels for scene in scenes]) / 255
    red = (pixels[:, 0].mean((1, 2)) > pixels[:, 2].mean((1, 2))).float()
    sizes = [(s.boxes[:, 2:] - s.boxes[:, :2]).prod(1).sqrt() for s in scenes]
    counts = torch.tensor([[int((s < limit).sum()) for limit in _SIZES] for s in sizes]).log1p()
    images = ((pixels - MEAN) / DEVIATION).contiguous(memory_format=torch.channels_last)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(_SEED)
        network = body().to(memory_format=torch.channels_last)
        last = nn.Linear(96, 1 + len(_SIZES))
        parameters = [*network.parameters(), *last.parameters()]
        optimizer = torch.optim.AdamW(parameters, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 4e-3, total_steps=_STEPS + 1, pct_start=0.1, cycle_momentum=False
        )
        for _ in range(_STEPS):
            rows = torch.randint(0, _SCENES, (_BATCH,))
            found = last(network(images[rows]).mean((2, 3)))
            kind = nn.functional.binary_cross_entropy_with_logits(found[:, 0], red[rows])
            loss = kind + (found[:, 1:] - counts[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.state_dict()


def take_pretrained(model: Any, weights: dict[str, Tensor]) -> None:
    """Puts pretrained weights into the detector; normalisation and its first stages stay.

    As in the paper's recipe, C2 and what is before it are not trained.
    """
    network = body()
    network.load_state_dict(weights)
    frozen = _frozen(network)
    for name in ("c1", "c2"):
        frozen.get_submodule(name).requires_grad_(False)
    for name in list(model.backbone.body):
        model.backbone.body[name] = frozen.get_submodule(name)


class Lite(nn.Module):
    """EfficientNet-Lite0 with ImageNet weights; normalisation, C2 and what is before it stay.

    As what stays is the same for all runs, `maps` may be computed once and given in place of
    pixels.
    """

    def __init__(self) -> None:
        super().__init__()
        network = _frozen(lite0_body("default"))
        # Pixels that the detector has normalised its way, as these weights know them: 2 x - 1.
        pixels = FrozenBatchNorm2d(3, eps=0)
        pixels.weight.fill_(2 * DEVIATION)
        pixels.bias.fill_(2 * MEAN - 1)
        parts = dict(network.named_children())
        self.still = nn.Sequential(pixels, *(parts.pop(name) for name in LITE_FROZEN))
        self.still.requires_grad_(False)
        names = {tap: str(i) for i, tap in enumerate(LITE_TAPS[1:], 1)}
        self.rest = IntermediateLayerGetter(nn.Sequential(OrderedDict(parts)), names)

    @torch.no_grad()
    def maps(self, images: Tensor) -> Tensor:
        """C2 of normalised images [N, 3, H, W]: [N, 24, H / 4, W / 4]."""
        return torch.cat([self.still(part) for part in images.split(_MAPS)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """C2 to C5, of normalised images or of their C2."""
        finest = x if x.shape[1] == LITE_WIDTHS[0] else self.still(x)
        return OrderedDict([("0", finest), *self.rest(finest).items()])


def take_imagenet(model: Any) -> None:
    """Gives the detector `Lite` and a pyramid on it."""
    model.backbone.body = Lite()
    pyramid = FeaturePyramidNetwork(list(LITE_WIDTHS), CHANNELS, LastLevelMaxPool())
    model.backbone.fpn = pyramid


def _frozen(module: nn.Module) -> nn.Module:
    """The module with `FrozenBatchNorm2d` for each batch normalisation."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            still = FrozenBatchNorm2d(child.num_features, child.eps)
            state = OrderedDict(child.state_dict())
            still.load_state_dict(state)
            setattr(module, name, still)
        else:
            _frozen(child)
    return module
