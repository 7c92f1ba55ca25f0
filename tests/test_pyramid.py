"""The pyramid: Eq. 1, the kinds of factor, what they draw, save, load and learn."""

from __future__ import annotations

import copy
import pickle
import re
from collections import OrderedDict, deque
from dataclasses import FrozenInstanceError
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import FeaturePyramidNetwork

from alphafpn.pyramid import (
    AlphaFeaturePyramidNetwork,
    AttentionAlpha,
    LearnableAlpha,
    alpha_parameters,
)
from tests.pyramids import (
    CHANNELS,
    EXTRAS,
    FACTORS,
    KINDS,
    NORMS,
    OUT,
    assert_equal_maps,
    literal_pyramid,
    make_features,
    make_pyramid,
)


def make_alpha(alpha, **kwargs):
    return make_pyramid(cls=AlphaFeaturePyramidNetwork, alpha=alpha, **kwargs)


# Eq. 1


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "alpha", [1, LearnableAlpha(), LearnableAlpha(shared=True), AttentionAlpha()]
)
def test_alpha_one_is_bitwise_the_parent(norm, extra, alpha):
    stock = make_pyramid(norm, extra)
    ours = make_alpha(alpha, norm=norm, extra=extra)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_equal_maps(ours(make_features()), stock(make_features()))


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    levels=st.integers(1, 4),
    size=st.integers(1, 41),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_equals_the_literal_equation(data, levels, size, dtype):
    number = st.floats(-2, 2, width=16)
    alpha = data.draw(st.lists(number, min_size=levels - 1, max_size=levels - 1))
    fpn = make_alpha(alpha, levels=levels).to(dtype)
    x = OrderedDict((name, c.to(dtype)) for name, c in make_features(levels, size).items())
    found = list(fpn(x).values())
    for p, expected in zip(found, literal_pyramid(fpn, fpn.alpha.tolist(), x), strict=True):
        assert p.dtype == dtype
        assert torch.equal(p, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [FACTORS, LearnableAlpha(FACTORS), AttentionAlpha(FACTORS)])
def test_inference_differs_from_training_by_rounding(alpha, dtype):
    fpn = make_alpha(alpha).to(dtype)
    x = OrderedDict((name, c.to(dtype)) for name, c in make_features().items())
    with torch.no_grad():
        found = fpn(x)
    for name, p in fpn(x).items():
        assert found[name].dtype == dtype
        rounding = 8 * torch.finfo(dtype).eps * p.abs().max()
        assert (found[name] - p).abs().max() <= rounding


@pytest.mark.parametrize(
    "alpha",
    [
        LearnableAlpha(FACTORS),
        LearnableAlpha(0.3, shared=True),
        AttentionAlpha(FACTORS, reduction=1),
    ],
)
def test_gradients_of_factors_are_right_to_finite_differences(alpha):
    fpn = make_alpha(alpha).double()
    features = [c.double().requires_grad_() for c in make_features(size=8, images=1).values()]
    parameters = alpha_parameters(fpn)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1)

    def finest(*inputs):
        return fpn(OrderedDict(zip("0123", inputs[:4], strict=True)))["0"][..., ::5]

    assert torch.autograd.gradcheck(finest, (*features, *parameters), fast_mode=True)


# What it costs


class Kernels(TorchDispatchMode):
    """Names the operations that compute something; on a GPU each is a kernel."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name not in {"aten::expand", "aten::unbind", "aten::detach"}:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def kernels(run):
    with Kernels() as counter:
        run()
    return counter.names


@pytest.mark.parametrize("kind", [list, LearnableAlpha])
def test_inference_runs_one_kernel_for_each_of_stocks(kind):
    stock, ours, x = make_pyramid(), make_alpha(kind(FACTORS)), make_features()
    with torch.no_grad():
        expected, found = kernels(lambda: stock(x)), kernels(lambda: ours(x))
    assert [name.replace("addcmul", "add") for name in found] == expected


def saved_bytes(fpn):
    """What the graph keeps for its backward pass, each storage once."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = {name: c.requires_grad_() for name, c in make_features().items()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        maps = fpn(x)
    del maps
    return sum(storages.values())


@pytest.mark.parametrize("alpha", [FACTORS, LearnableAlpha(FACTORS), LearnableAlpha(shared=True)])
def test_training_saves_no_map_that_stock_does_not_save(alpha):
    fpn = make_alpha(alpha)
    factors = fpn.alpha.untyped_storage().nbytes()
    assert saved_bytes(fpn) - saved_bytes(make_pyramid()) <= factors


# The kinds


@pytest.mark.parametrize(
    "alpha",
    [
        FACTORS,
        tuple(FACTORS),
        deque(FACTORS),
        np.array(FACTORS),
        torch.tensor(FACTORS),
        list(torch.tensor(FACTORS)),
    ],
    ids=lambda alpha: type(alpha).__name__,
)
def test_factors_may_be_any_sequence(alpha):
    expected = torch.tensor(FACTORS)
    assert torch.equal(make_alpha(alpha).alpha, expected)
    assert torch.equal(make_alpha(LearnableAlpha(alpha)).alpha, expected)
    gates = make_alpha(AttentionAlpha(alpha)).gates
    assert torch.equal(torch.stack([gate.init for gate in gates]), expected)


@pytest.mark.parametrize(
    "alpha", [2, 0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2)]
)
def test_one_number_serves_all_edges(alpha):
    assert make_alpha(alpha).alpha.tolist() == [float(alpha)] * 3


def test_fixed_factors_are_a_saved_buffer():
    fpn = make_alpha(FACTORS)
    assert dict(fpn.named_buffers()).keys() == {"alpha"}
    assert fpn.alpha.shape == (3,)
    assert torch.equal(fpn.state_dict()["alpha"], torch.tensor(FACTORS))
    assert alpha_parameters(fpn) == []


@pytest.mark.parametrize(
    ("init", "shared", "shape"), [(0.3, False, (3,)), (0.3, True, (1,)), ([0.3] * 3, True, (1,))]
)
def test_learnable_factors_are_a_parameter_that_starts_at_init(init, shared, shape):
    fpn = make_alpha(LearnableAlpha(init, shared))
    assert fpn.alpha.shape == shape
    assert alpha_parameters(fpn) == [fpn.alpha]
    assert_equal_maps(fpn(make_features()), make_alpha(0.3)(make_features()))


def test_attention_starts_exactly_at_init_and_then_depends_on_the_image():
    fpn, x = make_alpha(AttentionAlpha(FACTORS, reduction=1)), make_features()
    seen = {}
    for i, gate in enumerate(fpn.gates):
        gate.register_forward_hook(
            lambda gate, args, factor, i=i: seen.update({i: factor.flatten()})
        )
    assert_equal_maps(fpn(x), make_alpha(FACTORS)(x))
    assert [seen[i].tolist() for i in range(3)] == [[f, f] for f in torch.tensor(FACTORS).tolist()]
    parameters = alpha_parameters(fpn)
    assert len(parameters) == 3 * 4
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sum(p.square().mean() for p in fpn(x).values()).backward()
        optimizer.step()
    assert all(parameter.grad.any() for parameter in parameters)
    fpn(x)
    for i in range(3):
        assert seen[i][0] != seen[i][1]
        assert (seen[i] > 0).all()
        assert (seen[i] < 2 * FACTORS[i]).all()


def test_hidden_units_follow_the_reduction():
    fpn = AlphaFeaturePyramidNetwork([8, 8], 32, alpha=AttentionAlpha(reduction=4))
    assert fpn.gates[0].squeeze.weight.shape == (8, 32)
    assert make_alpha(AttentionAlpha(reduction=100)).gates[0].squeeze.weight.shape == (1, OUT)


@pytest.mark.parametrize(
    "alpha", [0.5, LearnableAlpha(), LearnableAlpha(shared=True), AttentionAlpha()]
)
def test_one_level_has_no_factor(alpha):
    fpn, stock = make_alpha(alpha, levels=1), make_pyramid(levels=1)
    assert_equal_maps(fpn(make_features(1)), stock(make_features(1)))
    # DDP waits for the gradient of every parameter that wants one.
    assert all(not parameter.requires_grad for parameter in alpha_parameters(fpn))
    (one,) = alpha_parameters(make_alpha(LearnableAlpha(), levels=2))
    assert one.requires_grad
    assert "alpha=[]" in repr(fpn)


def test_pyramids_share_no_factors():
    description = LearnableAlpha(FACTORS)
    one, other = make_alpha(description), make_alpha(description)
    assert one.alpha.data_ptr() != other.alpha.data_ptr()
    values = torch.tensor(FACTORS)
    make_alpha(values).alpha.zero_()
    assert torch.equal(values, torch.tensor(FACTORS))


@pytest.mark.parametrize(
    ("alpha", "shown"),
    [
        (FACTORS, "alpha=[0.367, 0.387, 0.368]\n"),
        (LearnableAlpha(FACTORS), "alpha=[0.367, 0.387, 0.368], learnable\n"),
        (LearnableAlpha(0.5, shared=True), "alpha=[0.5], learnable\n"),
        (AttentionAlpha(0.5), "alpha=[0.5, 0.5, 0.5], attention\n"),
    ],
)
def test_print_shows_the_factors(alpha, shown):
    assert shown in repr(nn.Sequential(make_alpha(alpha)))
    assert "alpha=[?]" in repr(on_meta(alpha))


# Random state


@pytest.mark.parametrize("alpha", [0.5, LearnableAlpha(), AttentionAlpha()])
def test_initialises_as_the_parent_and_draws_no_more(alpha):
    torch.manual_seed(7)
    stock = FeaturePyramidNetwork(list(CHANNELS), OUT)
    after_stock = torch.rand(3)
    torch.manual_seed(7)
    ours = AlphaFeaturePyramidNetwork(list(CHANNELS), OUT, alpha=alpha)
    after_ours = torch.rand(3)
    for name, tensor in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
    assert torch.equal(after_ours, after_stock)
    torch.manual_seed(7)
    again = AlphaFeaturePyramidNetwork(list(CHANNELS), OUT, alpha=alpha)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


# Bad factors


@pytest.mark.parametrize(
    "alpha",
    [
        None,
        "0.5",
        b"12",
        1j,
        True,
        np.True_,
        {"0": 0.5},
        [0.5, "0.4", 0.3],
        [0.5, True, 0.3],
        [0.5, None, 0.3],
        [[1.0, 2.0, 3.0]],
        [torch.ones(2)] * 3,
        torch.ones(3, 1),
        torch.ones(3, dtype=torch.complex64),
        torch.ones(3, dtype=torch.bool),
        torch.ones(3, device="meta"),
        np.array(["0.1", "0.2", "0.3"]),
    ],
)
def test_what_is_no_number_is_named(alpha):
    with pytest.raises(TypeError, match=rf"alpha: expected a number.*found {type(alpha).__name__}"):
        make_alpha(alpha)
    for kind in (LearnableAlpha, AttentionAlpha):
        with pytest.raises(TypeError, match=rf"{kind.__name__}.init: expected a number"):
            kind(alpha)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("levels", "count", "expected"),
    [
        *((4, n, "3 factors (level 1 -> level 0, level 2 -> level 1, lev") for n in (0, 2, 4)),
        (1, 1, "0 factors (one level has no edge"),
    ],
)
def test_a_wrong_number_of_factors_names_the_levels(kind, levels, count, expected):
    with pytest.raises(ValueError, match=rf"expected {re.escape(expected)}.*\), found {count}: "):
        make_alpha(kind([0.5] * count), levels=levels)


def test_a_pyramid_without_levels_has_no_factors():
    assert AlphaFeaturePyramidNetwork([], 4, alpha=0.5).alpha.shape == (0,)


def test_the_largest_number_is_a_factor():
    largest = torch.finfo(torch.float32).max
    assert make_alpha([0.5, -largest, largest]).alpha.tolist() == [0.5, -largest, largest]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39])
@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_that_is_not_finite_is_named_by_its_levels(kind, value):
    with pytest.raises(ValueError, match=r"finite in torch.float32 for level 2 -> level 1, found"):
        make_alpha(kind([0.5, value, 0.5]))


UNEQUAL = r"init: shared=True expects equal values, found \[0.3, 0.4"
SHARED = "LearnableAlpha.shared: expected a bool, found"
REDUCTION = "reduction: expected a positive integer, found"


@pytest.mark.parametrize(
    ("kind", "given", "error", "message"),
    [
        (LearnableAlpha, {"init": [0.3, 0.4, 0.3], "shared": True}, ValueError, UNEQUAL),
        *((LearnableAlpha, {"shared": v}, TypeError, SHARED) for v in ("no", None, 2)),
        *((AttentionAlpha, {"reduction": v}, ValueError, REDUCTION) for v in (0, -1, 2.0, "4")),
        *((AttentionAlpha, {"reduction": v}, ValueError, REDUCTION) for v in (True, None)),
    ],
)
def test_descriptions_that_are_refused(kind, given, error, message):
    with pytest.raises(error, match=message):
        kind(**given)


def test_descriptions_are_frozen_and_a_reduction_may_be_any_integer():
    assert AttentionAlpha(reduction=np.int64(4)) == AttentionAlpha(reduction=4)
    for description in (LearnableAlpha(), AttentionAlpha()):
        with pytest.raises(FrozenInstanceError):
            description.init = 2.0


# Checkpoints


@pytest.mark.parametrize(
    "alpha", [FACTORS, LearnableAlpha(FACTORS), LearnableAlpha(0.3, shared=True)]
)
def test_a_stock_checkpoint_leaves_the_factors_as_configured(alpha):
    stock, ours = (
        make_pyramid("batch", "p6p7 on c5"),
        make_alpha(alpha, norm="batch", extra="p6p7 on c5"),
    )
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(1)
    before = ours.alpha.clone()
    result = nn.Sequential(ours).load_state_dict(nn.Sequential(stock).state_dict(), strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(ours.alpha, before)
    for name, tensor in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)


def test_a_stock_checkpoint_lacks_what_attention_needs():
    with pytest.raises(RuntimeError, match=r"Missing key.*gates.0.squeeze.weight"):
        make_alpha(AttentionAlpha()).load_state_dict(make_pyramid().state_dict())


def test_missing_weights_are_still_missed():
    checkpoint = make_pyramid().state_dict()
    del checkpoint["inner_blocks.0.0.weight"]
    with pytest.raises(
        RuntimeError, match=r'Missing key\(s\) in state_dict: "inner_blocks.0.0.weight"'
    ):
        make_alpha(FACTORS).load_state_dict(checkpoint)


# Without values: the meta device


def on_meta(alpha):
    with torch.device("meta"):
        return make_alpha(alpha)


@pytest.fixture
def garbage(monkeypatch):
    """What `to_empty` leaves is usually 0; here it is not."""
    torch.use_deterministic_algorithms(True)  # and fills what is empty with nan
    yield
    torch.use_deterministic_algorithms(False)


ON_META = [FACTORS, LearnableAlpha(FACTORS), LearnableAlpha(0.3, shared=True)]


@pytest.mark.usefixtures("garbage")
@pytest.mark.parametrize("start", ["meta", "cpu"])
@pytest.mark.parametrize("alpha", ON_META)
def test_factors_that_no_checkpoint_holds_are_as_configured(alpha, start):
    fpn = on_meta(alpha) if start == "meta" else make_alpha(alpha)
    copies = [copy.deepcopy(fpn), pickle.loads(pickle.dumps(fpn))]
    for empty in (fpn, *copies):
        empty.to_empty(device="cpu")
        empty.load_state_dict(make_pyramid().state_dict(), strict=True)
        assert_equal_maps(empty(make_features()), make_alpha(alpha)(make_features()))
        assert type(empty.alpha) is type(make_alpha(alpha).alpha)


@pytest.mark.parametrize("alpha", ON_META)
def test_assigned_checkpoints_leave_no_factor_on_meta(alpha):
    stock, fpn = make_pyramid(), on_meta(alpha)
    nn.Sequential(fpn).load_state_dict(nn.Sequential(stock).state_dict(), strict=True, assign=True)
    assert_equal_maps(fpn(make_features()), make_alpha(alpha)(make_features()))
    assert all(p.requires_grad and p.is_leaf for p in alpha_parameters(fpn))
    # Without weights of the pyramid in it, a checkpoint changes nothing.
    fpn = on_meta(alpha)
    fpn.load_state_dict({}, strict=False, assign=True)
    assert fpn.alpha.is_meta


@pytest.mark.parametrize("alpha", ON_META)
def test_factors_follow_weights_that_were_filled_one_by_one(alpha):
    fpn = on_meta(alpha)
    with pytest.raises(NotImplementedError, match="meta tensor"):
        fpn.to("cpu")
    for name, tensor in make_pyramid().state_dict().items():
        path, _, attribute = name.rpartition(".")
        setattr(fpn.get_submodule(path), attribute, nn.Parameter(tensor))
    assert_equal_maps(fpn.to("cpu")(make_features()), make_alpha(alpha)(make_features()))


@pytest.mark.usefixtures("garbage")
def test_gates_restart_as_new_ones():
    fpn = on_meta(AttentionAlpha(FACTORS)).to_empty(device="cpu")
    fpn.load_state_dict(make_pyramid().state_dict(), strict=False)
    assert_equal_maps(fpn(make_features()), make_alpha(FACTORS)(make_features()))
    assert all(p.isfinite().all() for p in alpha_parameters(fpn))


@pytest.mark.usefixtures("garbage")
@pytest.mark.parametrize("alpha", [*ON_META, AttentionAlpha(FACTORS)])
def test_deferred_initialisation_of_each_module_starts_at_the_factors(alpha):
    """As FSDP does it: each module alone, parents first."""
    fpn = on_meta(alpha)
    for module in fpn.modules():
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            module.to_empty(device="cpu", recurse=False)
            module.reset_parameters()
    fpn.load_state_dict(make_pyramid().state_dict(), strict=False)
    assert_equal_maps(fpn(make_features()), make_alpha(alpha)(make_features()))


@pytest.mark.parametrize("alpha", ON_META)
def test_other_conversions_keep_factors_that_were_trained(alpha):
    fpn = make_alpha(alpha)
    fpn.alpha.data.fill_(0.75)
    for convert in (fpn.double, fpn.half, fpn.float, fpn.share_memory, lambda: fpn.to("cpu")):
        convert()
        assert (fpn.alpha == 0.75).all()


# Inference mode


@pytest.mark.parametrize("alpha", [*ON_META, AttentionAlpha(FACTORS)])
def test_a_pyramid_made_in_inference_mode_behaves_as_stock(alpha):
    with torch.inference_mode():
        stock, ours = make_pyramid(), make_alpha(alpha)
        assert_equal_maps(make_alpha(1.0)(make_features()), stock(make_features()))
    for fpn in (stock, ours):
        with torch.no_grad():
            fpn(make_features())
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            fpn(make_features())
