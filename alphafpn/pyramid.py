"""Eq. 1 as a module, and the kinds of fusion factor that it can hold.

A pyramid that fuses K levels has K-1 edges; edge i leads from level i+1 to level i, 0 the finest.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock


@dataclass(frozen=True)
class LearnableAlpha:
    """Describes factors that the loss optimises: three-alpha, or one-alpha with `shared=True`.

    Args:
        init: What the factors start at: one number, or one per edge, such as an `AlphaEstimate`.
        shared: Whether all edges of a pyramid use one parameter.

    Raises:
        TypeError: If `init` is not made of numbers.
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
        if self.shared and isinstance(values, list) and len(set(values)) > 1:
            raise ValueError(
                f"LearnableAlpha.init: shared=True expects equal values, found {values}"
            )


@dataclass(frozen=True)
class AttentionAlpha:
    """Describes factors that a small gate per edge computes for each image: atten-alpha.

    The paper has only a caption for it (Fig. 6); this is our reading. A factor is
    `init * 2 * sigmoid(z)`, where z is the coarse map after global average pooling, Linear, ReLU
    and Linear. The last layer starts at zero, so that each factor starts exactly at `init`.

    Args:
        init: What the factors start at: one number, or one per edge, such as an `AlphaEstimate`.
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
        if not isinstance(self.reduction, int) or self.reduction < 1:
            raise ValueError(
                f"AttentionAlpha.reduction: expected a positive integer, found {self.reduction!r}"
            )


Alpha: TypeAlias = float | Sequence[float] | LearnableAlpha | AttentionAlpha


class AttentionGate(nn.Module):
    """Computes the factor of one edge from the coarse map that it scales (see `AttentionAlpha`)."""

    def __init__(self, channels: int, reduction: int, init: Tensor) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, max(channels // reduction, 1))
        self.excite = nn.Linear(self.squeeze.out_features, 1)
        nn.init.zeros_(self.excite.weight)
        nn.init.zeros_(self.excite.bias)
        self.register_buffer("init", init)

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

    Factors can be read at any time. `alpha` is a buffer [K-1] where they are fixed, a parameter
    [K-1] where they are learnable ([1] if shared). Attention has no `alpha`: its factors differ
    from image to image and are the outputs [N, 1, 1, 1] of the modules `gates[i]`, so that
    `gates[i].register_forward_hook(lambda gate, args, factor: ...)` sees them.

    A new pyramid draws from the global random state what its parent draws, and no more.

    Args:
        in_channels_list: Channels of each of the K feature maps, finest first.
        out_channels: Channels of each output map.
        extra_blocks: As in the parent.
        norm_layer: As in the parent.
        alpha: One number for all edges; K-1 numbers, finest edge first, such as an
            `AlphaEstimate`; a `LearnableAlpha`; or an `AttentionAlpha`.

    Raises:
        TypeError: If `alpha` is none of these.
        ValueError: If its values are not K-1, or not finite in the weights' dtype.

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
        install_factors(self, make_factors(self, alpha))

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
            # Eq. 1. Without a graph, one kernel scales and adds. With one, scaling before the
            # nearest-neighbour upsampling costs a quarter, forward and backward, and the graph
            # saves no map that stock's does not save.
            if torch.is_grad_enabled():
                last_inner = lateral + F.interpolate(last_inner * alpha, size=size, mode="nearest")
            else:
                upsampled = F.interpolate(last_inner, size=size, mode="nearest")
                # Autocast may promote what addcmul is given: a float32 factor would widen the maps.
                last_inner = torch.addcmul(lateral, upsampled, alpha.to(upsampled.dtype))
            results.insert(0, self.get_result_from_layer_blocks(last_inner, idx))
        if self.extra_blocks is not None:
            results, names = self.extra_blocks(results, features, names)
        return OrderedDict([(name, result) for name, result in zip(names, results)])  # noqa: B905

    def _fixed_alphas(self) -> list[Tensor]:
        """Returns a view of shape [] per edge, or nothing if the gates compute the factors."""
        alphas: list[Tensor] = []
        if not hasattr(self, "gates"):
            # Shape [] leaves bfloat16 maps bfloat16; a Python number would cost a host sync.
            alphas = self.alpha.expand(len(self.inner_blocks) - 1).unbind()
        return alphas

    def _alpha(self, coarse: Tensor, edge: int, alphas: list[Tensor]) -> Tensor:
        # TorchScript resolves `hasattr` as it compiles, and reaches single modules only by a loop.
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
        # Meta tensors have no values, and to read sharded ones would be a collective operation.
        readable = all(type(tensor) is Tensor and not tensor.is_meta for tensor in tensors)
        values = [f"{v:.4g}" for t in tensors for v in t.flatten().tolist()] if readable else ["?"]
        return f"alpha=[{', '.join(values)}]{kind}"

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if f"{prefix}alpha" in missing:
            missing.remove(f"{prefix}alpha")


def alpha_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Lists the parameters of all learnable and attention factors in a model.

    They make an optimizer group of their own. An optimizer built before `patch_detector` made them
    does not hold them: `optimizer.add_param_group({"params": alpha_parameters(model)})`.

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
    """Names the two levels that an edge joins."""
    return f"level {edge + 1} -> level {edge}"


def make_factors(
    fpn: FeaturePyramidNetwork, alpha: Alpha, where: str = "alpha"
) -> Tensor | nn.ModuleList:
    """Makes the tensor, parameter or gates that `alpha` describes, and leaves `fpn` as it is.

    They take dtype and device of the weights of `fpn`; `where` is what errors call `alpha`. Raises
    what `AlphaFeaturePyramidNetwork` raises.
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
    factors = torch.tensor(values, dtype=weight.dtype, device=weight.device)
    if isinstance(alpha, LearnableAlpha):
        # Without edges the parameter is empty and unused, and DDP would wait for its gradient.
        return nn.Parameter(
            factors[:1].clone() if alpha.shared else factors, requires_grad=edges > 0
        )
    if isinstance(alpha, AttentionAlpha):
        # On the CPU and under a fork, so that the user's random state stays as it is.
        with torch.random.fork_rng(devices=()), torch.device("cpu"):
            gates = nn.ModuleList(
                AttentionGate(weight.shape[0], alpha.reduction, factor.clone())
                for factor in factors
            )
        return gates.to(weight.device, weight.dtype).train(fpn.training)
    return factors


def install_factors(fpn: FeaturePyramidNetwork, factors: Tensor | nn.ModuleList) -> None:
    """Gives `fpn`, in place, what `make_factors` made; tensors of the same form stay, refilled."""
    current = _factors(fpn)
    if current is not None:
        pairs = list(zip(_tensors(current), _tensors(factors), strict=False))
        if type(current) is type(factors) and all(old.shape == new.shape for old, new in pairs):
            with torch.no_grad():
                for old, new in pairs:
                    old.copy_(new)
            return
        remove_factors(fpn)
    if isinstance(factors, nn.ModuleList):
        fpn.gates = factors
    elif isinstance(factors, nn.Parameter):
        fpn.alpha = factors
    else:
        fpn.register_buffer("alpha", factors)
    if not isinstance(fpn, AlphaFeaturePyramidNetwork):
        fpn.__class__ = AlphaFeaturePyramidNetwork


def remove_factors(fpn: AlphaFeaturePyramidNetwork) -> None:
    """Makes a patched pyramid a stock one, in place, with the weights that it has."""
    delattr(fpn, "gates" if hasattr(fpn, "gates") else "alpha")
    fpn.__class__ = FeaturePyramidNetwork


def _factors(fpn: FeaturePyramidNetwork) -> Any:
    if not isinstance(fpn, AlphaFeaturePyramidNetwork):
        return None
    return getattr(fpn, "gates", getattr(fpn, "alpha", None))


def _tensors(factors: Tensor | nn.ModuleList) -> list[Tensor]:
    if isinstance(factors, Tensor):
        return [factors]
    return [*factors.parameters(), *factors.buffers()]


def _numbers(alpha: object, where: str) -> float | list[float]:
    """Reads one number, or a sequence, array or tensor of them."""
    numbers = alpha.tolist() if hasattr(alpha, "tolist") else alpha
    if isinstance(numbers, SupportsFloat):
        return float(numbers)
    if not isinstance(numbers, Sequence) or not all(isinstance(n, SupportsFloat) for n in numbers):
        raise TypeError(
            f"{where}: expected a number, a sequence of numbers, a LearnableAlpha or an "
            f"AttentionAlpha, found {type(alpha).__name__}: {alpha!r}"
        )
    return [float(number) for number in numbers]
