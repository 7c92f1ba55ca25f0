"""`AnchorComparison`: what a detector's own anchors, and others in their place, would give."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from alphafpn.estimate.result.alpha_estimate import AlphaEstimate
from alphafpn.estimate.result.report import factor_origin, factors, table

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
        lines = table((what, "input", *shares, "alpha"), [_cells(row) for row in self.rows])
        if any("*" in line for line in lines):
            lines.append("* set by the clamp, or 1 for want of objects")
        if not follows_iou:
            return "\n".join([*lines, "FCOS matches by regression ranges: they are scaled here"])
        best = max(
            (row for row in self.rows if row.input_scale == 1),
            key=lambda row: row.estimate.recall(MATCHES[-1]),
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


def _recall(estimate: AlphaEstimate) -> dict[str, float] | None:
    if estimate.iou_histogram is None:
        return None
    return {str(iou): estimate.recall(iou) for iou in MATCHES}


def _cells(row: AnchorFit) -> tuple[str, ...]:
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
