"""Patched pyramids in the rest of torch: compiling, exporting, scripting, precision, averaging."""

from __future__ import annotations

import contextlib
import io
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from alphafpn.pyramid import AttentionAlpha, LearnableAlpha, alpha_parameters
from alphafpn.surgery import fold_alpha, patch_detector, unpatch_detector
from tests.pyramids import (
    FACTORS,
    KINDS,
    assert_equal_maps,
    make_features,
    make_patched,
    make_pyramid,
    relative_error,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]

# torch.compile


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_as_one_graph_that_outlives_its_factors(counter, kind):
    fpn = make_patched(kind(FACTORS), extra="p6p7 on c5")
    compiled = torch.compile(fpn, fullgraph=True, backend=counter)
    x = make_features()
    for alpha in (FACTORS, 1.0, [0.1, 0.2, 0.3]):
        assert patch_detector(compiled, kind(alpha) if kind is not list else alpha) is compiled
        for p, expected in zip(compiled(x).values(), fpn(x).values(), strict=True):
            torch.testing.assert_close(p, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_gradients_are_the_eager_ones(counter, kind):
    fpn, x = make_patched(kind(FACTORS)), make_features()
    gradients = []
    for run in (fpn, torch.compile(fpn, fullgraph=True, backend=counter)):
        fpn.zero_grad()
        sum(p.square().sum() for p in run(x).values()).backward()
        gradients.append({name: p.grad for name, p in fpn.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0])


def compile_outside(fpn, counter):
    return torch.compile(fpn, fullgraph=True, backend=counter)


def compile_in_place(fpn, counter):
    fpn.compile(fullgraph=True, backend=counter)
    return fpn


@pytest.mark.parametrize("compile_", [compile_outside, compile_in_place])
def test_surgery_on_a_compiled_pyramid_reaches_the_graph(counter, compile_):
    x, fpn = make_features(), make_pyramid()
    model = nn.Sequential(OrderedDict(neck=compile_(fpn, counter)))
    stock, patched = make_pyramid()(x), make_patched(FACTORS)(x)
    assert relative_error(model(x), stock) < 1e-6
    patch_detector(model, FACTORS)
    assert relative_error(model(x), patched) < 1e-6
    fold_alpha(model)
    assert relative_error(model(x), patched) < 1e-6
    unpatch_detector(patch_detector(model, LearnableAlpha()))
    assert relative_error(model(x), patched) < 1e-6
    assert list(fpn.state_dict()) == list(make_pyramid().state_dict())


# Export and TorchScript


@pytest.mark.parametrize("kind", KINDS)
def test_exports(kind):
    fpn, x = make_patched(kind(FACTORS), norm="batch", extra="p6p7 on p5"), make_features()
    # Exported modules of torch 2.6 know no OrderedDict.
    exported = torch.export.export(fpn, (dict(x),)).module()
    assert_equal_maps(exported(dict(x)), fpn(x))


@pytest.mark.parametrize("levels", [1, 4])
@pytest.mark.parametrize(
    "alpha", [0.3, LearnableAlpha(0.3), LearnableAlpha(0.3, shared=True), AttentionAlpha(0.3)]
)
def test_scripts(alpha, levels):
    fpn = make_patched(alpha, levels=levels, norm="frozen", extra="pool")
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(fpn), buffer)
    buffer.seek(0)
    x = make_features(levels)
    assert_equal_maps(torch.jit.load(buffer)(x), fpn(x))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_traces(kind, grad):
    fpn, x = Flat(make_patched(kind(FACTORS))), tuple(make_features().values())
    with torch.set_grad_enabled(grad):
        # Tracing once more, as a check, must give the same operations.
        for found, expected in zip(torch.jit.trace(fpn, x)(*x), fpn(*x), strict=True):
            torch.testing.assert_close(found, expected)


class Flat(nn.Module):
    """A pyramid between tuples of maps."""

    def __init__(self, fpn):
        super().__init__()
        self.fpn = fpn

    def forward(self, *maps):
        return tuple(self.fpn(OrderedDict(zip("0123", maps, strict=True))).values())


# Precision and layout


@pytest.mark.parametrize("norm", ["no norm", "batch", "group"])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_gives_the_dtypes_of_stock(kind, norm):
    fpn, stock, x = make_patched(kind(FACTORS), norm=norm), make_pyramid(norm), make_features()
    exact = fpn(x)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = fpn(x), stock(x)
    assert [p.dtype for p in found.values()] == [p.dtype for p in expected.values()]
    assert fpn.state_dict()["inner_blocks.0.0.weight"].dtype == torch.float32
    for name, p in found.items():
        torch.testing.assert_close(p.float(), exact[name], rtol=0.1, atol=0.1)
    sum(p.float().square().sum() for p in found.values()).backward()
    for parameter in alpha_parameters(fpn):
        assert parameter.grad.dtype == torch.float32


@contextlib.contextmanager
def autocast(device, dtype):
    """As `torch.autocast`, which refuses where there is no such device."""
    torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_enabled(device, True)
    yield
    torch.set_autocast_enabled(device, False)
    torch.clear_autocast_cache()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("norm", ["no norm", "group"])
@pytest.mark.parametrize(
    ("device", "dtype", "kind"),
    [
        *(("cuda", torch.float16, kind) for kind in KINDS),
        *(("cuda", torch.bfloat16, kind) for kind in KINDS),
        *(("mps", torch.float16, kind) for kind in (list, LearnableAlpha)),
    ],
)
def test_autocast_on_a_gpu_gives_the_dtypes_of_stock(device, dtype, kind, norm, grad):
    """Needs no GPU: fake tensors have the dtypes that each operation returns on one."""
    dtypes = []
    for fpn in (make_patched(kind(FACTORS), norm=norm), make_pyramid(norm)):
        # The last convolutions would hide which dtype Eq. 1 gave them.
        seen: list[tuple[torch.dtype, torch.dtype]] = []
        for block in fpn.layer_blocks:
            block.register_forward_hook(
                lambda block, args, output, seen=seen: seen.append((args[0].dtype, output.dtype))
            )
        given = fpn.state_dict(), make_features()
        with FakeTensorMode(), torch.set_grad_enabled(grad):
            state, x = (
                {n: torch.empty(t.shape, dtype=t.dtype, device=device) for n, t in tensors.items()}
                for tensors in given
            )
            with autocast(device, dtype):
                torch.func.functional_call(fpn, state, (x,))
        dtypes.append(seen)
    found, expected = dtypes
    assert len(found) == 4
    assert found == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_in_float32_leave_narrower_maps_narrow(kind, dtype):
    fpn = make_patched(kind(FACTORS)).to(dtype)
    if kind is not AttentionAlpha:
        fpn.alpha.data = torch.tensor(FACTORS)
    x = {name: c.to(dtype) for name, c in make_features().items()}
    assert {p.dtype for p in fpn(x).values()} == {dtype}


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last_is_kept(kind):
    fpn, x = make_patched(kind(FACTORS)), make_features()
    expected = fpn(x)
    found = fpn.to(memory_format=torch.channels_last)(
        {name: c.contiguous(memory_format=torch.channels_last) for name, c in x.items()}
    )
    for name, p in found.items():
        assert p.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(p, expected[name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_no_host_sync(kind):
    fpn = make_patched(kind(FACTORS)).cuda()
    x = {name: c.cuda() for name, c in make_features().items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        sum(p.sum() for p in fpn(x).values()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Training tools


@pytest.mark.parametrize("kind", KINDS)
def test_averaged_models_follow_and_fold(kind):
    fpn = make_patched(kind([1.0, 1.0, 1.0]))
    averaged = torch.optim.swa_utils.AveragedModel(
        fpn, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    averaged.update_parameters(fpn)
    with torch.no_grad():
        for tensor in fpn.state_dict().values():
            tensor.mul_(0.5)
    averaged.update_parameters(fpn)
    for name, tensor in averaged.module.named_parameters():
        torch.testing.assert_close(tensor, 1.5 * fpn.get_parameter(name))
    for name, tensor in averaged.module.named_buffers():
        assert torch.equal(tensor, fpn.get_buffer(name))
    if kind is not AttentionAlpha:
        expected = averaged(make_features())
        assert relative_error(fold_alpha(averaged)(make_features()), expected) < 1e-6
