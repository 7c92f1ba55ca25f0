"""`compare_anchors`: what a detector reaches as it is, and what it would reach adapted."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from alphafpn.adapt import AnchorFit, anchor_sizes, change, check_heads, scaled_anchors, start_of
from alphafpn.display import new_axes, table
from alphafpn.estimate.anchor_layout import AnchorLayout, check_distinct, largest
from alphafpn.estimate.annotations import Annotations, read_annotations
from alphafpn.estimate.checks import DEFAULT_CLAMP, check_clamp
from alphafpn.estimate.fcos import owned_boxes
from alphafpn.estimate.probe import DetectorProbe, run_backbone, skeleton
from alphafpn.estimate.report import factor_origin, factors
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
        return min(similar, key=lambda row: (row.cost, -row.reached))

    @property
    def call(self) -> str:
        """Returns the line that adapts a detector to the best row."""
        row = self.best
        finer = ", finer_level=True" if row.finer_level else ""
        return f"adapt_detector(model, {row.anchor_scale:g}{finer}, max_objects={row.max_objects})"

    def __str__(self) -> str:
        best = self.best
        reached = "own a location" if self.is_fcos else f"reach IoU {MATCH:g}"
        header = ("anchors", "finer level", "input", reached, "different", "cost", "alpha", "")
        lines = table(header, [_table_row(row, row is best) for row in self.rows])
        if any("*" in line for line in lines):
            lines.append("* set by the clamp, or 1 because a level has no objects")
        if not self.is_fcos:
            lines.append("different: anchors per cell that differ after rounding, by level")
        if best.anchor_sizes:
            named = zip(best.estimate.level_names, best.anchor_sizes, strict=True)
            levels = (f"{name} {','.join(f'{s:.4g}' for s in sizes)}" for name, sizes in named)
            lines.append(f"anchor sizes of the best row: {'; '.join(levels)}")
        if best is self.rows[0]:
            lines.append("There is nothing to adapt: no row at this input reaches more by 2 points")
        if best.estimate.num_boxes < _RELIABLE_BOXES:
            lines.append(
                f"The scale is not reliable: {best.estimate.num_boxes} boxes, fewer than "
                f"{_RELIABLE_BOXES}"
            )
        return "\n".join([*lines, self.call])

    def findings(self) -> list[str]:
        """Returns what loses objects, worst first, each with the line that mends it."""
        own, best = self.rows[0], self.best
        found: list[tuple[float, str]] = []
        verb = "own a location" if self.is_fcos else f"reach IoU {MATCH:g}"
        if best is not own:
            ways = ["smaller anchors" if best.anchor_scale < 1 else "larger anchors"]
            ways = ways * (best.anchor_scale != 1) + ["a finer level"] * best.finer_level
            found.append(
                (
                    best.reached - own.reached,
                    f"{own.reached:.0%} of the boxes {verb}; with {' and '.join(ways)} "
                    f"{best.reached:.0%}: {self.call}",
                )
            )
        for row in self.rows:
            if row.input_scale > 1 and row.reached > best.reached + 0.1:
                scale = f"{row.anchor_scale:g}"
                finer = ", finer_level=True" * row.finer_level
                found.append(
                    (
                        row.reached - best.reached,
                        f"on an input {row.input_scale} times as large {row.reached:.0%} of the "
                        f"boxes {verb}, for {row.cost:.1f} times the cost: adapt_detector(model, "
                        f"{scale}{finer}, input_scale={row.input_scale})",
                    )
                )
        limit = own.estimate.detections_per_image
        if limit is not None and own.max_objects > limit:
            found.append(
                (
                    own.estimate.num_crowded / own.estimate.num_images,
                    f"{own.estimate.num_crowded} images hold more objects than the {limit} "
                    f"detections per image that the detector returns: {self.call}",
                )
            )
        if own.max_objects > 100:
            found.append(
                (
                    0.0,
                    f"an image holds {own.max_objects} objects; evaluations count fewer "
                    "detections: COCO and torchmetrics 100 (max_detection_thresholds), "
                    "evaluate_tiny 200 (max_detections)",
                )
            )
        return [text for _, text in sorted(found, key=lambda pair: -pair[0])]

    def to_list(self) -> list[dict[str, Any]]:
        """Returns the rows as strict JSON."""
        result = []
        for row in self.rows:
            whole = row.estimate.to_dict()
            result.append(
                {
                    "anchor_scale": row.anchor_scale,
                    "finer_level": row.finer_level,
                    "input_scale": row.input_scale,
                    "anchor_sizes": [list(level) for level in row.anchor_sizes],
                    "different_anchors": list(row.different_anchors),
                    "reached": row.reached,
                    "max_objects": row.max_objects,
                    "cost": row.cost,
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
        shown = {"as it is": 0}
        if self.best is not self.rows[0]:
            shown["adapted"] = self.rows.index(self.best)
        for label, row in shown.items():
            points = [
                (middle, reached / boxes)
                for middle, reached, boxes in zip(
                    middles, self.reached_by_size[row], self.boxes_by_size, strict=True
                )
                if boxes
            ]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
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
    rows, masks = [], []
    start = start_of(probe.detector)
    median = annotations.image_sizes[
        np.argsort(annotations.image_sizes.prod(1))[(len(annotations.image_sizes) - 1) // 2]
    ]
    operations: dict[tuple[bool, int], int] = {}
    step = max(1, len(annotations.boxes) // _MORE_BOXES)
    for scale, variant, finer, enlarged in _variants(probe, annotations):
        estimate = estimate_probe(variant, annotations, clamp)
        # The boxes of FCOS compete, so all of them are looked at.
        reached = _reached(variant, annotations, 1 if variant.is_fcos else step)
        key = finer, enlarged
        if key not in operations:
            operations[key] = _operations(variant, (int(median[0]), int(median[1])))
        rows.append(
            AnchorFit(
                anchor_scale=scale,
                finer_level=finer,
                input_scale=enlarged,
                anchor_sizes=anchor_sizes(variant.generator),
                reached=float(reached.mean()) if variant.is_fcos else estimate.recall(MATCH),
                max_objects=int(annotations.boxes_per_image.max()),
                cost=operations[key] / operations[False, 1],
                estimate=estimate,
                different_anchors=tuple(
                    len(cells.unique(dim=0)) for cells in variant.generator.cell_anchors
                ),
                own_anchors=start[0],
                own_input=start[1],
            )
        )
        masks.append(reached[::step] if variant.is_fcos else reached)
    boxes = annotations.boxes[::step]
    sides = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    bins = np.clip(np.digitize(sides, _SIZE_EDGES) - 1, 0, len(_SIZE_EDGES) - 2)
    by_size = [
        tuple(np.bincount(bins, weights, len(_SIZE_EDGES) - 1).round().astype(int).tolist())
        for weights in (None, *masks)
    ]
    return AnchorComparison(tuple(rows), probe.is_fcos, _SIZE_EDGES, by_size[0], tuple(by_size[1:]))


def _variants(
    probe: DetectorProbe, annotations: Annotations
) -> Iterator[tuple[float, DetectorProbe, bool, int]]:
    """Yields scale, probe, finer level and input scale of each row."""
    yield 1.0, probe, False, 1
    finer: DetectorProbe | None = None
    with contextlib.suppress(ValueError):  # if the body has no stage for it
        finer = _adapted(probe, probe, 1.0, True, 1)
    if probe.is_fcos:
        if finer is not None:
            yield 1.0, finer, True, 1
    else:
        scale = _best_scale(probe, annotations, probe, False)
        yield scale, _adapted(probe, probe, scale, False, 1), False, 1
        if finer is not None:
            scale = _best_scale(finer, annotations, probe, True)
            yield scale, _adapted(probe, finer, scale, True, 1), True, 1
    if not probe.resize.resizes:
        return
    larger = _adapted(probe, probe, 1.0, False, 2)
    yield 1.0, larger, False, 2
    if not probe.is_fcos:
        scale = _best_scale(larger, annotations, probe, False)
        yield scale, _adapted(probe, larger, scale, False, 2), False, 2
    elif finer is not None:
        yield 1.0, _adapted(probe, finer, 1.0, True, 2), True, 2


def _adapted(
    probe: DetectorProbe, like: DetectorProbe, scale: float, finer_level: bool, input_scale: int
) -> DetectorProbe:
    """Adapts a copy of the detector; `like` is a probe with the same levels."""
    detector = skeleton(probe.detector)
    for part in detector.backbone.modules():
        if isinstance(part, AlphaFeaturePyramidNetwork):  # factors move no anchor
            remove_factors(part)
    change(detector, scale, finer_level, input_scale)
    return DetectorProbe(detector, like)


def _best_scale(
    variant: DetectorProbe, annotations: Annotations, probe: DetectorProbe, finer_level: bool
) -> float:
    """Searches the anchor scale with which most boxes reach IoU .5, then .4, then nearest to 1."""
    seen = [input_boxes(variant, annotations, size) for size in variant.resize.min_sizes]
    whole = largest([layout for part in seen for layout in part.layouts])
    found: dict[tuple[float, int], tuple[int, int, float]] = {}

    def value(scale: float, step: int) -> tuple[int, int, float]:
        if (scale, step) not in found:
            found[scale, step] = (-1, -1, 0.0)
            try:
                cells = scaled_anchors(probe.generator, scale, finer_level)[2]
                check_distinct(
                    AnchorLayout(cells, whole.strides, whole.grid_sizes, whole.num_fused_levels),
                    "the detector",
                )
            except ValueError:  # anchors without area, or levels that cannot be told apart
                return found[scale, step]
            iou = torch.cat([_best_iou(part, cells, step) for part in seen])
            # As the histogram of an estimate counts.
            found[scale, step] = (
                int((iou >= MATCH - 1e-6).sum()),
                int((iou >= BACKGROUND - 1e-6).sum()),
                -abs(math.log(scale)),
            )
        return found[scale, step]

    few, more = (max(1, len(annotations.boxes) // n) for n in (_FEW_BOXES, _MORE_BOXES))
    steps = round(16 * math.log2(LARGEST_SCALE / SMALLEST_SCALE))
    coarse = {_rounded(SMALLEST_SCALE * 2 ** (k / 16)) for k in range(steps + 1)} | {1.0}
    leaders = sorted(coarse, key=lambda scale: value(scale, few), reverse=True)[:4]
    for spread in (64, 256):
        near = {_rounded(scale * 2 ** (k / spread)) for scale in leaders for k in range(-4, 5)}
        near = {scale for scale in near if SMALLEST_SCALE <= scale <= LARGEST_SCALE} | {1.0}
        leaders = sorted(near, key=lambda scale: value(scale, more), reverse=True)[:2]
    scale = leaders[0]
    while scale != 1:
        # The share is flat between two roundings of an anchor: go to the end that is nearer to 1.
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


def _reached(variant: DetectorProbe, annotations: Annotations, step: int) -> Any:
    """Returns for every `step`-th box the share of input sizes at which it is reached."""
    parts = []
    for min_size in variant.resize.min_sizes:
        seen = input_boxes(variant, annotations, min_size)
        cells = list(seen.layouts[0].cell_anchors)
        if variant.is_fcos:
            image = torch.arange(len(seen.layout_index)).repeat_interleave(seen.boxes_per_image)
            owned = owned_boxes(
                seen.boxes,
                image,
                seen.layout_index[image],
                cells,
                torch.tensor([layout.strides for layout in seen.layouts]),
                torch.tensor([layout.grid_sizes for layout in seen.layouts]),
                variant.detector.center_sampling_radius,
            )
            parts.append(owned.double())
        else:
            parts.append((_best_iou(seen, cells, step) >= MATCH - 1e-6).double())
    return torch.stack(parts).mean(0).numpy()


def _operations(probe: DetectorProbe, size: tuple[int, int]) -> int:
    """Counts the operations of backbone, pyramid and heads on one image, without its masks."""
    detector = probe.detector
    padded = probe.resize.frame(size)[1]
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
