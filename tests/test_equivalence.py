"""What a fixed factor is: a first function, and learning rates of the pyramid's convolutions.

A patched network and a folded one with the parameter groups of the documentation are trained
beside each other, in float64, and stay the same function.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from alphafpn import fold_alpha, gradient_shares, patch_detector
from tests.detectors import make_batch, make_detector, make_faster_rcnn, make_retinanet
from tests.pyramids import EXTRAS, NORMS, make_features, make_pyramid, relative_error
from tests.test_docs import ROOT, blocks

STEPS = 100
EQUAL = 1e-10
FACTORS = [0.37, 1.6, 0.3]


def documented_recipe():
    """`folded_groups` of docs/recipes.md."""
    text = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    (code,) = (c for _, c in blocks(text, "python") if c.startswith("def folded_groups"))
    names: dict[str, Any] = {"fold_alpha": fold_alpha, "patch_detector": patch_detector}
    exec(code, names)
    return names["folded_groups"]


folded_groups = documented_recipe()


def coupled_groups(model, factors, lr, weight_decay, eps):
    """For Adam, which adds its decay to the gradient as SGD does, and so needs the decay of SGD."""
    groups = folded_groups(model, factors, lr, weight_decay, eps)
    return [{**g, "weight_decay": g["weight_decay"] * lr / g["lr"]} for g in groups]


@dataclasses.dataclass
class Method:
    """An optimizer, its settings, and what makes the groups of a folded model."""

    make: Any
    settings: dict[str, float]
    groups: Any = folded_groups

    def patched(self, model, factors):
        patch_detector(model, factors)
        return self.make(model.parameters(), **self.settings)

    def folded(self, model, factors):
        return self.make(self.groups(model, factors, **self.settings))


FOR_SGD = {"lr": 0.01, "weight_decay": 0.05}
FOR_ADAM = {"lr": 0.003, "weight_decay": 0.5, "eps": 1e-3}
SGD = Method(functools.partial(torch.optim.SGD, momentum=0.9), FOR_SGD)
METHODS = {
    "SGD": SGD,
    "Nesterov": Method(functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True), FOR_SGD),
    "AdamW, eps 0": Method(torch.optim.AdamW, {**FOR_ADAM, "eps": 0.0}),
    "AdamW": Method(torch.optim.AdamW, FOR_ADAM),
    "AMSGrad": Method(functools.partial(torch.optim.AdamW, amsgrad=True), FOR_ADAM),
    "Adam": Method(torch.optim.Adam, {**FOR_ADAM, "weight_decay": 0.05}, coupled_groups),
}


class Pyramid(nn.Module):
    """A pyramid where detectors have theirs, and a loss that wants a constant on each level."""

    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"fpn": make_pyramid(**kwargs)})
        self.double().train()

    def forward(self, x):
        return self.backbone.fpn(x)

    def loss(self, x):
        return sum((p - i % 3).square().mean() for i, p in enumerate(self(x).values()))


def make_inputs(levels):
    return {name: c.double() for name, c in make_features(levels, size=40).items()}


def train(model, optimizer, loss, steps=STEPS, clip=math.inf):
    """Yields the loss of each step, with a warm-up and a drop of the rate, as detectors get."""
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10) * 0.1 ** (step >= 80))
    for step in range(steps):
        torch.manual_seed(step)  # of dropout and of the samplers in R-CNNs
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        if math.isfinite(clip):
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        yield value.item()


def assert_same_losses(patched, folded, on_step=lambda step: None):
    losses = []
    for step, (expected, found) in enumerate(zip(patched, folded, strict=True)):
        assert found == pytest.approx(expected, rel=EQUAL), step
        on_step(step)
        losses.append(expected)
    return losses


def assert_same_weights(patched, folded):
    """Folded after training is what folded before training has become."""
    expected = fold_alpha(patched).state_dict()
    assert list(folded.state_dict()) == list(expected)
    for name, value in folded.state_dict().items():
        error = (value - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1)
        assert error <= EQUAL, name


def assert_same_training(method, factors, norm, extra, steps=STEPS):
    levels = len(factors) + 1
    patched, folded = (Pyramid(norm=norm, extra=extra, levels=levels) for _ in range(2))
    x, other = make_inputs(levels), {n: c.flip(-1) for n, c in make_inputs(levels).items()}
    optimizers = method.patched(patched, factors), method.folded(folded, factors)
    runs = (
        train(model, optimizer, lambda model: model.loss(x), steps)
        for model, optimizer in zip((patched, folded), optimizers, strict=True)
    )
    losses = assert_same_losses(*runs)
    assert abs(losses[-1] / losses[0] - 1) > 1e-3  # trained at all
    for maps in (x, other):
        assert relative_error(folded(maps), patched(maps)) <= EQUAL
    assert_same_weights(patched, folded)


# Pyramids


@pytest.mark.parametrize(
    ("method", "levels", "extra"),
    [("SGD", 3, "p6p7 on c5"), ("SGD", 4, "pool"), ("AdamW", 4, "p6p7 on p5")],
)
@pytest.mark.parametrize("norm", NORMS)
def test_a_folded_pyramid_trains_as_the_patched_one(norm, method, levels, extra):
    assert_same_training(METHODS[method], FACTORS[: levels - 1], norm, extra)


# Where a gradient is 0 but for rounding, Adam without eps makes full steps of the rounding errors:
# behind batch statistics, and in weights that meet nothing but padding or a ReLU that is off.
@pytest.mark.parametrize(
    ("levels", "norm", "extra"),
    [
        (4, "no norm", "pool"),
        (4, "frozen", "pool"),
        (4, "group", "pool"),
        (3, "no norm", "p6p7 on p5"),
        (3, "group", "p6p7 on c5"),
    ],
)
def test_with_adamw_without_eps_too(levels, norm, extra):
    assert_same_training(METHODS["AdamW, eps 0"], FACTORS[: levels - 1], norm, extra)


@settings(max_examples=20, deadline=None)
@given(
    factors=st.lists(st.floats(0.2, 2), min_size=1, max_size=3),
    norm=st.sampled_from(list(NORMS)),
    extra=st.sampled_from(list(EXTRAS)),
    method=st.sampled_from(["SGD", "Nesterov", "AdamW", "AMSGrad", "Adam"]),
)
def test_with_any_factors(factors, norm, extra, method):
    assert_same_training(METHODS[method], factors, norm, extra, steps=10)


# What it takes


def equal_rates(model, factors, lr, **others):
    return [{**g, "lr": lr, **others} for g in folded_groups(model, factors, lr, **others)]


def rates_of_adamw(model, factors, lr, weight_decay):
    groups = folded_groups(model, factors, lr, weight_decay, eps=1.0)
    return [{name: g[name] for name in ("params", "lr", "weight_decay")} for g in groups]


def rates_of_sgd(model, factors, lr, weight_decay, eps):
    groups = coupled_groups(model, factors, lr, weight_decay, eps)
    return [{**g, "lr": g["lr"] ** 2 / lr} for g in groups]


def equal_eps(model, factors, lr, weight_decay, eps):
    return [{**g, "eps": eps} for g in folded_groups(model, factors, lr, weight_decay, eps)]


@pytest.mark.parametrize(
    ("method", "groups", "clip"),
    [
        pytest.param("SGD", folded_groups, 0.1, id="clipping by the global norm"),
        pytest.param("SGD", equal_rates, math.inf, id="SGD, first function only"),
        pytest.param("AdamW", equal_rates, math.inf, id="AdamW, first function only"),
        pytest.param("SGD", rates_of_adamw, math.inf, id="SGD with AdamW's rates"),
        pytest.param("AdamW", rates_of_sgd, math.inf, id="AdamW with SGD's rates"),
        pytest.param("AdamW", equal_eps, math.inf, id="eps not scaled"),
        pytest.param("Adam", folded_groups, math.inf, id="coupled decay divided by the rate"),
    ],
)
def test_anything_else_is_another_training(method, groups, clip):
    method = METHODS[method]
    patched, folded = Pyramid(), Pyramid()
    x = make_inputs(4)
    optimizers = (
        method.patched(patched, FACTORS),
        dataclasses.replace(method, groups=groups).folded(folded, FACTORS),
    )
    for model, optimizer in zip((patched, folded), optimizers, strict=True):
        list(train(model, optimizer, lambda model: model.loss(x), steps=30, clip=clip))
    assert relative_error(folded(x), patched(x)) > 1e-3


# Detectors


@pytest.mark.parametrize(
    ("build", "make", "options"),
    [
        (make_retinanet, torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.05, "eps": 1e-8}),
        (make_faster_rcnn, SGD.make, {"lr": 0.01, "weight_decay": 1e-3}),
    ],
)
def test_a_stock_detector_trains_as_the_patched_one(build, make, options):
    images, targets = make_batch()
    images = [image.double() for image in images]
    targets = [{**target, "boxes": target["boxes"].double()} for target in targets]
    factors, method = [0.37, 0.6], Method(make, options)
    patched, folded = make_detector(build).double(), make_detector(build).double()
    optimizers = method.patched(patched, factors), method.folded(folded, factors)
    runs = (
        train(model, optimizer, lambda model: sum(model(images, targets).values()))
        for model, optimizer in zip((patched, folded), optimizers, strict=True)
    )

    def assert_same_shares(step):
        if step % 50 == 0:
            shares = [gradient_shares(model, images, targets) for model in (patched, folded)]
            torch.testing.assert_close(shares[1].norms, shares[0].norms, rtol=EQUAL, atol=0)

    losses = assert_same_losses(*runs, assert_same_shares)
    assert losses[-1] < 0.9 * losses[0]
    with torch.no_grad():
        maps = [model.eval().backbone(torch.stack(images[:1])) for model in (patched, folded)]
    assert relative_error(maps[1], maps[0]) <= EQUAL
