"""Eq. 3, measured: which pyramid levels the gradients of the backbone features come through."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import FeaturePyramidNetwork

from alphafpn.display import new_axes, table
from alphafpn.estimate.probe import find_detector, refuse_wrappers

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class GradientShares:
    """How much of the gradient at each backbone feature C_i comes through each output map P_j.

    Attributes:
        norms: L2 norms of these gradients, float64 [K, L] on the CPU: K backbone features by L
            output maps, extra levels included, finest first. 0 if no path leads from C_i to P_j.
        feature_names: C2, C3, ... if the strides are powers of two, else "C" and the map's name.
        level_names: P2, P3, ... likewise.
    """

    norms: Tensor
    feature_names: tuple[str, ...]
    level_names: tuple[str, ...]

    @property
    def shares(self) -> Tensor:
        """Returns the norms divided by the sum of their row, [K, L]; nan if that sum is 0."""
        return self.norms / self.norms.sum(1, keepdim=True)

    def __str__(self) -> str:
        rows = [
            (name, *(f"{share:.1%}" if share > 0 else "-" for share in row))
            for name, row in zip(self.feature_names, self.shares.tolist(), strict=True)
        ]
        title = "Gradient at C_i that comes through P_j, as a share of all P_j"
        return "\n".join([title, *table(("", *self.level_names), rows)])

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draws one stacked bar for each backbone feature (needs the extra `plot`).

        Args:
            axes: Matplotlib axes to draw on; new ones by default.
        """
        axes = new_axes() if axes is None else axes
        rows = self.shares.nan_to_num().tolist()
        base = [0.0] * len(rows)
        for j, name in enumerate(self.level_names):
            heights = [row[j] for row in rows]
            axes.bar(self.feature_names, heights, bottom=base, label=name)
            base = [low + height for low, height in zip(base, heights, strict=True)]
        axes.set_ylabel("share of the gradient")
        axes.set_xlabel("backbone feature")
        axes.set_ylim(0, 1)
        axes.legend(title="through", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        return axes


def gradient_shares(
    model: nn.Module, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]
) -> GradientShares:
    """Measures Eq. 3 on one batch, and changes nothing in the model.

    One forward pass in training mode gives the losses. One backward pass gives the gradient of
    their sum at each P_j. Then one vector-Jacobian product per P_j gives the part of that gradient
    that reaches each C_i.

    Parameters and their gradients, buffers, modes, hooks and random states are the same afterwards
    as before, so a second call gives the same result. Weights need not require gradients. A
    detector in training mode keeps the modes of its parts; one in evaluation mode is measured as
    after `train()`. Of a model under `DistributedDataParallel`, the module inside is measured, on
    this process's images only. Compiled code is not used; the original code runs.

    Args:
        model: A patched or stock torchvision detector with one feature pyramid, or a module that
            holds exactly one, such as a LightningModule. A model of another kind is run itself.
        images: Image tensors [3, H, W] on the model's device.
        targets: For each image what the detector trains on: `boxes` [N, 4] as `xyxy` in pixels,
            `labels` [N], and `masks` or `keypoints` if it predicts them. N may be 0.

    Returns:
        Norms and shares; they print as a table.

    Raises:
        TypeError: If `model` has no pyramid or several, is scripted or sharded by FSDP, or returns
            no losses.
        ValueError: If images and targets do not fit, or if weights have no values, or if a loss or
            a gradient is not finite.

    Examples:
        >>> from alphafpn.tiny import tiny_retinanet
        >>> model = tiny_retinanet("resnet18", weights_backbone=None)
        >>> boxes, labels = torch.tensor([[4.0, 4.0, 12.0, 14.0]]), torch.tensor([1])
        >>> target = {"boxes": boxes, "labels": labels}
        >>> shares = gradient_shares(model, [torch.rand(3, 64, 64)], [target])
        >>> shares.level_names, tuple(shares.norms.shape)
        (('P2', 'P3', 'P4', 'P5', 'P6'), (4, 5))
    """
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.get_submodule("_orig_mod" if hasattr(model, "_orig_mod") else "module")
    refuse_wrappers(model, "measure before sharding or scripting")
    detector = model
    with contextlib.suppress(TypeError):  # a model of another kind is run itself
        detector = find_detector(model)
    path, fpn = _only_pyramid(detector)
    if any(weight.is_meta for weight in detector.parameters()):
        raise ValueError("model: expected weights with values, found some on the meta device")
    if len(images) != len(targets) or len(images) == 0:
        raise ValueError(
            f"images, targets: expected equally many and at least one, found {len(images)} images "
            f"and {len(targets)} targets"
        )
    _check_targets(detector, targets)
    maps = _Maps()
    owner = detector.get_submodule(path.rpartition(".")[0])
    with (
        _unchanged(detector),
        torch.inference_mode(False),
        torch.enable_grad(),
        owner.register_forward_pre_hook(maps.on_image),
        fpn.register_forward_pre_hook(maps.on_features),
        fpn.register_forward_hook(maps.on_levels),
    ):
        # Detached weights cost no gradients; cloned buffers take what training writes.
        state = {name: weight.detach() for name, weight in detector.named_parameters()}
        state |= {name: buffer.clone() for name, buffer in detector.named_buffers()}
        if not detector.training:
            detector.train()
        try:
            losses = torch.func.functional_call(detector, state, (images, targets))
        except AssertionError as error:  # torchvision's checks of targets
            raise ValueError(f"images, targets: {error}") from error
        if maps.calls != 1:
            raise TypeError(f"model: expected its pyramid to run once, it ran {maps.calls} times")
        norms = _norms(maps, torch.autograd.grad(_total(losses), maps.cut, allow_unused=True))
    if not norms.isfinite().all():
        raise ValueError(f"gradients: expected finite ones, found norms {norms.tolist()}")
    return GradientShares(norms, *maps.names())


class _Maps:
    """Hooks that cut the graph before and after the pyramid, and keep the maps at the cuts.

    Attributes:
        features: The C_i that the pyramid was given, as leaves of a new graph.
        levels: The P_j that it computed from them.
        cut: Copies of `levels` that the rest of the detector was given, leaves as well.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.image_size: tuple[int, ...] = ()

    def on_image(self, module: nn.Module, args: Any) -> None:
        """Keeps (height, width) of the batch, from which strides follow."""
        if args and isinstance(args[0], Tensor):
            self.image_size = tuple(args[0].shape[2:])

    def on_features(self, module: nn.Module, args: Any) -> Any:
        """Gives the pyramid leaves in place of the backbone's features."""
        leaves = {name: c.detach().requires_grad_() for name, c in args[0].items()}
        self.feature_keys, self.features = list(leaves), list(leaves.values())
        return (type(args[0])(leaves), *args[1:])

    def on_levels(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Gives the rest of the detector leaves in place of the pyramid's maps."""
        self.calls += 1
        leaves = {name: p.detach().requires_grad_() for name, p in output.items()}
        self.level_keys, self.levels = list(leaves), list(output.values())
        self.cut = list(leaves.values())
        return type(output)(leaves)

    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names C_i and P_j by the powers of two that are their strides, else by their keys."""
        stride = self.image_size[0] / self.features[0].shape[2] if self.image_size else 1
        first = round(math.log2(stride))
        if all(
            tuple(n << (first + i) for n in c.shape[2:]) == self.image_size
            for i, c in enumerate(self.features)
        ):
            names = [f"{first + i}" for i in range(len(self.levels))]
            return tuple(f"C{n}" for n in names[: len(self.features)]), tuple(
                f"P{n}" for n in names
            )
        return tuple(f"C {k}" for k in self.feature_keys), tuple(f"P {k}" for k in self.level_keys)


def _norms(maps: _Maps, gradients: Sequence[Tensor | None]) -> Tensor:
    """Pulls the gradient at each P_j back to each C_i, and returns the norms [K, L]."""
    columns = []
    for level, gradient in zip(maps.levels, gradients, strict=True):
        pulled: Sequence[Tensor | None] = [None] * len(maps.features)
        if gradient is not None:
            pulled = torch.autograd.grad(
                level, maps.features, gradient, retain_graph=True, allow_unused=True
            )
        columns.append([0.0 if g is None else _norm(g) for g in pulled])
    return torch.tensor(columns, dtype=torch.float64).T


def _norm(gradient: Tensor) -> float:
    """Computes the L2 norm of a map [N, C, H, W] without float64 on its device."""
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    # Divided by the largest magnitude, small gradients have squares that float32 can hold.
    largest = wide.abs().amax().clamp(min=torch.finfo(wide.dtype).tiny)
    channels = torch.linalg.vector_norm(wide / largest, dim=(2, 3)).cpu().double()
    return float(largest) * float(torch.linalg.vector_norm(channels))


def _total(losses: Any) -> Tensor:
    if not isinstance(losses, dict) or not losses:
        raise TypeError(
            f"model: expected a dict of losses in training, found {type(losses).__name__}"
        )
    for name, loss in losses.items():
        if not loss.isfinite().all():
            raise ValueError(f"{name}: expected a finite loss, found {loss.tolist()}")
    return sum((loss.sum() for loss in losses.values()), torch.zeros(()))


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Puts back random states and all attributes: modes, and sizes that detectors remember."""
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    devices = {tensor.device for tensor in model.parameters()} - {torch.device("cpu")}
    kind = next((device.type for device in devices), "cuda")
    # If nothing was compiled, setting the stance would only load the compiler.
    compiled = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    with torch.random.fork_rng(devices=list(devices), device_type=kind), eager:
        try:
            yield
        finally:
            for module, values in attributes:
                vars(module).clear()
                vars(module).update(values)


def _check_targets(detector: Any, targets: Sequence[Mapping[str, Tensor]]) -> None:
    """Names what torchvision's detectors would fail on without naming the target."""
    if not isinstance(detector, RetinaNet | FCOS | GeneralizedRCNN):
        return
    heads = getattr(detector, "roi_heads", None)
    dimensions = {"boxes": 2, "labels": 1}
    if isinstance(heads, RoIHeads):
        dimensions |= {"masks": 3} if heads.has_mask() else {}
        dimensions |= {"keypoints": 3} if heads.has_keypoint() else {}
    integers = (torch.int64,) if heads is not None else (torch.int64, torch.int32)
    num_classes = _num_classes(detector)
    for i, target in enumerate(targets):
        given: Any = target if isinstance(target, Mapping) else {}
        boxes, labels = given.get("boxes"), given.get("labels")
        fits = all(
            isinstance(given.get(key), Tensor)
            and given[key].ndim == dimension
            and len(given[key]) == len(boxes)
            for key, dimension in dimensions.items()
        )
        if not fits or boxes.shape[1] != 4:
            found = [f"{key} {_shape(given[key])}" for key in dimensions if key in given]
            raise ValueError(
                f"targets[{i}]: expected tensors {', '.join(dimensions)} of equal length, boxes "
                f"[N, 4], found {', '.join(found) or type(target).__name__}"
            )
        if labels.dtype not in integers:
            raise ValueError(f"targets[{i}]: expected labels in int64, found {labels.dtype}")
        wrong = labels[(labels < 0) | (labels >= num_classes)].tolist()
        if wrong:
            raise ValueError(
                f"targets[{i}]: expected labels of at least 0 and below {num_classes}, found "
                f"{wrong[0]}"
            )


def _num_classes(detector: Any) -> float:
    try:
        if hasattr(detector, "roi_heads"):
            return int(detector.roi_heads.box_predictor.cls_score.out_features)
        return int(detector.head.classification_head.num_classes)
    except AttributeError:  # a head of the user's own
        return math.inf


def _shape(entry: object) -> str:
    return str(list(entry.shape)) if isinstance(entry, Tensor) else type(entry).__name__


def _only_pyramid(model: nn.Module) -> tuple[str, nn.Module]:
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, FeaturePyramidNetwork)
    ]
    if len(found) != 1:
        names = ", ".join(path or type(model).__name__ for path, _ in found) or "none"
        raise TypeError(
            f"expected a model with one FeaturePyramidNetwork, found {names} in "
            f"{type(model).__name__}"
        )
    return found[0]
