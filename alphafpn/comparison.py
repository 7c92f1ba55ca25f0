"""`compare_anchors`: what a detector reaches as it is, and what it would reach adapted."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from alphafpn.adapt import AnchorFit, anchor_sizes, change, check_heads, scaled_anchors, start_of
from alphafpn.display import new_axes, table
from alphafpn.estimate.anchor_layout import AnchorLayout, check_distinct, largest
from alphafpn.estimate.annotations import Annotations, read_annotations
from alphafpn.estimate.checks import DEFAULT_CLAMP, check_clamp
from alphafpn.estimate.fcos import owned_boxes
from alphafpn.estimate.probe import DetectorProbe, run_backbone, skeleton
from alphafpn.estimate.report import data_problems, factor_origin, factors
from alphafpn.estimate.resize import resizes
from alphafpn.estimate.s_alpha import InputBoxes, estimate_probe, input_boxes
from alphafpn.pyramid import AlphaFeaturePyramidNetwork, remove_factors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# IoUs above which detectors take an anchor for an object, and below which for background.
MATCH, BACKGROUND = 0.5, 0.4
SMALLEST_SCALE, LARGEST_SCALE = 1 / 16, 4.0
# Boxes that the search looks at: first all scales on few, then the best ones on more.
_FEW_BOXES, _MORE_BOXES = 4_000, 20_000
# Two rows whose shares differ by less are taken for equal, and the cheaper one is the best.
_SIMILAR = 0.02
_RELIABLE_BOXES = 50
_SIZE_EDGES = tuple(2.0 ** (k / 2) for k in range(4, 18))  # 4 to 362 px


@dataclass(frozen=True)
class AnchorComparison:
    """A detector as it is and adapted in several ways; prints as a table.

    Attributes:
        rows: The detector as it is; the best anchor scale; the best scale with a finer level, if
            the detector can have one; as it is on an input twice as large; the best scale there.
            FCOS: as it is, with a finer level, and both on an input twice as large.
        is_fcos: Whether boxes are reached by owning a location instead of by IoU.
        size_edges: Bounds of bins of sqrt(width * height), in pixels of the original image.
        boxes_by_size: Boxes in each bin, of those that were looked at.
        reached_by_size: Per row, how many of them are reached.
    """

    rows: tuple[AnchorFit, ...]
    is_fcos: bool
    size_edges: tuple[float, ...]
    boxes_by_size: tuple[int, ...]
    reached_by_size: tuple[tuple[int, ...], ...]

    @property
    def best(self) -> AnchorFit:
        """Returns the row to adapt to, among those on the detector's own input.

        Of the rows within two points of the greatest share reached it is the detector as it is, if
        that is among them, else the cheapest.
        """
        rows = [row for row in self.rows if row.input_scale == 1]
        most = max(row.reached for row in rows)
        similar = [row for row in rows if row.reached >= most - _SIMILAR]
        if self.rows[0] in similar:
            return self.rows[0]
        return min(similar, key=lambda row: row.cost)

    @property
    def call(self) -> str:
        """Returns the line that adapts a detector to the best row."""
        return _call(self.best, f"max_objects={self.best.max_objects}")

    def _verb(self) -> str:
        return "own a location" if self.is_fcos else f"reach IoU {MATCH:g}"

    def __str__(self) -> str:
        best, own = self.best, self.rows[0]
        header = ("anchors", "finer level", "input", self._verb(), "different", "cost", "alpha", "")
        lines = table(header, [_table_row(row, row is best) for row in self.rows])
        if any("*" in line for line in lines):
            lines.append("* set by the clamp, or 1 because a level has no objects")
        if not self.is_fcos:
            lines.append("different: anchors per cell that differ after rounding, by level")
        if best.anchor_sizes:
            named = zip(best.estimate.level_names, best.anchor_sizes, strict=True)
            levels = (f"{name} {','.join(f'{s:.4g}' for s in sizes)}" for name, sizes in named)
            lines.append(f"anchor sizes of the best row: {'; '.join(levels)}")
        if best is own:
            lines.append(
                "There is nothing to adapt: no row at this input reaches 2 points more. The call "
                "only raises caps"
            )
        if own.estimate.num_boxes < _RELIABLE_BOXES:
            lines.append(
                f"The scale is not reliable: {own.estimate.num_boxes} boxes, fewer than "
                f"{_RELIABLE_BOXES}"
            )
        return "\n".join([*lines, self.call])

    def findings(self) -> list[str]:
        """Returns problems of the data; then what loses objects, worst first, with a call each."""
        own, best = self.rows[0], self.best
        crowded, limit = own.estimate.num_crowded, own.estimate.detections_per_image
        found: list[tuple[float, str]] = []
        if best is not own:
            ways = {
                "smaller anchors": best.anchor_scale < 1,
                "larger anchors": best.anchor_scale > 1,
                "a finer level": best.finer_level,
            }
            text = (
                f"{own.reached:.0%} of the boxes {self._verb()}; with "
                f"{' and '.join(way for way, used in ways.items() if used)} {best.reached:.0%}"
            )
            if best.cost > 1.05:
                text += f", for {best.cost:.1f} times the cost"
            found.append((best.reached - own.reached, f"{text}: {self.call}"))
        elif own.reached < 0.5:
            found.append(
                (
                    1 - own.reached,
                    f"{own.reached:.0%} of the boxes {self._verb()}, and no other anchors reach 2 "
                    f"points more. Are the boxes in pixels? Their mean size is "
                    f"{own.estimate.mean_size:.3g} px at the network's input",
                )
            )
        for row in self.rows:
            if row.reached > best.reached + 0.1:  # only on a larger input, see `best`
                text = (
                    f"on an input {row.input_scale} times as large {row.reached:.0%} of the boxes "
                    f"{self._verb()}, for {row.cost:.1f} times the cost"
                )
                call = _call(row, f"input_scale={row.input_scale}, max_objects={row.max_objects}")
                found.append((row.reached - best.reached, f"{text}: {call}"))
        if crowded:
            text = (
                f"{crowded} images hold more objects than the {limit} detections per image that "
                "the detector returns"
            )
            found.append((crowded / own.estimate.num_images, f"{text}: {self.call}"))
        if own.max_objects > 100:
            text = (
                f"an image holds {own.max_objects} objects; evaluations count fewer detections: "
                "COCO and torchmetrics 100 (max_detection_thresholds), evaluate_tiny 200 "
                "(max_detections)"
            )
            found.append((0.0, text))
        losses = [text for _, text in sorted(found, key=lambda pair: -pair[0])]
        return [*data_problems(own.estimate), *losses]

    def to_list(self) -> list[dict[str, Any]]:
        """Returns the rows as strict JSON."""
        names = ("anchor_scale", "finer_level", "input_scale", "reached", "max_objects", "cost")
        result = []
        for row in self.rows:
            whole = row.estimate.to_dict()
            result.append(
                {
                    **{name: getattr(row, name) for name in names},
                    "anchor_sizes": [list(level) for level in row.anchor_sizes],
                    "different_anchors": list(row.different_anchors),
                    "best": row is self.best,
                    **{key: whole[key] for key in ("level_names", "counts", "ratios", "alpha")},
                }
            )
        return result

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draws the share of boxes reached by their size, as it is and adapted (extra `plot`).

        Args:
            axes: Matplotlib axes to draw on; new ones by default.
        """
        axes = new_axes() if axes is None else axes
        middles = [math.sqrt(a * b) for a, b in pairwise(self.size_edges)]
        shown = {"as it is": self.rows[0], "adapted": self.best}
        if self.best is self.rows[0]:
            del shown["adapted"]
        for label, row in shown.items():
            reached = self.reached_by_size[self.rows.index(row)]
            bins = zip(middles, reached, self.boxes_by_size, strict=True)
            points = [(middle, some / boxes) for middle, some, boxes in bins if boxes]
            axes.plot(*zip(*points, strict=True), marker=".", label=label)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("size of a box in pixels of the image")
        axes.set_ylabel("share that owns a location" if self.is_fcos else "share with IoU >= .5")
        axes.legend(frameon=False)
        return axes


def compare_anchors(
    model: nn.Module,
    dataset: Any,
    *,
    category_ids: Collection[int] | None = None,
    clamp: tuple[float, float] | None = DEFAULT_CLAMP,
    progress: bool = False,
) -> AnchorComparison:
    """Counts the boxes that a detector's anchors reach, as it is and adapted in several ways.

    The best anchor scale is searched between 1/16 and 4: the one with which most boxes reach IoU
    .5, then .4, then the one nearest to 1. Annotations are read once, no image is opened, no weight
    is needed, and the model stays as it is. `adapt_detector(model, comparison.best)` adapts it.

    FCOS has no scale to search: its rows count the boxes that own a location in training.

    Args:
        model: As for `estimate_alpha_for`.
        dataset: As for `estimate_alpha_for`.
        category_ids: As for `estimate_alpha_for`.
        clamp: As for `estimate_alpha_for`.
        progress: As for `estimate_alpha_for`.

    Returns:
        One `AnchorFit` for each row, the detector as it is first; it prints as a table.

    Raises:
        TypeError: As `estimate_alpha_for`.
        ValueError: As `estimate_alpha_for`; or if the head has another number of anchors per cell
            than the anchor generator.

    Examples:
        >>> from torchvision.models import get_model
        >>> model = get_model("retinanet_resnet50_fpn_v2", weights=None, weights_backbone=None)
        >>> boxes = torch.tensor([[10.0, 10.0, 22.0, 25.0], [200, 90, 209, 98]])
        >>> comparison = compare_anchors(model, [((480, 640), boxes)] * 30)
        >>> [row.finer_level for row in comparison.rows], comparison.best.reached
        ([False, False, True, False, False], 1.0)
    """
    clamp = check_clamp(clamp)
    probe = DetectorProbe(model)
    check_heads(probe.detector)
    annotations = read_annotations(dataset, category_ids=category_ids, progress=progress)
    return compare_probe(probe, annotations, clamp)


def compare_probe(
    probe: DetectorProbe, annotations: Annotations, clamp: tuple[float, float] | None
) -> AnchorComparison:
    """Compares as `compare_anchors` does, for annotations that have been read."""
    for part in probe.detector.backbone.modules():
        if isinstance(part, AlphaFeaturePyramidNetwork):  # factors move no anchor
            remove_factors(part)
    own_anchors, own_input = start_of(probe.detector)
    # The boxes of FCOS compete, so all of them are looked at.
    step = 1 if probe.is_fcos else max(1, len(annotations.boxes) // _MORE_BOXES)
    rows: list[AnchorFit] = []
    masks: list[NDArray[np.float64]] = []
    first_operations = 0
    for variant, finer_level, input_scale in _variants(probe):
        operations = 0
        for scale in _scales(variant, finer_level, annotations):
            adapted = _scaled(variant, scale)
            estimate = estimate_probe(adapted, annotations, clamp)
            masks.append(_reached(adapted, annotations, step))
            operations = operations or _operations(variant, annotations)
            first_operations = first_operations or operations
            cells = adapted.generator.cell_anchors
            rows.append(
                AnchorFit(
                    anchor_scale=scale,
                    finer_level=finer_level,
                    input_scale=input_scale,
                    anchor_sizes=anchor_sizes(adapted.generator),
                    reached=float(masks[-1].mean()) if probe.is_fcos else estimate.recall(MATCH),
                    max_objects=int(annotations.boxes_per_image.max()),
                    cost=operations / first_operations,
                    estimate=estimate,
                    different_anchors=tuple(len(level.unique(dim=0)) for level in cells),
                    own_anchors=own_anchors,
                    own_input=own_input,
                )
            )
    boxes = annotations.boxes[::step]
    sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1)).clip(_SIZE_EDGES[0], _SIZE_EDGES[-1])
    counted = (np.histogram(sides, _SIZE_EDGES, weights=mask)[0] for mask in (None, *masks))
    by_size, *reached_by_size = (tuple(n.round().astype(int).tolist()) for n in counted)
    return AnchorComparison(
        tuple(rows), probe.is_fcos, _SIZE_EDGES, by_size, tuple(reached_by_size)
    )


def _variants(probe: DetectorProbe) -> Iterator[tuple[DetectorProbe, bool, int]]:
    """Yields each input and set of levels: a probe, whether it has a finer level, the input scale.

    The anchors have the detector's own scale.
    """
    yield probe, False, 1
    finer: DetectorProbe | None = None
    with contextlib.suppress(ValueError):  # if the body has no stage for it
        finer = _changed(probe, True, 1)
    if finer is not None:
        yield finer, True, 1
    if resizes(probe.detector.transform):
        yield _changed(probe, False, 2), False, 2
        if probe.is_fcos and finer is not None:
            yield _changed(finer, False, 2), True, 2


def _changed(probe: DetectorProbe, finer_level: bool, input_scale: int) -> DetectorProbe:
    detector = skeleton(probe.detector)
    change(detector, 1.0, finer_level, input_scale)
    return DetectorProbe(detector, probe)


def _scaled(probe: DetectorProbe, scale: float) -> DetectorProbe:
    """Scales the anchors of a probe; all else is the same object."""
    scaled = copy.copy(probe)
    scaled.generator = generator = copy.copy(probe.generator)
    made = scaled_anchors(generator, scale)
    generator.sizes, generator.aspect_ratios, generator.cell_anchors = made
    return scaled


def _scales(probe: DetectorProbe, finer_level: bool, annotations: Annotations) -> Iterator[float]:
    """Yields the scale of each row on these levels and this input."""
    if probe.is_fcos or not finer_level:
        yield 1.0
    if not probe.is_fcos:
        yield _best_scale(probe, annotations)


def _best_scale(probe: DetectorProbe, annotations: Annotations) -> float:
    """Searches the anchor scale with which most boxes reach IoU .5, then .4, then nearest to 1."""
    seen = [input_boxes(probe, annotations, size) for size in probe.resize.min_sizes]
    whole = largest([layout for part in seen for layout in part.layouts])

    @functools.cache
    def value(scale: float, step: int) -> tuple[float, ...]:
        try:
            cells = scaled_anchors(probe.generator, scale)[2]
            layout = whole.strides, whole.grid_sizes, whole.num_fused_levels
            check_distinct(AnchorLayout(cells, *layout), "the detector")
        except ValueError:  # anchors without area, or levels that cannot be told apart
            return (-1,)
        iou = torch.cat([_best_iou(part, cells, step) for part in seen])
        # As the histogram of an estimate counts.
        matched, near = (int((iou >= least - 1e-6).sum()) for least in (MATCH, BACKGROUND))
        return matched, near, -abs(math.log(scale))

    few, more = (max(1, len(annotations.boxes) // n) for n in (_FEW_BOXES, _MORE_BOXES))
    leaders = [1.0]
    # All scales on few boxes, then those around the best ones on more.
    for per_octave, reach, step, kept in ((16, 64, few, 4), (64, 4, more, 2), (256, 4, more, 1)):
        steps = range(-reach, reach)
        tried = {_rounded(scale * 2 ** (k / per_octave)) for scale in leaders for k in steps}
        tried = {scale for scale in tried if SMALLEST_SCALE <= scale <= LARGEST_SCALE} | {1.0}
        leaders = sorted(tried, key=lambda scale: value(scale, step), reverse=True)[:kept]
    scale = leaders[0]
    while scale != 1:
        # Three digits can be finer than the steps: go to the end that is nearest to 1.
        unit = 10.0 ** (math.floor(math.log10(scale)) - 2)
        closer = _rounded(scale + math.copysign(unit, 1 - scale))
        if value(closer, more) < value(scale, more):
            break
        scale = closer
    return scale


def _rounded(scale: float) -> float:
    """Rounds to three significant digits."""
    return float(f"{scale:.3g}")


def _best_iou(seen: InputBoxes, cells: Sequence[Tensor], step: int) -> Tensor:
    """Computes the best IoU of every `step`-th box with anchors of these cells."""
    layout_index = seen.layout_index.repeat_interleave(seen.boxes_per_image)[::step]
    return seen.matcher(False, cells).match(seen.boxes[::step], layout_index)[1]


def _reached(probe: DetectorProbe, annotations: Annotations, step: int) -> NDArray[np.float64]:
    """Returns for every `step`-th box the share of input sizes at which it is reached."""
    parts = []
    for min_size in probe.resize.min_sizes:
        seen = input_boxes(probe, annotations, min_size)
        cells = seen.layouts[0].cell_anchors
        if probe.is_fcos:
            image = torch.arange(len(seen.layout_index)).repeat_interleave(seen.boxes_per_image)
            owned = owned_boxes(
                seen.boxes,
                image,
                seen.layout_index[image],
                cells,
                torch.tensor([layout.strides for layout in seen.layouts]),
                torch.tensor([layout.grid_sizes for layout in seen.layouts]),
                probe.detector.center_sampling_radius,
            )
            parts.append(owned)
        else:
            parts.append(_best_iou(seen, cells, step) >= MATCH - 1e-6)
    return torch.stack(parts).double().mean(0).numpy()


def _operations(probe: DetectorProbe, annotations: Annotations) -> int:
    """Counts the operations of backbone, pyramid and heads on the median image, without masks."""
    detector, sizes = probe.detector, annotations.image_sizes
    height, width = sizes[np.argsort(sizes.prod(1))[(len(sizes) - 1) // 2]].tolist()
    padded = probe.resize.frame((height, width))[1]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        maps = run_backbone(detector.backbone, (1, probe.num_channels, *padded))
        features = [feature.to("meta") for feature in maps.values()]
        rpn = getattr(detector, "rpn", None)
        if rpn is None:
            detector.head(features)
        else:
            scores, _ = rpn.head(features)
            kept = sum(min(s[0].numel(), rpn._pre_nms_top_n["testing"]) for s in scores)
            kept = min(kept, rpn._post_nms_top_n["testing"])
            heads = detector.roi_heads
            side = heads.box_roi_pool.output_size
            pooled = features[0].new_empty(kept, features[0].shape[1], *side)
            heads.box_predictor(heads.box_head(pooled))
    return int(counter.get_total_flops())


def _call(row: AnchorFit, last: str) -> str:
    finer = ", finer_level=True" if row.finer_level else ""
    return f"adapt_detector(model, {row.anchor_scale:g}{finer}, {last})"


def _table_row(row: AnchorFit, best: bool) -> tuple[str, ...]:
    alpha = [
        f"{factor:.2f}{'*' if factor_origin(factor, ratio) else ' '}"
        for factor, ratio in zip(factors(row.estimate), row.estimate.ratios, strict=True)
    ]
    return (
        "own" if row.anchor_scale == 1 else f"own x {row.anchor_scale:g}",
        "yes" if row.finer_level else "no",
        "own" if row.input_scale == 1 else f"own x {row.input_scale}",
        f"{row.reached:.1%}",
        " ".join(map(str, row.different_anchors)),
        f"{row.cost:.2f}",
        " ".join(alpha),
        "<- best" if best else "",
    )
