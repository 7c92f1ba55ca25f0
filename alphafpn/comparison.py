"""`compare_anchors`: how well a detector's anchors fit, and how well smaller ones would."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator

from alphafpn.display import table
from alphafpn.estimate.alpha_estimate import AlphaEstimate
from alphafpn.estimate.checks import check_clamp
from alphafpn.estimate.columns import Annotations
from alphafpn.estimate.for_detector import estimate_probe
from alphafpn.estimate.probe import DetectorProbe
from alphafpn.estimate.read import read_annotations
from alphafpn.estimate.report import factor_origin, factors

# Anchor sizes and input size, as multiples of the detector's own.
VARIANTS = ((0.5, 1), (0.25, 1), (0.125, 1), (1.0, 2))
# IoUs from which detectors leave a box out of the background, and from which they take it.
MATCHES = (0.4, 0.5)


@dataclass(frozen=True)
class AnchorFit:
    """One row of an `AnchorComparison`.

    Attributes:
        anchor_scale: Anchor sizes over the detector's own.
        input_scale: Input size over the detector's own.
        anchor_sizes: Per level, as `AnchorGenerator` takes them; empty where the detector's anchors
            are not made from sizes.
        estimate: What `estimate_alpha_for` gives for a detector that is built so.
    """

    anchor_scale: float
    input_scale: int
    anchor_sizes: tuple[tuple[float, ...], ...]
    estimate: AlphaEstimate


@dataclass(frozen=True)
class AnchorComparison:
    """What a detector's own anchors, and others in their place, would give; prints as a table.

    Attributes:
        rows: The detector as it is first.
    """

    rows: tuple[AnchorFit, ...]

    def __str__(self) -> str:
        follows_iou = self.rows[0].estimate.iou_histogram is not None
        what = "anchors" if follows_iou else "ranges"
        shares = [f"IoU >= {iou}" for iou in MATCHES]
        lines = table((what, "input", *shares, "alpha"), [_table_row(row) for row in self.rows])
        if any("*" in line for line in lines):
            lines.append("* set by the clamp, or 1 for want of objects")
        if not follows_iou:
            return "\n".join([*lines, "FCOS matches by regression ranges: they are scaled here"])
        best = max(
            (row for row in self.rows if row.input_scale == 1),
            key=lambda row: row.estimate.recall(MATCHES[1]),
        )
        if best.anchor_sizes:
            levels = (",".join(f"{size:.6g}" for size in level) for level in best.anchor_sizes)
            lines.append(f"best fit at this input: anchor sizes {' '.join(levels)}")
        return "\n".join(lines)

    def to_list(self) -> list[dict[str, Any]]:
        """Returns the rows as strict JSON; `recall` is None where levels do not follow IoU."""
        result = []
        for row in self.rows:
            whole = row.estimate.to_dict()
            result.append(
                {
                    "anchor_scale": row.anchor_scale,
                    "input_scale": row.input_scale,
                    "anchor_sizes": [list(level) for level in row.anchor_sizes],
                    "recall": _recall(row.estimate),
                    **{key: whole[key] for key in ("counts", "ratios", "alpha")},
                }
            )
        return result


def compare_anchors(
    model: nn.Module,
    dataset: Any,
    *,
    category_ids: Collection[int] | None = None,
    clamp: tuple[float, float] | None = (0.2, 2.0),
    progress: bool = False,
) -> AnchorComparison:
    """Counts with the detector's own anchors, with smaller ones, and on an input twice as large.

    Anchor sizes are the detector's own times 1, 1/2, 1/4 and 1/8, rounded as torchvision rounds
    them; then its own once more, with images twice as large. Annotations are read once, no image is
    opened, and the model stays as it is. FCOS has regression ranges in place of anchors, and these
    are scaled.

    A row is left out where it could not be built: where a size rounds to nothing, where two levels
    would be alike, or where a transform of the user's own undoes the enlargement.

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
        ValueError: As `estimate_alpha_for`.

    Examples:
        >>> from torchvision.models import get_model
        >>> model = get_model("fasterrcnn_resnet50_fpn", weights=None, weights_backbone=None)
        >>> boxes = torch.tensor([[10.0, 10.0, 22.0, 25.0], [200, 90, 209, 98]])
        >>> fits = compare_anchors(model, [((480, 640), boxes)])
        >>> [fit.anchor_scale for fit in fits.rows]
        [1.0, 0.5, 0.25, 0.125, 1.0]
    """
    clamp = check_clamp(clamp)
    view = DetectorProbe(model)
    annotations = read_annotations(dataset, category_ids=category_ids, progress=progress)
    return compare_probe(view, annotations, estimate_probe(view, annotations, clamp))


def compare_probe(
    view: DetectorProbe, annotations: Annotations, own: AlphaEstimate
) -> AnchorComparison:
    """Compares as `compare_anchors` does, where the detector as it is has been counted."""
    rows = [AnchorFit(1.0, 1, _sizes(view.generator, 1.0), own)]
    for anchor_scale, input_scale in VARIANTS:
        other = copy.copy(view)
        other.generator = _scaled(view.generator, anchor_scale)
        if any((c[:, 2:] <= c[:, :2]).any() for c in other.generator.cell_anchors):
            continue
        _scale_resize(other, input_scale)
        try:
            estimate = estimate_probe(other, annotations, own.clamp, input_scale)
        except ValueError:  # as the detector itself was counted: two levels are alike now
            continue
        if input_scale == 1 or estimate.mean_size > 1.5 * own.mean_size:
            sizes = _sizes(view.generator, anchor_scale)
            rows.append(AnchorFit(anchor_scale, input_scale, sizes, estimate))
    return AnchorComparison(tuple(rows))


def _scaled(generator: AnchorGenerator, scale: float) -> AnchorGenerator:
    """Makes a generator with `scale` times the sizes; hand-made anchors grow from their centres."""
    other = copy.copy(generator)
    if sizes := _sizes(generator, scale):
        other.cell_anchors = _cells(generator, sizes)
    else:
        centres = [(c[:, :2] + c[:, 2:]).repeat(1, 2) / 2 for c in generator.cell_anchors]
        other.cell_anchors = [
            centre + (cells - centre) * scale
            for cells, centre in zip(generator.cell_anchors, centres, strict=True)
        ]
    return other


def _sizes(generator: AnchorGenerator, scale: float) -> tuple[tuple[float, ...], ...]:
    """Returns sizes per level times `scale`; none where the anchors are not made from sizes."""
    own = tuple(tuple(float(size) for size in level) for level in generator.sizes)
    made = _cells(generator, own)
    if len(made) != len(generator.cell_anchors) or not all(
        torch.equal(a.to(b), b) for a, b in zip(made, generator.cell_anchors, strict=True)
    ):
        return ()
    return tuple(tuple(size * scale for size in level) for level in own)


def _cells(generator: AnchorGenerator, sizes: tuple[tuple[float, ...], ...]) -> list[torch.Tensor]:
    ratios = generator.aspect_ratios
    return [generator.generate_anchors(s, r) for s, r in zip(sizes, ratios, strict=False)]


def _scale_resize(view: DetectorProbe, scale: int) -> None:
    """Makes what the detector resizes to `scale` times as large, if it resizes."""
    if not view.resize.resizes:
        return
    view.resize = copy.copy(view.resize)
    transform = view.resize.transform = copy.copy(view.resize.transform)
    transform.min_size = tuple(scale * size for size in transform.min_size)
    transform.max_size = scale * transform.max_size
    if transform.fixed_size is not None:
        transform.fixed_size = tuple(scale * side for side in transform.fixed_size)


def _recall(estimate: AlphaEstimate) -> dict[str, float] | None:
    if estimate.iou_histogram is None:
        return None
    return {str(iou): estimate.recall(iou) for iou in MATCHES}


def _table_row(row: AnchorFit) -> tuple[str, ...]:
    estimate = row.estimate
    recall = _recall(estimate)
    alpha = [
        f"{factor:.3f}{'*' if factor_origin(factor, ratio) else ' '}"
        for factor, ratio in zip(factors(estimate), estimate.ratios, strict=True)
    ]
    return (
        "own" if row.anchor_scale == 1 else f"own x {Fraction(row.anchor_scale)}",
        "own" if row.input_scale == 1 else f"own x {row.input_scale}",
        *(["-"] * len(MATCHES) if recall is None else [f"{r:.1%}" for r in recall.values()]),
        " ".join(alpha),
    )
