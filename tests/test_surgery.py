"""Surgery: what patching, unpatching and folding change, keep, undo and refuse."""

from __future__ import annotations

import copy
import io
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune
from torchvision.models import detection
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import FeaturePyramidNetwork

from alphafpn.pyramid import (
    AlphaFeaturePyramidNetwork,
    AttentionAlpha,
    LearnableAlpha,
    alpha_parameters,
)
from alphafpn.surgery import fold_alpha, patch_detector, unpatch_detector
from tests.detectors import DETECTORS
from tests.pyramids import (
    EXTRAS,
    FACTORS,
    KINDS,
    NORMS,
    OUT,
    assert_equal_maps,
    make_features,
    make_pyramid,
    relative_error,
)
from tests.states import assert_unchanged, snapshot


class Detector(nn.Module):
    """A body and a head around a pyramid, in a few hundred weights."""

    def __init__(self, fpn: FeaturePyramidNetwork) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"conv": nn.Conv2d(3, 3, 1), "bn": nn.BatchNorm2d(3)})
        self.fpn = fpn
        self.head = nn.Conv2d(OUT, 2, 3)

    def forward(self, x):
        return {name: self.head(nn.functional.pad(p, [2] * 4)) for name, p in self.fpn(x).items()}


def make_detector(alpha=None, **kwargs) -> Detector:
    model = Detector(make_pyramid(**kwargs)).eval()
    return model if alpha is None else patch_detector(model, alpha)


# Every detector of torchvision


@pytest.fixture(scope="module", params=DETECTORS)
def detector(request):
    return getattr(detection, request.param)(weights=None, weights_backbone=None).eval()


def random_features(model: nn.Module) -> dict[str, torch.Tensor]:
    """Backbone features as a small image would give them."""
    with torch.no_grad():
        return model.backbone.body(torch.rand(1, 3, 64, 96, generator=torch.manual_seed(0)))


def in_double(fpn: nn.Module, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs without the rounding of float32 sums, which is 1e-6 with 256 channels."""
    return copy.deepcopy(fpn).double()({name: c.double() for name, c in features.items()})


def test_every_detector_patches_folds_and_unpatches(detector):
    fpn, features = detector.backbone.fpn, random_features(detector)
    levels = len(fpn.inner_blocks)
    factors = [0.25 + 0.125 * i for i in range(levels - 1)]
    stock_keys, stock_attributes = list(detector.state_dict()), set(vars(fpn))
    parameters = list(detector.parameters())
    classes = {name: type(module) for name, module in detector.named_modules()}
    with torch.no_grad():
        stock = fpn(features)
        weights = copy.deepcopy(detector.backbone.fpn.state_dict())

        assert patch_detector(detector, 1) is detector
        assert detector.backbone.fpn is fpn
        assert_equal_maps(fpn(features), stock)
        patched_classes = {name: type(module) for name, module in detector.named_modules()}
        assert patched_classes == {**classes, "backbone.fpn": AlphaFeaturePyramidNetwork}

        patch_detector(detector, factors)
        assert fpn.alpha.tolist() == factors
        assert [id(p) for p in detector.parameters()] == [id(p) for p in parameters]
        patched, exact = fpn(features), in_double(fpn, features)
        assert not torch.equal(patched["0"], stock["0"])

        assert fold_alpha(detector) is detector
        assert detector.backbone.fpn is fpn
        assert relative_error(fpn(features), patched) < 1e-5
        assert relative_error(in_double(fpn, features), exact) < 2e-7
        assert list(detector.state_dict()) == stock_keys
        assert set(vars(fpn)) == stock_attributes
        assert {name: type(module) for name, module in detector.named_modules()} == classes

        fpn.load_state_dict(weights)
        assert unpatch_detector(patch_detector(detector, factors)) is detector
        assert_equal_maps(fpn(features), stock)
        assert list(detector.state_dict()) == stock_keys
        assert [id(p) for p in detector.parameters()] == [id(p) for p in parameters]


# What patching keeps


@pytest.mark.parametrize("kind", KINDS)
def test_patching_keeps_everything_else(kind):
    model = make_detector(norm="batch")
    model.fpn.layer_blocks[0].train()
    model.fpn.inner_blocks[1].requires_grad_(False)
    parts = [model.body, *model.fpn.children(), model.head]
    before = [snapshot(part) for part in parts]
    patch_detector(model, kind(FACTORS))
    for part, state in zip(parts, before, strict=True):
        assert_unchanged(part, state)
    assert list(model.children()) == [model.body, model.fpn, model.head]
    assert list(model.fpn.children())[: len(parts) - 2] == parts[1:-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("device", "dtype", "training"),
    [
        ("cpu", torch.float64, True),
        ("cpu", torch.float16, False),
        ("cpu", torch.bfloat16, True),
        ("meta", torch.float32, False),
    ],
)
def test_factors_take_device_dtype_and_mode(kind, device, dtype, training):
    fpn = patch_detector(make_pyramid().to(device, dtype).train(training), kind(FACTORS))
    assert {(t.device.type, t.dtype) for t in fpn.state_dict().values()} == {(device, dtype)}
    assert all(module.training is training for module in fpn.modules())
    x = {name: c.to(device, dtype) for name, c in make_features().items()}
    assert {p.dtype for p in fpn(x).values()} == {dtype}


def test_hooks_stay_and_run():
    model, calls = make_detector(), []
    model.fpn.register_forward_pre_hook(lambda *args: calls.append("pre"))
    model.fpn.register_forward_hook(lambda *args: calls.append("post"))
    patch_detector(model, FACTORS)(make_features())
    fold_alpha(model)(make_features())
    assert calls == ["pre", "post"] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_built_before_still_trains_the_weights(kind):
    model = make_detector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    patch_detector(model, kind(FACTORS))
    if alpha_parameters(model):
        optimizer.add_param_group({"params": alpha_parameters(model), "weight_decay": 0.0})
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    before = {name: p.clone() for name, p in model.fpn.named_parameters()}
    sum(p.square().mean() for p in model(make_features()).values()).backward()
    optimizer.step()
    for name, parameter in model.fpn.named_parameters():
        # Of a gate only the last bias is sure to move: its layers start at zero, or behind a ReLU.
        if not name.startswith("gates") or name.endswith("excite.bias"):
            assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", [None, *KINDS])
def test_patching_in_inference_mode_leaves_factors_that_train(first, second):
    model = make_detector(None if first is None else first(FACTORS))
    with torch.inference_mode():
        patch_detector(model, second([0.5, 0.25, 0.125]))
    expected = make_detector(second([0.5, 0.25, 0.125]))
    for each in (model, expected):
        sum(p.square().sum() for p in each(make_features()).values()).backward()
    for name, parameter in expected.named_parameters():
        if not name.endswith("squeeze.weight") and not name.endswith("squeeze.bias"):
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)
    assert not any(t.is_inference() for t in model.state_dict().values())


@pytest.mark.parametrize("kind", KINDS)
def test_copies_made_in_inference_mode_are_patched_again_outside_of_it(kind):
    with torch.inference_mode():
        model = copy.deepcopy(make_detector(kind(FACTORS)))
    patch_detector(model, kind([0.5, 0.25, 0.125]))
    with torch.no_grad():
        assert_equal_maps(
            model(make_features()), make_detector([0.5, 0.25, 0.125])(make_features())
        )


# Patching again


@pytest.mark.parametrize("kind", KINDS)
def test_patching_again_refills_the_same_tensors(kind):
    model = make_detector(kind([1.0, 1.0, 1.0]))
    before = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    if kind is AttentionAlpha:
        model.fpn.gates[0].excite.bias.data.fill_(1.0)
    patch_detector(model, kind(FACTORS))
    assert {name: id(t) for name, t in model.state_dict(keep_vars=True).items()} == before
    assert_equal_maps(model(make_features()), make_detector(FACTORS)(make_features()))


def shared(_):
    return LearnableAlpha(0.3, shared=True)


def unreduced(factors):
    return AttentionAlpha(factors, reduction=1)


@pytest.mark.parametrize("first", [*KINDS, shared, unreduced])
@pytest.mark.parametrize("second", [*KINDS, unreduced])
def test_kinds_replace_each_other_without_a_trace(first, second):
    model, fresh = make_detector(first(FACTORS)), make_detector(second(FACTORS))
    patch_detector(model, second(FACTORS))
    shapes, expected = (
        [(name, type(t), t.shape) for name, t in m.state_dict(keep_vars=True).items()]
        for m in (model, fresh)
    )
    assert shapes == expected
    assert repr(model) == repr(fresh)
    assert set(vars(model.fpn)) == set(vars(fresh.fpn))
    assert_equal_maps(model(make_features()), fresh(make_features()))


# Copies and files


@pytest.mark.parametrize("kind", KINDS)
def test_patched_models_are_copied_and_saved(kind):
    model = make_detector(kind(FACTORS), norm="batch", extra="p6p7 on p5")
    again = make_detector(kind([1.0, 1.0, 1.0]), norm="batch", extra="p6p7 on p5")
    again.load_state_dict(restored(model.state_dict(), weights_only=True))
    for other in (again, copy.deepcopy(model), restored(model, weights_only=False)):
        assert_equal_maps(other(make_features()), model(make_features()))
        assert not {t.data_ptr() for t in model.state_dict().values()} & {
            t.data_ptr() for t in other.state_dict().values()
        }


def restored(saved, weights_only):
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


# Folding


@settings(deadline=None, max_examples=100)
@given(
    data=st.data(),
    levels=st.integers(1, 4),
    norm=st.sampled_from(list(NORMS)),
    extra=st.sampled_from(list(EXTRAS)),
    kind=st.sampled_from([list, LearnableAlpha]),
    size=st.integers(2, 33),
)
def test_folding_keeps_the_outputs(data, levels, norm, extra, kind, size):
    factor = st.floats(0.01, 4).flatmap(lambda a: st.sampled_from([a, -a]))
    alpha = data.draw(st.lists(factor, min_size=levels - 1, max_size=levels - 1))
    fpn = patch_detector(make_pyramid(norm, extra, levels).double(), kind(alpha))
    x = {name: c.double() for name, c in make_features(levels, 8 * size).items()}
    patched = fpn(x)
    assert relative_error(fold_alpha(fpn)(x), patched) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_folding_half_weights(dtype):
    fpn = patch_detector(make_pyramid("batch").to(dtype), FACTORS)
    x = {name: c.to(dtype) for name, c in make_features().items()}
    patched = fpn(x)
    assert relative_error(fold_alpha(fpn)(x), patched) < 8 * torch.finfo(dtype).eps


def test_folding_keeps_batch_statistics_in_training():
    fpn = patch_detector(make_pyramid("batch"), FACTORS)
    folded = fold_alpha(copy.deepcopy(fpn))
    assert relative_error(folded.train()(make_features()), fpn.train()(make_features())) < 1e-6
    for name, buffer in folded.named_buffers():
        torch.testing.assert_close(buffer, fpn.get_buffer(name))


@pytest.mark.parametrize("norm", ["no norm", "group", "frozen"])
def test_folding_scales_exactly_the_named_weights(norm):
    fpn = make_pyramid(norm, "p6p7 on c5")
    before = copy.deepcopy(fpn.state_dict())
    fold_alpha(patch_detector(fpn, [0.5, 0.25, 2.0]))
    last = "0" if norm == "no norm" else "1"
    for level, scale in enumerate([1, 0.5, 0.125, 0.25]):
        before[f"inner_blocks.{level}.{last}.weight"] *= scale
        before[f"inner_blocks.{level}.{last}.bias"] *= scale
        before[f"layer_blocks.{level}.0.weight"] /= scale
    for name, tensor in fpn.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_folding_learnable_factors_takes_their_present_value():
    for alpha in (LearnableAlpha(), LearnableAlpha(shared=True)):
        fpn = patch_detector(make_pyramid(), alpha)
        with torch.no_grad():
            fpn.alpha.fill_(0.3)
        expected = patch_detector(make_pyramid(), 0.3)(make_features())
        assert relative_error(fold_alpha(fpn)(make_features()), expected) < 1e-6


class Groups(nn.GroupNorm):
    def __init__(self, channels):
        super().__init__(4, channels)


@pytest.mark.parametrize("norm", [Groups, LayerNorm2d])
def test_custom_norms_fold_if_their_forward_is_known(norm):
    fpn = FeaturePyramidNetwork([5, 6], OUT, norm_layer=norm).eval()
    x = {name: c for name, c in make_features(3).items() if name != "2"}
    patched = in_double(patch_detector(fpn, 0.37), x)
    assert relative_error(in_double(fold_alpha(fpn), x), patched) < 1e-6


def plain_convolutions(model):
    for blocks in (model.fpn.inner_blocks, model.fpn.layer_blocks):
        for level in range(4):
            blocks[level] = blocks[level][0]


def no_bias(model):
    for block in (*model.fpn.inner_blocks, *model.fpn.layer_blocks):
        block[0].bias = None
    model.register_module("nothing", None)


UNUSUAL = {
    "plain convolutions": plain_convolutions,
    "no bias": no_bias,
    "used twice": lambda model: setattr(model, "same", model.fpn),
    "tied but not scaled": lambda model: setattr(model, "head", model.fpn.layer_blocks[1][0]),
}


@pytest.mark.parametrize("change", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_blocks_fold(change):
    model = make_detector()
    change(model)
    patched = patch_detector(model, [1.0, 0.5, 0.37])(make_features())
    assert relative_error(fold_alpha(model)(make_features()), patched) < 1e-6


def refused(model: nn.Module, message: str) -> None:
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        fold_alpha(model)
    assert_unchanged(model, before)


class Unknown(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def with_norm(norm):
    return Detector(FeaturePyramidNetwork([3, 5, 6, 7], OUT, norm_layer=norm))


@pytest.mark.parametrize(
    ("make", "alpha", "message"),
    [
        (make_detector, [0.5, 0.0, 0.5], "fpn: the factor of level 2 -> level 1 is 0"),
        (make_detector, LearnableAlpha([0.5, 0.0, 0.5]), "fpn: the factor of level 2 -> level 1"),
        (make_detector, AttentionAlpha(0.5), "fpn: attention factors"),
        (lambda: with_norm(nn.InstanceNorm2d), 0.5, r"\.1 \(InstanceNorm2d\): it has no affine"),
        (
            lambda: with_norm(lambda channels: nn.BatchNorm2d(channels, affine=False)),
            *(0.5, r"inner_blocks.1 \(BatchNorm2d\): it has no affine"),
        ),
        (lambda: with_norm(Unknown), 0.5, r"\.1 \(Unknown\): expected a normalisation or a conv"),
    ],
)
def test_folding_refuses_what_would_change_the_outputs(make, alpha, message):
    refused(patch_detector(make(), alpha), message)


@pytest.mark.parametrize("kind", KINDS)
def test_folding_refuses_what_has_no_values(kind):
    model = patch_detector(make_detector().to("meta"), kind(FACTORS))
    refused(model, "^fpn: tensors on the meta device have no values")


@pytest.mark.parametrize("kind", ["inner_blocks", "layer_blocks"])
@pytest.mark.parametrize(
    "parametrise",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.spectral_norm,
        lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    ],
)
def test_folding_refuses_parametrised_weights(kind, parametrise):
    model = make_detector(FACTORS)
    parametrise(getattr(model.fpn, kind)[2][0])
    refused(model, rf"fpn.{kind}.2 \(\w*Conv2d\): its weight is parametrised")


TIES = {
    "parameter": lambda m: setattr(m.head, "weight", m.fpn.layer_blocks[1][0].weight),
    "memory": lambda m: setattr(m.head.weight, "data", m.fpn.layer_blocks[1][0].weight.data),
    "convolution": lambda m: setattr(m, "tail", m.fpn.layer_blocks[1][0]),
    "levels": lambda m: setattr(m.fpn.layer_blocks, "2", m.fpn.layer_blocks[1]),
    "lists": lambda m: setattr(m, "tail", m.fpn.layer_blocks),
}


@pytest.mark.parametrize("tie", TIES.values(), ids=TIES)
def test_folding_refuses_shared_weights(tie):
    model = make_detector(FACTORS)
    tie(model)
    refused(model, r"fpn.layer_blocks.1 \(Conv2d\): its weight is shared by \w[\w.]* and \w[\w.]*$")


@pytest.mark.parametrize(
    ("alpha", "dtype"),
    [
        ([1e-25, 1e-25, 1.0], torch.float32),
        ([1e25, 1e25, 1.0], torch.float32),
        ([1e-20, 1e-20, 1.0], torch.float32),
        ([1e-200, 1e-200, 1.0], torch.float64),
        ([0.01, 0.001, 1.0], torch.float16),
        ([1000.0, 1000.0, 1.0], torch.float16),
    ],
)
def test_folding_refuses_scales_that_leave_the_range(alpha, dtype):
    model = make_detector().to(dtype)
    refused(patch_detector(model, alpha), f"fpn.*_blocks.2 .* leaves the range of {dtype}")


def test_folding_takes_weights_to_the_smallest_normal_number_and_no_further():
    tiny = torch.finfo(torch.float32).tiny
    for weight, folds in ((2 * tiny, True), (1.5 * tiny, False), (0.0, True)):
        model = make_detector([2.0, 1.0, 1.0])
        with torch.no_grad():
            model.fpn.layer_blocks[1][0].weight.fill_(weight)
        if folds:
            assert (fold_alpha(model).fpn.layer_blocks[1][0].weight == weight / 2).all()
        else:
            refused(model, "fpn.layer_blocks.1 .* dividing its weight by 2 leaves the range")


def test_folding_refuses_factors_that_diverged():
    model = make_detector(LearnableAlpha(FACTORS))
    with torch.no_grad():
        model.fpn.alpha.fill_(float("nan"))
    refused(model, "fpn.inner_blocks.1 .* leaves the range")


# Several pyramids


def test_all_pyramids_get_the_same_factors():
    model = nn.ModuleList([make_detector(), make_detector()])
    patch_detector(model, LearnableAlpha(FACTORS))
    for part in model:
        assert part.fpn.alpha.tolist() == torch.tensor(FACTORS).tolist()
    assert len(alpha_parameters(model)) == 2
    assert model[0].fpn.alpha is not model[1].fpn.alpha


def test_if_one_pyramid_is_refused_none_is_changed():
    model = nn.ModuleDict({"good": make_detector(), "bad": make_detector(levels=3)})
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"alpha of bad.fpn: expected 2 factors .*found 3"):
        patch_detector(model, FACTORS)
    assert_unchanged(model, before)

    model = nn.ModuleDict({"good": make_detector(FACTORS), "bad": make_detector([1.0, 0.0, 1.0])})
    refused(model, "bad.fpn: the factor of level 2 -> level 1 is 0")


def test_stock_pyramids_beside_patched_ones_stay():
    model = nn.ModuleDict({"patched": make_detector(FACTORS), "stock": make_detector()})
    before = snapshot(model["stock"])
    fold_alpha(model)
    assert_unchanged(model["stock"], before)


# Wrong models


class Subclass(FeaturePyramidNetwork):
    pass


class OurSubclass(AlphaFeaturePyramidNetwork):
    pass


def own_forward():
    model = make_detector()
    model.fpn.forward = lambda x: x
    return model


def ssd():
    return detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: "model.pt", "expected a torch.nn.Module, found str"),
        (lambda: nn.Conv2d(1, 1, 1), r"found none in Conv2d \(no parts\)"),
        (ssd, r"found none in SSD \(backbone: SSDLiteFeatureExtractorMobileNet, anchor_gen"),
        (lambda: Detector(Subclass([3], 4)), "fpn: expected exactly.*found the subclass Subclass"),
        (lambda: OurSubclass([3], 4, alpha=1), "found the subclass OurSubclass"),
        (own_forward, "fpn: expected a stock pyramid, found one with its own `forward`"),
        (
            lambda: nn.Sequential(torch.jit.script(make_pyramid(levels=2))),
            "0: .*found a ScriptModule.*patch before wrapping",
        ),
    ],
)
def test_what_is_no_stock_pyramid_is_named(make, message):
    model = make()
    before = snapshot(model)
    for change in (lambda m: patch_detector(m, 1.0), unpatch_detector, fold_alpha):
        with pytest.raises(TypeError, match=message):
            change(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("change", [unpatch_detector, fold_alpha])
def test_stock_models_have_nothing_to_undo(change):
    with pytest.raises(TypeError, match="found only stock pyramids in Detector: fpn"):
        change(make_detector())


@pytest.mark.parametrize("alpha", [None, "0.5", [0.5], [0.5, float("nan"), 0.5]])
def test_bad_factors_change_nothing(alpha):
    model = make_detector()
    before = snapshot(model)
    with pytest.raises((TypeError, ValueError), match=re.escape("alpha of fpn: expected")):
        patch_detector(model, alpha)
    assert_unchanged(model, before)
