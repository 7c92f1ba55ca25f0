"""Adapts a built detector to its objects, in place: anchors, a finer level, the input, the caps."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOS
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d, MultiScaleRoIAlign

from alphafpn.estimate.alpha_estimate import AlphaEstimate
from alphafpn.estimate.probe import (
    anchor_generator,
    find_detector,
    input_channels,
    refuse_wrappers,
    run_backbone,
    skeleton,
)
from alphafpn.estimate.resize import is_stock, resizes
from alphafpn.pyramid import AlphaFeaturePyramidNetwork

M = TypeVar("M", bound=nn.Module)
Cells = tuple[tuple[tuple[float, ...], ...], ...]

# A level at half a smaller stride would cost more than a larger input.
_FINEST_STRIDE = 8
# Side of the empty image that shows the strides; every usual stride divides it.
_SIDE = 256


@dataclass(frozen=True)
class AnchorFit:
    """One row of an `AnchorComparison`: a way to adapt a detector, and the objects it reaches.

    Attributes:
        anchor_scale: Anchor sizes over the detector's own, three significant digits.
        finer_level: Whether the pyramid gets one more level, at half the finest stride.
        input_scale: Input size over the detector's own: 1 or 2.
        anchor_sizes: Per level, in pixels, as `AnchorGenerator` takes them; empty if the detector's
            anchors are not made from sizes.
        reached: Share of boxes whose best anchor reaches IoU .5; for FCOS, that own a location.
        max_objects: The largest number of boxes in an image.
        cost: Operations of a forward pass over those of the detector as it is.
        estimate: What `estimate_alpha_for` gives for a detector that is adapted so.
        different_anchors: Per level, how many anchors of a cell are different after rounding.
        own_anchors: Cell anchors (xyxy) per level of the detector that was compared.
        own_input: `min_size`, `max_size` and `fixed_size` of its transform.
    """

    anchor_scale: float
    finer_level: bool
    input_scale: int
    anchor_sizes: tuple[tuple[float, ...], ...]
    reached: float
    max_objects: int
    cost: float
    estimate: AlphaEstimate = field(repr=False)
    different_anchors: tuple[int, ...] = field(repr=False)
    own_anchors: Cells = field(repr=False)
    own_input: tuple[Any, ...] = field(repr=False)


def adapt_detector(
    model: M,
    fit: AnchorFit | float,
    *,
    finer_level: bool = False,
    input_scale: float = 1,
    max_objects: int | None = None,
) -> M:
    """Scales the anchors of a detector, and may give its pyramid a finer level, in place.

    The result is a plain torchvision detector. All its weights stay the same objects, since the
    number of anchors per cell does not change, and the maps of its levels stay bitwise the same.
    FCOS has regression ranges in place of anchors, and these follow the sizes; its
    `center_sampling_radius` is divided by the scale, so that the radius in pixels stays, up to the
    rounding of sizes.

    A trained head gives its boxes in units of the anchors: anchors half as large make the same
    weights predict boxes half as large, until they are trained again. FCOS keeps its boxes if you
    divide weight and bias of its last convolution, `head.regression_head.bbox_reg`, by the scale.

    A checkpoint holds neither anchors nor input size: a script that loads one has to repeat the
    call on a new detector first. Adapt once, before `patch_detector`, and before you make the
    optimizer: an older one does not hold the blocks of a finer level.

    Args:
        model: A torchvision detector, or a module that holds exactly one.
        fit: A row of `compare_anchors`, such as `comparison.best`; or a number by which the anchor
            sizes are multiplied.
        finer_level: Add a level at half the finest stride, down to stride 4. Its anchors are half
            as large as the finest ones.
        input_scale: Multiply `min_size`, `max_size` and `fixed_size` of the transform by this.
        max_objects: The largest number of objects in an image. Detections per image become at
            least this, rounded up to a hundred; candidates per level and the four numbers of the
            RPN at least twice that. No cap becomes lower.

    Returns:
        The model that was given.

    Raises:
        TypeError: If `model` holds no detector or several, has no `AnchorGenerator`, is scripted or
            wrapped in DDP or FSDP; or if an argument has the wrong type, or comes with a row.
        ValueError: If a number is out of range, a size rounds to nothing, the body has no stage for
            a finer level, the transform does not resize, the pyramid has fusion factors, or a row
            starts from other anchors than the detector has. In all cases the model is as it was.

    Examples:
        >>> from torchvision.models import get_model
        >>> model = get_model("retinanet_resnet50_fpn_v2", weights=None, weights_backbone=None)
        >>> model = adapt_detector(model, 0.5, finer_level=True)
        >>> len(model.backbone.fpn.inner_blocks), model.anchor_generator.sizes[0]
        (4, (8.0, 10.0, 12.5))
    """
    refuse_wrappers(model, "adapt before wrapping or scripting")
    detector = find_detector(model)
    anchor_generator(detector)
    scale: Any = fit
    if isinstance(fit, AnchorFit):
        if finer_level is not False or input_scale != 1 or max_objects is not None:
            raise TypeError(
                "fit: expected a row alone, which holds the other arguments, found also "
                f"finer_level={finer_level}, input_scale={input_scale}, max_objects={max_objects}"
            )
        _check_start(detector, fit)
        scale, finer_level, input_scale = fit.anchor_scale, fit.finer_level, fit.input_scale
        max_objects = fit.max_objects
    scale = _positive(scale, "fit", "a row such as comparison.best, or a number")
    input_scale = _positive(input_scale, "input_scale", "a number")
    if not isinstance(finer_level, bool):
        raise TypeError(f"finer_level: expected a bool, found {type(finer_level).__name__}")
    if max_objects is not None:
        max_objects = int(_positive(max_objects, "max_objects", "a whole number", Integral))
    check_heads(detector)
    # Whatever can fail fails on a copy without weights.
    copied = skeleton(detector)
    change(copied, scale, finer_level, input_scale, max_objects)
    _check_maps(copied)
    change(detector, scale, finer_level, input_scale, max_objects)
    return model


def _positive(value: Any, name: str, expected: str, kind: Any = Real) -> float:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name}: expected {expected}, found {type(value).__name__}")
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, found {number:g}")
    return number


def start_of(detector: Any) -> tuple[Cells, tuple[Any, ...]]:
    """Returns what an `AnchorFit` starts from: cell anchors, and the sizes of the transform."""
    cells = anchor_generator(detector).cell_anchors
    names = ("min_size", "max_size", "fixed_size")
    values = (getattr(detector.transform, name, None) for name in names)
    return (
        tuple(tuple(tuple(row) for row in level.tolist()) for level in cells),
        tuple(tuple(v) if isinstance(v, list) else v for v in values),
    )


def _check_start(detector: Any, fit: AnchorFit) -> None:
    anchors, input_sizes = start_of(detector)
    rows = (itertools.chain.from_iterable(levels) for levels in (fit.own_anchors, anchors))
    pairs = (("anchor", *pair) for pair in itertools.zip_longest(*rows))
    for name, expected, found in (("input sizes", fit.own_input, input_sizes), *pairs):
        if expected != found:
            raise ValueError(
                f"fit: expected the {name} {expected} that the row starts from, found {found}: is "
                "the detector already adapted?"
            )


def check_heads(detector: Any) -> None:
    """Raises ValueError if the head has another number of anchors per cell than the generator."""
    head = getattr(getattr(detector, "rpn", detector), "head", None)
    made = {len(cells) for cells in anchor_generator(detector).cell_anchors}
    expected = getattr(getattr(head, "classification_head", None), "num_anchors", None)
    if expected is None:
        expected = getattr(getattr(head, "cls_logits", None), "out_channels", None)
    if expected is not None and made != {expected}:
        raise ValueError(
            f"anchor generator: expected {expected} anchors per cell, as the head has, found "
            f"{' and '.join(map(str, sorted(made)))}"
        )


def _check_maps(detector: Any) -> None:
    """Raises ValueError unless a skeleton makes a feature map for each level of anchors."""
    backbone = detector.backbone
    num_levels = len(anchor_generator(detector).cell_anchors)
    try:
        names = list(run_backbone(backbone, (1, input_channels(backbone), _SIDE, _SIDE)))
        found = f"{len(names)} ({', '.join(map(str, names))})"
    except Exception as error:  # of the user's code
        names, found = [], f"{type(error).__name__}: {' '.join(str(error).split())}"
    if len(names) != num_levels:
        raise ValueError(
            f"model: expected feature maps for {num_levels} levels of anchors, found {found}"
        )


def change(
    detector: Any,
    scale: float,
    finer_level: bool,
    input_scale: float,
    max_objects: int | None = None,
) -> None:
    """Does what `adapt_detector` describes to a detector. If it raises, nothing is changed."""
    backbone = detector.backbone
    if any(isinstance(part, AlphaFeaturePyramidNetwork) for part in backbone.modules()):
        raise ValueError(
            "model: expected a pyramid without fusion factors, found an "
            "AlphaFeaturePyramidNetwork: adapt before patching"
        )
    generator, transform = anchor_generator(detector), detector.transform
    sizes, ratios, cells = scaled_anchors(generator, scale, finer_level)
    resized = _scaled_input(transform, input_scale)
    new: list[str] = []
    renamed: dict[str, str] = {}
    if finer_level:
        name, renamed = _add_finer_level(backbone)
        new = [name]
    generator.sizes, generator.aspect_ratios, generator.cell_anchors = sizes, ratios, cells
    if isinstance(detector, FCOS):
        detector.center_sampling_radius /= scale
    if resized:
        transform.min_size, transform.max_size, transform.fixed_size = resized
    for pool in getattr(detector, "roi_heads", nn.Module()).modules():
        if isinstance(pool, MultiScaleRoIAlign):
            pool.scales = pool.map_levels = None  # kept from its first call
            pooled = [renamed.get(str(name), name) for name in pool.featmap_names]
            pool.featmap_names = list(dict.fromkeys([*new, *pooled]))
    if max_objects is not None:
        _raise_caps(detector, max_objects)


def scaled_anchors(
    generator: AnchorGenerator, scale: float, finer_level: bool = False
) -> tuple[tuple[tuple[float, ...], ...], tuple[tuple[float, ...], ...], list[Tensor]]:
    """Returns sizes, aspect ratios and cell anchors [A, 4] per level, with `scale` times the sizes.

    torchvision makes the anchors from the sizes and rounds them. Anchors that are not made from
    sizes are scaled about their centres. An anchor without area or bounds is a ValueError.
    """
    sizes = [tuple(float(size) * scale for size in level) for level in generator.sizes]
    ratios = [tuple(level) for level in generator.aspect_ratios]
    old = cells = list(generator.cell_anchors)
    if finer_level:
        sizes.insert(0, tuple(size / 2 for size in sizes[0]))
        ratios.insert(0, ratios[0])
        # Half of the centre too if it is not 0: the grid is twice as fine.
        old = [cells[0] / 2, *cells]
    if anchor_sizes(generator):
        cells = [_made(generator, *level) for level in zip(sizes, ratios, old, strict=True)]
    else:
        cells = [_about_centre(cell, scale) for cell in old]
    for i, cell in enumerate(cells):
        for width, height in (cell[:, 2:] - cell[:, :2]).tolist():
            if not 0 < min(width, height) <= max(width, height) < math.inf:
                raise ValueError(
                    f"fit: expected a scale that leaves each anchor an area, found {scale:g}: an "
                    f"anchor on level {i} would have {width:g} x {height:g} pixels"
                )
    return tuple(sizes), tuple(ratios), cells


def _about_centre(cell: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return cell  # without rounding
    exact = cell.to(torch.promote_types(cell.dtype, torch.float32))
    centre = (exact[:, :2] + exact[:, 2:]).repeat(1, 2) / 2
    return (centre + (exact - centre) * scale).to(cell)


def anchor_sizes(generator: AnchorGenerator) -> tuple[tuple[float, ...], ...]:
    """Returns the sizes per level; none if the anchors are not made from them."""
    parts = [generator.sizes, generator.aspect_ratios, generator.cell_anchors]
    if len({len(part) for part in parts}) > 1:
        return ()
    for sizes, ratios, cells in zip(*parts, strict=True):
        made = _made(generator, sizes, ratios, cells)
        if not torch.equal(made, cells):
            return ()
    return tuple(tuple(float(size) for size in level) for level in generator.sizes)


def _made(generator: AnchorGenerator, sizes: Any, ratios: Any, like: Tensor) -> Tensor:
    # On the CPU, as the generator makes them first; a model on meta has its anchors there too.
    with torch.device("cpu"):
        made: Tensor = generator.generate_anchors(sizes, ratios).to(like)
        return made


def _scaled_input(transform: Any, scale: float) -> tuple[Any, ...] | None:
    """Returns min_size, max_size and fixed_size times `scale`; None if they stay."""
    if scale == 1:
        return None
    if not resizes(transform):
        raise ValueError(
            f"input_scale: expected a transform that resizes, found {type(transform).__name__}, "
            "which does not: give it larger images"
        )
    low = tuple(round(side * scale) for side in transform.min_size)
    fixed = transform.fixed_size
    fixed = None if fixed is None else tuple(round(side * scale) for side in fixed)
    resized = low, round(transform.max_size * scale), fixed
    if min(*low, resized[1], *(fixed or low)) < 1:
        raise ValueError(f"input_scale: expected sizes of at least 1, found {resized}")
    return resized


def _raise_caps(detector: Any, max_objects: int) -> None:
    detections = 100 * math.ceil(max_objects / 100)
    heads = getattr(detector, "roi_heads", detector)
    heads.detections_per_img = max(heads.detections_per_img, detections)
    if hasattr(detector, "topk_candidates"):
        detector.topk_candidates = max(detector.topk_candidates, 2 * detections)
    for name in ("_pre_nms_top_n", "_post_nms_top_n"):
        numbers = getattr(getattr(detector, "rpn", None), name, None)
        if numbers is not None:
            raised = {mode: max(n, 2 * detections) for mode, n in numbers.items()}
            setattr(detector.rpn, name, raised)


def _add_finer_level(backbone: Any) -> tuple[str, dict[str, str]]:
    """Gives a pyramid the level at half its finest stride, or raises ValueError.

    Returns the name of its map, and a new name for each old one.
    """
    backbone = backbone._modules.get("_orig_mod", backbone)
    body: Any = getattr(backbone, "body", None)
    fpn: Any = getattr(backbone, "fpn", None)
    if not is_stock(body, IntermediateLayerGetter, "forward"):
        raise ValueError(
            "finer_level: expected a backbone whose body is torchvision's "
            f"IntermediateLayerGetter, found {_class(body)}"
        )
    if type(fpn) is not FeaturePyramidNetwork:
        raise ValueError(f"finer_level: expected a FeaturePyramidNetwork, found {_class(fpn)}")
    stage, channels = _finer_stage(body, input_channels(backbone))
    inner = _like(fpn.inner_blocks[0], channels)
    layer = _like(fpn.layer_blocks[0], inner[0].out_channels)
    old = [str(name) for name in body.return_layers.values()]
    names = [f"finer {stage}" if stage in old else stage, *old]
    if old == [str(i) for i in range(len(old))]:
        names = [*old, str(len(old))]
    body.return_layers = dict(zip([stage, *body.return_layers], names, strict=True))
    fpn.inner_blocks.insert(0, inner)
    fpn.layer_blocks.insert(0, layer)
    return names[0], dict(zip(old, names[1:], strict=True))


def _class(part: Any) -> str:
    return "none" if part is None else type(part).__name__


def _finer_stage(body: Any, num_channels: int) -> tuple[str, int]:
    """Finds the last child at half the finest returned stride: its name and its channels."""
    copied = skeleton(body).eval()
    copied.return_layers = {name: name for name in copied._modules}
    maps = run_backbone(copied, (1, num_channels, _SIDE, _SIDE))
    strides = {name: _SIDE // int(feature.shape[3]) for name, feature in maps.items()}
    shown = ", ".join(f"{name} (stride {stride})" for name, stride in strides.items())
    returned = [name for name in strides if name in body.return_layers]
    found = [strides[name] for name in returned]
    if found[0] < _FINEST_STRIDE:
        raise ValueError(
            f"finer_level: expected a finest level at stride {_FINEST_STRIDE} or more, found "
            f"stride {found[0]}; the stages are {shown}"
        )
    before = itertools.takewhile(lambda name: name != returned[0], strides)
    finer = [name for name in before if 2 * strides[name] == found[0]]
    if len(set(found)) < len(found) or not finer:
        raise ValueError(
            f"finer_level: expected a stage at half the finest stride, {found[0] // 2}, "
            f"and fused maps of different strides, found strides {found} of {returned}; the "
            f"stages are {shown}"
        )
    return finer[-1], int(maps[finer[-1]].shape[1])


def _like(block: Any, in_channels: int) -> Any:
    """Makes a block of a pyramid in the form of another one, initialised as torchvision does."""
    first = block[0] if isinstance(block, nn.Sequential) else None
    if type(first) is not nn.Conv2d:
        raise ValueError(
            "finer_level: expected blocks of the pyramid that are a Sequential with a Conv2d "
            f"first, found {type(block).__name__} with {_class(first)}"
        )
    # Parameters made under inference mode could not be trained.
    with torch.inference_mode(False), torch.no_grad():
        # Without hooks: they are the user's code, and a copy would take along what they refer to.
        hooks: dict[int, Any] = {
            id(value): type(value)()
            for part in block.modules()
            for name, value in vars(part).items()
            if name.endswith("_hooks") and isinstance(value, dict)
        }
        new: Any = copy.deepcopy(block, hooks)
        for part in new.modules():
            if isinstance(part, FrozenBatchNorm2d):
                for buffer in (part.bias, part.running_mean):
                    buffer.zero_()
                for buffer in (part.weight, part.running_var):
                    buffer.fill_(1)
            elif hasattr(part, "reset_parameters"):
                part.reset_parameters()
        made = new[0]
        shape = len(made.weight), in_channels // made.groups, *made.kernel_size
        made.in_channels = in_channels
        made.weight = nn.Parameter(made.weight.new_empty(shape), made.weight.requires_grad)
        nn.init.kaiming_uniform_(made.weight, a=1)
        if made.bias is not None:
            nn.init.zeros_(made.bias)
    return new
