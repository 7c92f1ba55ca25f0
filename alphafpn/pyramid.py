"""Eq. 1 as a module, and the kinds of fusion factor that it can hold.

A pyramid that fuses K levels has K-1 edges. Edge i leads from level i+1 to level i; level 0 is the
finest.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock


@dataclass(frozen=True)
class LearnableAlpha:
    """Describes factors that the loss optimises: three-alpha, or one-alpha with `shared=True`.

    Args:
        init: Initial values: one number, or one per edge, such as an `AlphaEstimate`.
        shared: Whether all edges of a pyramid use one parameter.

    Raises:
        TypeError: If `init` is not made of numbers, or `shared` is not a bool.
        ValueError: If `shared=True` and the values of `init` differ.

    Examples:
        >>> AlphaFeaturePyramidNetwork([8, 16, 32], 4, alpha=LearnableAlpha(0.5)).alpha
        Parameter containing:
        tensor([0.5000, 0.5000], requires_grad=True)
    """

    init: float | Sequence[float] = 1.0
    shared: bool = False

    def __post_init__(self) -> None:
        values = _numbers(self.init, "LearnableAlpha.init")
        if not isinstance(self.shared, bool):
            raise TypeError(f"LearnableAlpha.shared: expected a bool, found {self.shared!r}")
        if self.shared and isinstance(values, list) and len(set(values)) > 1:
            raise ValueError(
                f"LearnableAlpha.init: shared=True expects equal values, found {values}"
            )


@dataclass(frozen=True)
class AttentionAlpha:
    """Describes factors that a small gate per edge computes for each image: atten-alpha.

    The paper mentions it only in the caption of Fig. 6; this is our interpretation. A factor is
    `init * 2 * sigmoid(z)`. Global average pooling, Linear, ReLU and Linear compute z from the
    coarse map. The last layer starts at zero, so each factor starts exactly at `init`.

    Args:
        init: Initial values: one number, or one per edge, such as an `AlphaEstimate`.
        reduction: Channels of the pyramid per hidden unit of a gate.

    Raises:
        TypeError: If `init` is not made of numbers.
        ValueError: If `reduction` is not a positive integer.

    Examples:
        >>> pyramid = AlphaFeaturePyramidNetwork([8, 16], 4, alpha=AttentionAlpha(0.5))
        >>> pyramid.gates[0](torch.rand(2, 4, 3, 3)).flatten()
        tensor([0.5000, 0.5000], grad_fn=<ViewBackward0>)
    """

    init: float | Sequence[float] = 1.0
    reduction: int = 16

    def __post_init__(self) -> None:
        _numbers(self.init, "AttentionAlpha.init")
        whole = isinstance(self.reduction, Integral) and not isinstance(self.reduction, bool)
        if not whole or self.reduction < 1:
            raise ValueError(
                f"AttentionAlpha.reduction: expected a positive integer, found {self.reduction!r}"
            )
        object.__setattr__(self, "reduction", int(self.reduction))


Alpha: TypeAlias = float | Sequence[float] | LearnableAlpha | AttentionAlpha


class ZeroLinear(nn.Linear):
    """A linear layer whose weight and bias start at zero."""

    def reset_parameters(self) -> None:
        """Sets weight and bias to zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class AttentionGate(nn.Module):
    """Computes the factor of one edge from the coarse map that it scales (see `AttentionAlpha`).

    `configured` is the value of the buffer `init` as a number, for when the buffer has no values.
    """

    def __init__(self, channels: int, reduction: int, init: float) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, max(channels // reduction, 1))
        self.excite = ZeroLinear(self.squeeze.out_features, 1)
        self.configured = init
        self.register_buffer("init", torch.tensor(init, dtype=torch.float64))

    def reset_parameters(self) -> None:
        """Sets the buffer `init`; as usual in torch, the layers reset themselves."""
        _fill(self.init, self.configured)

    def forward(self, coarse: Tensor) -> Tensor:
        """Computes one factor per image: [N, C, H, W] -> [N, 1, 1, 1]."""
        z = self.excite(F.relu(self.squeeze(coarse.mean((2, 3)))))
        factor = self.init * 2 * torch.sigmoid(z)  # type: ignore[operator]
        return factor[:, :, None, None]


class AlphaFeaturePyramidNetwork(FeaturePyramidNetwork):  # type: ignore[misc]
    """torchvision's feature pyramid with a fusion factor on each top-down edge.

    Modifications:
        - Eq. 1: `P'_i = inner_i(C_i) + alpha_i * upsample(P'_{i+1})`; the parent has no `alpha_i`.
          With `alpha=1` the outputs are bitwise the parent's.
        - A checkpoint without factors, such as a stock one, loads with `strict=True` and leaves
          fixed and learnable factors as they are.
        - On the meta device factors have no values. Once `to_empty`, FSDP or an assigned
          checkpoint makes them real, they are what `alpha` said, until a checkpoint with factors
          is loaded. Gates are initialised anew; a checkpoint has to hold them.

    Factors can be read at any time. Fixed factors are a buffer `alpha` [K-1], learnable ones a
    parameter `alpha` [K-1] ([1] if shared). Attention has no `alpha`: its factors differ from image
    to image. They are the outputs [N, 1, 1, 1] of the modules `gates[i]`, and
    `gates[i].register_forward_hook(lambda gate, args, factor: ...)` sees them.

    A new pyramid draws the same random numbers from the global state as its parent, and no others.

    With and without gradients the outputs differ by rounding, since Eq. 1 is computed in one kernel
    if no graph is recorded.

    Args:
        in_channels_list: Channels of each of the K feature maps, finest first.
        out_channels: Channels of each output map.
        extra_blocks: As in the parent.
        norm_layer: As in the parent.
        alpha: One number for all edges; K-1 numbers, finest edge first, such as an
            `AlphaEstimate`; a `LearnableAlpha`; or an `AttentionAlpha`.

    Raises:
        TypeError: If `alpha` is none of these.
        ValueError: If there are not K-1 values, or one is not finite in the weights' dtype.

    Examples:
        >>> AlphaFeaturePyramidNetwork([8, 16, 32], 4, alpha=[0.5, 0.25]).alpha
        tensor([0.5000, 0.2500])
    """

    def __init__(
        self,
        in_channels_list: list[int],
        out_channels: int,
        extra_blocks: ExtraFPNBlock | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        alpha: Alpha,
    ) -> None:
        super().__init__(in_channels_list, out_channels, extra_blocks, norm_layer)
        install_factors(self, *make_factors(self, alpha))

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """Computes the output maps from feature maps [N, C_i, H_i, W_i], both finest first."""
        names = list(x.keys())
        features = list(x.values())
        last_inner = self.get_result_from_inner_blocks(features[-1], -1)
        results = [self.get_result_from_layer_blocks(last_inner, -1)]
        alphas = self._fixed_alphas()
        for idx in range(len(features) - 2, -1, -1):
            lateral = self.get_result_from_inner_blocks(features[idx], idx)
            alpha = self._alpha(last_inner, idx, alphas)
            size = lateral.shape[2:]
            # Eq. 1. Without a graph one kernel scales and adds. With a graph it is cheaper to scale
            # before the nearest-neighbour upsampling: a quarter of the elements, forward and
            # backward, and the graph saves no map that the stock graph does not save. Tracing runs
            # with and without gradients, and has to see the same operations.
            # TorchScript reads type comments, and skips those without a list of codes alone.
            if torch.is_grad_enabled() and not torch.jit.is_tracing():  # type: ignore
                last_inner = lateral + F.interpolate(last_inner * alpha, size=size, mode="nearest")
            else:
                upsampled = F.interpolate(last_inner, size=size, mode="nearest")
                # Autocast promotes the arguments of addcmul: a float32 factor would widen the maps.
                last_inner = torch.addcmul(lateral, upsampled, alpha.to(upsampled.dtype))
            results.insert(0, self.get_result_from_layer_blocks(last_inner, idx))
        if self.extra_blocks is not None:
            results, names = self.extra_blocks(results, features, names)
        return OrderedDict([(name, result) for name, result in zip(names, results)])  # noqa: B905

    def _fixed_alphas(self) -> list[Tensor]:
        """Returns a view of shape [] per edge, or nothing if the gates compute the factors."""
        alphas: list[Tensor] = []
        if not hasattr(self, "gates"):
            # Tensors of shape [] leave bfloat16 maps bfloat16; numbers would need a host sync.
            alphas = self.alpha.expand(len(self.inner_blocks) - 1).unbind()
        return alphas

    def _alpha(self, coarse: Tensor, edge: int, alphas: list[Tensor]) -> Tensor:
        # TorchScript resolves `hasattr` when it compiles, and indexes modules only in a loop.
        if hasattr(self, "gates"):
            alpha = coarse
            for i, gate in enumerate(self.gates):
                if i == edge:
                    alpha = gate(coarse)
            return alpha
        return alphas[edge]

    def extra_repr(self) -> str:
        """Shows the factors in `print(model)`."""
        if hasattr(self, "gates"):
            kind, tensors = ", attention", [gate.init for gate in self.gates]
        else:
            kind = ", learnable" if isinstance(self.alpha, nn.Parameter) else ""
            tensors = [self.alpha.detach()]
        # Meta tensors have no values; reading sharded ones would be a collective operation.
        readable = all(type(tensor) is Tensor and not tensor.is_meta for tensor in tensors)
        values = [f"{v:.4g}" for t in tensors for v in t.flatten().tolist()] if readable else ["?"]
        return f"alpha=[{', '.join(values)}]{kind}"

    def reset_parameters(self) -> None:
        """Sets fixed and learnable factors to the values that `alpha` gave them."""
        if not hasattr(self, "gates"):
            _fill(self.alpha, self.configured)

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> AlphaFeaturePyramidNetwork:
        empty = _leaves_empty(fn)
        if not empty:
            # accelerate sets the tensors of a checkpoint one by one; a stock one has no factors.
            self._leave_meta(next(self.inner_blocks.parameters(), None))
        super()._apply(fn, recurse)
        if empty:
            self.reset_parameters()
            for gate in getattr(self, "gates", ()) if recurse else ():
                for module in gate.modules():
                    module.reset_parameters()
        return self

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if f"{prefix}alpha" in missing:
            missing.remove(f"{prefix}alpha")
            if metadata.get("assign_to_params_buffers"):
                own = (tensor for name, tensor in state_dict.items() if name.startswith(prefix))
                self._leave_meta(next(own, None))

    def _leave_meta(self, weight: Tensor | None) -> None:
        """Makes fixed and learnable factors real, if `weight` is and they are not."""
        alpha = _factors(self)
        without_values = isinstance(alpha, Tensor) and alpha.is_meta
        if without_values and weight is not None and not weight.is_meta:
            self.to_empty(device=weight.device, recurse=False)


def alpha_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Lists the parameters of all learnable and attention factors in a model.

    They can have an optimizer group of their own. An optimizer that was built before
    `patch_detector` does not hold them:
    `optimizer.add_param_group({"params": alpha_parameters(model)})`.

    Examples:
        >>> pyramid = AlphaFeaturePyramidNetwork([8, 16, 32], 4, alpha=LearnableAlpha(0.5))
        >>> len(alpha_parameters(pyramid))
        1
    """
    return [
        tensor
        for module in model.modules()
        if isinstance(module, AlphaFeaturePyramidNetwork)
        for tensor in _tensors(_factors(module))
        if isinstance(tensor, nn.Parameter)
    ]


def edge_name(edge: int) -> str:
    """Names an edge by its two levels."""
    return f"level {edge + 1} -> level {edge}"


def make_factors(
    fpn: FeaturePyramidNetwork, alpha: Alpha, where: str = "alpha"
) -> tuple[Tensor | nn.ModuleList, tuple[float, ...]]:
    """Makes the factors that `alpha` describes, in dtype and device of the weights of `fpn`.

    The pyramid stays as it is. Errors call `alpha` by the name `where`. Returns a tensor, a
    parameter or gates; and the values of a tensor or parameter as numbers.
    """
    weight = next(fpn.inner_blocks.parameters(), torch.tensor([]))
    edges = max(len(fpn.inner_blocks), 1) - 1
    init = alpha.init if isinstance(alpha, LearnableAlpha | AttentionAlpha) else alpha
    values = _numbers(init, where)
    values = values if isinstance(values, list) else [values] * edges
    if len(values) != edges:
        names = ", ".join(edge_name(edge) for edge in range(edges)) or "one level has no edge"
        raise ValueError(
            f"{where}: expected {edges} factors ({names}), found {len(values)}: {values}"
        )
    for edge, value in enumerate(values):
        if not abs(value) <= torch.finfo(weight.dtype).max:
            raise ValueError(
                f"{where}: expected a number that is finite in {weight.dtype} for "
                f"{edge_name(edge)}, found {value}"
            )
    # Tensors that are made in inference mode cannot be trained later.
    with torch.inference_mode(False):
        if isinstance(alpha, AttentionAlpha):
            # Made on the CPU, with the random state restored, so that the user's stays the same.
            with torch.random.fork_rng(devices=()), torch.device("cpu"):
                gates = nn.ModuleList(
                    AttentionGate(weight.shape[0], alpha.reduction, value) for value in values
                )
            return gates.to(weight.device, weight.dtype).train(fpn.training), ()
        if isinstance(alpha, LearnableAlpha) and alpha.shared:
            values = values[:1]
        factors = torch.tensor(values, dtype=weight.dtype, device=weight.device)
        if isinstance(alpha, LearnableAlpha):
            # Without edges the parameter is empty; DDP would wait for its gradient.
            factors = nn.Parameter(factors, requires_grad=edges > 0)
        return factors, tuple(values)


def install_factors(
    fpn: FeaturePyramidNetwork, factors: Tensor | nn.ModuleList, configured: tuple[float, ...]
) -> None:
    """Gives `fpn` new factors, in place; tensors of the same form are kept and refilled."""
    current = _factors(fpn)
    pairs = list(zip(_tensors(current), _tensors(factors), strict=False))
    # Tensors that were made in inference mode cannot be changed outside of it.
    if type(current) is type(factors) and all(
        old.shape == new.shape and not old.is_inference() for old, new in pairs
    ):
        with torch.no_grad():
            for old, new in pairs:
                old.copy_(new)
        if isinstance(factors, nn.ModuleList):
            for gate, new_gate in zip(current, factors, strict=True):
                gate.configured = new_gate.configured
    else:
        if current is not None:
            remove_factors(fpn)
        if isinstance(factors, nn.ModuleList):
            fpn.gates = factors
        elif isinstance(factors, nn.Parameter):
            fpn.alpha = factors
        else:
            fpn.register_buffer("alpha", factors)
        if not isinstance(fpn, AlphaFeaturePyramidNetwork):
            fpn.__class__ = AlphaFeaturePyramidNetwork
    fpn.configured = configured


def remove_factors(fpn: AlphaFeaturePyramidNetwork) -> None:
    """Makes a patched pyramid a stock one, in place, with the weights that it has."""
    delattr(fpn, "gates" if hasattr(fpn, "gates") else "alpha")
    fpn.__dict__.pop("configured", None)  # pickles of version 0.1 have none
    fpn.__class__ = FeaturePyramidNetwork


def _factors(fpn: FeaturePyramidNetwork) -> Any:
    """Returns the gates, or the tensor or parameter `alpha`; None if a pyramid is stock."""
    if not isinstance(fpn, AlphaFeaturePyramidNetwork):
        return None
    return getattr(fpn, "gates", getattr(fpn, "alpha", None))


def _tensors(factors: Tensor | nn.ModuleList | None) -> list[Tensor]:
    if isinstance(factors, nn.ModuleList):
        return [*factors.parameters(), *factors.buffers()]
    return [] if factors is None else [factors]


def _fill(tensor: Any, values: float | tuple[float, ...]) -> None:
    full: Any = torch.tensor(values, dtype=tensor.dtype, device=tensor.device)
    if hasattr(tensor, "device_mesh"):  # a parameter that FSDP has sharded
        full = type(tensor).from_local(full, tensor.device_mesh, run_check=False)
        full = full.redistribute(placements=tensor.placements)
    with torch.no_grad():
        tensor.copy_(full)


def _leaves_empty(fn: Callable[[Tensor], Tensor]) -> bool:
    """Tells whether `fn`, an argument of `Module._apply`, drops all values, as `to_empty` does."""
    try:
        return not fn(torch.empty((), device="meta")).is_meta
    except Exception:
        # It asked for values, and so keeps them.
        return False


def _numbers(alpha: Any, where: str) -> float | list[float]:
    """Reads one number, or a sequence, array or tensor of them."""
    try:
        numbers = alpha.tolist() if hasattr(alpha, "tolist") else alpha
        if isinstance(numbers, Sequence) and not isinstance(numbers, str | bytes):
            return [_number(number) for number in numbers]
        return _number(numbers)
    except (TypeError, RuntimeError):  # a meta tensor has no values
        raise TypeError(
            f"{where}: expected a number, a sequence of numbers, a LearnableAlpha or an "
            f"AttentionAlpha, found {type(alpha).__name__}: {alpha!r}"
        ) from None


def _number(number: Any) -> float:
    value = number.item() if hasattr(number, "item") else number
    if isinstance(value, bool | str | bytes):
        raise TypeError
    return float(value)
