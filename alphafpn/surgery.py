"""Patches, unpatches and folds the pyramids in a detector; validates all before any change."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d

from alphafpn.estimate.probe import refuse_wrappers
from alphafpn.pyramid import (
    Alpha,
    AlphaFeaturePyramidNetwork,
    edge_name,
    install_factors,
    make_factors,
    remove_factors,
)

M = TypeVar("M", bound=nn.Module)

# The forward methods that return `weight * something + bias`.
_AFFINE = {
    cls.forward
    for cls in (
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.SyncBatchNorm,
        nn.InstanceNorm2d,
        nn.GroupNorm,
        LayerNorm2d,
        FrozenBatchNorm2d,
    )
}


def patch_detector(model: M, alpha: Alpha) -> M:
    """Gives the pyramids inside a model fusion factors, in place.

    Each `FeaturePyramidNetwork` becomes an `AlphaFeaturePyramidNetwork`. It stays the same object
    with the same parameters, hooks, device, dtype and modes. Patching again replaces the factors.
    Factors of the same kind only change their values, so compiled code stays valid.

    Args:
        model: A detector, any module that contains pyramids, or a pyramid; compiled ones too.
        alpha: As in `AlphaFeaturePyramidNetwork`; if there are several pyramids, all get it.

    Returns:
        The same model.

    Raises:
        TypeError: If there is no pyramid, or one of another class or with its own `forward`; if a
            part is scripted or wrapped in DDP or FSDP; if `alpha` is of an unknown kind.
        ValueError: If `alpha` does not fit a pyramid. After any error the model is unchanged.

    Examples:
        >>> from torchvision.ops import FeaturePyramidNetwork
        >>> pyramid = patch_detector(FeaturePyramidNetwork([8, 16, 32], 4), [0.5, 0.25])
        >>> pyramid.alpha
        tensor([0.5000, 0.2500])
    """
    planned = [
        (fpn, *make_factors(fpn, alpha, f"alpha of {path}")) for path, fpn in _pyramids(model)
    ]
    for fpn, factors, configured in planned:
        install_factors(fpn, factors, configured)
    return model


def unpatch_detector(model: M) -> M:
    """Makes the patched pyramids inside a model stock ones again, in place.

    The factors are dropped and the weights stay, so the outputs change. `fold_alpha` keeps the
    outputs.

    Args:
        model: As in `patch_detector`.

    Returns:
        The same model.

    Raises:
        TypeError: If there is no patched pyramid, or as in `patch_detector`.

    Examples:
        >>> from torchvision.ops import FeaturePyramidNetwork
        >>> pyramid = patch_detector(FeaturePyramidNetwork([8, 16, 32], 4), 0.5)
        >>> type(unpatch_detector(pyramid)).__name__
        'FeaturePyramidNetwork'
    """
    for _, fpn in _patched(model):
        remove_factors(fpn)
    return model


def fold_alpha(model: M) -> M:
    """Moves the factors in a model into its weights, in place: stock pyramids, same outputs.

    Let c_0 = 1 and c_{i+1} = alpha_i * c_i. The output of inner block i is multiplied by c_i: in
    the weight and bias of its normalisation if it has one, else of its convolution. The weight of
    the convolution in layer block i is divided by c_i, which undoes this. Extra blocks use only
    backbone features and output maps, so they stay the same. Learnable factors are folded at their
    present value. The state of an optimizer is not rescaled.

    Load a folded checkpoint into a stock model only. A patched model loads it without an error, and
    applies its factors a second time.

    Args:
        model: As in `patch_detector`.

    Returns:
        The same model.

    Raises:
        TypeError: As in `unpatch_detector`.
        ValueError: If a factor is 0, comes from attention or has no value (meta device); if scaled
            weights leave the range of their dtype; if a weight to scale is missing, parametrised or
            shared with another part of the model. After any error the model is unchanged.

    Examples:
        >>> from torchvision.ops import FeaturePyramidNetwork
        >>> pyramid = patch_detector(FeaturePyramidNetwork([8, 16], 4), 0.5)
        >>> maps = {"fine": torch.rand(1, 8, 4, 4), "coarse": torch.rand(1, 16, 2, 2)}
        >>> before = pyramid(maps)["fine"]
        >>> torch.allclose(fold_alpha(pyramid)(maps)["fine"], before, atol=1e-6)
        True
    """
    pyramids = _patched(model)
    scaled = [pair for path, fpn in pyramids for pair in _folded(model, path, fpn)]
    with torch.no_grad():
        for tensor, value in scaled:
            tensor.copy_(value)
    for _, fpn in pyramids:
        remove_factors(fpn)
    return model


def _pyramids(model: nn.Module) -> list[tuple[str, FeaturePyramidNetwork]]:
    """Lists the pyramids in a model with their paths, or raises if they must not be changed."""
    refuse_wrappers(model, "patch before wrapping or scripting")
    found = []
    for path, module in model.named_modules():
        path = path or type(model).__name__
        if not isinstance(module, FeaturePyramidNetwork):
            continue
        if type(module) not in (FeaturePyramidNetwork, AlphaFeaturePyramidNetwork):
            raise TypeError(
                f"{path}: expected exactly FeaturePyramidNetwork or AlphaFeaturePyramidNetwork, "
                f"found the subclass {type(module).__name__}"
            )
        if "forward" in vars(module):
            raise TypeError(f"{path}: expected a stock pyramid, found one with its own `forward`")
        found.append((path, module))
    if not found:
        parts = ", ".join(f"{name}: {type(part).__name__}" for name, part in model.named_children())
        raise TypeError(
            f"expected a model with a FeaturePyramidNetwork, found none in {type(model).__name__} "
            f"({parts or 'no parts'})"
        )
    return found


def _patched(model: nn.Module) -> list[tuple[str, AlphaFeaturePyramidNetwork]]:
    pyramids = _pyramids(model)
    patched = [pair for pair in pyramids if isinstance(pair[1], AlphaFeaturePyramidNetwork)]
    if not patched:
        raise TypeError(
            f"expected a patched model, found only stock pyramids in {type(model).__name__}: "
            + ", ".join(path for path, _ in pyramids)
        )
    return patched


def _folded(
    model: nn.Module, path: str, fpn: AlphaFeaturePyramidNetwork
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the tensors that folding changes, with their new values."""
    if any(tensor.is_meta for tensor in (*fpn.parameters(), *fpn.buffers())):
        raise ValueError(f"{path}: tensors on the meta device have no values and cannot fold")
    if hasattr(fpn, "gates"):
        raise ValueError(f"{path}: attention factors differ from image to image and cannot fold")
    shared = _shared(model, fpn)
    scale = 1.0
    factors = fpn.alpha.detach().expand(len(fpn.inner_blocks) - 1)
    for edge, factor in enumerate(factors.tolist()):
        if factor == 0:
            raise ValueError(f"{path}: the factor of {edge_name(edge)} is 0 and cannot fold")
        scale *= factor
        if scale != 1:
            for kind in ("inner_blocks", "layer_blocks"):
                where, block = f"{path}.{kind}.{edge + 1}", getattr(fpn, kind)[edge + 1]
                yield from _rescaled(where, block, kind == "inner_blocks", scale, shared)


def _shared(model: nn.Module, fpn: nn.Module) -> dict[int, list[str]]:
    """Maps the address of each tensor to all paths to it, if there are more than `fpn` has."""
    uses = sum(part is fpn for _, part in model.named_modules(remove_duplicate=False))
    owners: dict[int, list[str]] = defaultdict(list)
    for named in (model.named_parameters, model.named_buffers):
        for path, tensor in named(remove_duplicate=False):
            owners[tensor.data_ptr()].append(path)
    return {address: paths for address, paths in owners.items() if len(paths) > uses}


def _rescaled(
    where: str, block: Any, inner: bool, scale: float, shared: dict[int, list[str]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the scaled tensors of an inner block, or of the convolution of a layer block."""
    sequential = type(block).forward is nn.Sequential.forward
    module = block[-1 if inner else 0] if sequential else block
    where = f"{where} ({type(module).__name__})"
    if type(module).forward not in (_AFFINE if inner else {nn.Conv2d.forward}):
        raise ValueError(f"{where}: expected {'a normalisation or ' * inner}a convolution to scale")
    tensors = {**module._parameters, **module._buffers}
    for name in ("weight", "bias") if inner else ("weight",):
        if name not in tensors:
            raise ValueError(f"{where}: its {name} is parametrised; remove that first")
        tensor = tensors[name]
        if tensor is None and name == "weight":
            raise ValueError(f"{where}: it has no affine part to scale")
        if tensor is None:
            continue
        if owners := shared.get(tensor.data_ptr()):
            raise ValueError(f"{where}: its {name} is shared by {' and '.join(owners)}")
        value = tensor.detach() * scale if inner else tensor.detach() / scale
        # Below the smallest normal number weights lose digits.
        limits, peak = torch.finfo(value.dtype), float(value.abs().max())
        if not math.isfinite(peak) or (peak < limits.tiny and tensor.any()):
            raise ValueError(
                f"{where}: {'multiplying' if inner else 'dividing'} its {name} by {scale:.3g} "
                f"leaves the range of {value.dtype}: largest magnitude {peak:.3g}"
            )
        yield tensor, value
