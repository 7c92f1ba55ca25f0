"""The table that a person reads: an `AlphaEstimate` as text, and what to be wary of."""

from __future__ import annotations

import math

from alphafpn.display import table
from alphafpn.estimate.level_statistics import LevelStatistics

# Section 4.2 of the paper: training does not converge with factors above this.
LARGEST_STABLE = 1.1
# Mean sizes above this, in pixels at the network's input, gain nothing in the paper.
LARGEST_TINY = 20.0
# Detectors match anchors to objects from about this IoU; fewer boxes reaching it is a bad fit.
USUAL_MATCH = 0.4
GOOD_RECALL = 0.5
# In short trainings factors up to this lost up to 29 points of AP50 in our experiments where what
# makes an object lies far from it, and gained at most 5 where it does not (docs/experiments.md).
LARGEST_HARMFUL = 0.35
CLAMPED = "clamped"
# Objects are often labelled beyond the border; more than this share of them hardly ever.
USUAL_BEYOND = 0.1


def summary(estimate: LevelStatistics) -> str:
    """Lists levels, objects, factors with their intervals, and warnings."""
    lines = table(
        ("level", "stride", "anchors/cell", "objects", "share", "mean best IoU"),
        _level_rows(estimate),
    )
    lines.append("")
    lines += table(("edge", "alpha", "ratio", "95% interval", ""), _factor_rows(estimate))
    lines += ["", *_facts(estimate)]
    lines += [f"warning: {text}" for text in warnings(estimate)]
    return "\n".join(lines + [f"advice: {text}" for text in advice(estimate)])


def advice(estimate: LevelStatistics) -> list[str]:
    """Says what to train with beside these factors: counts do not tell which ones are best."""
    if estimate.num_boxes == 0:
        return []
    found = ["train with factors of 1 and of 0.5 as well: the counts do not tell which is best"]
    low = [_edge(estimate, i) for i, r in enumerate(factors(estimate)) if r <= LARGEST_HARMFUL]
    if low:
        found.append(
            f"factors up to {LARGEST_HARMFUL} ({', '.join(low)}) slow learning down where an "
            "object's surroundings decide what it is: short trainings can lose much"
        )
    return found


def warnings(estimate: LevelStatistics) -> list[str]:
    """Lists what speaks against trusting or using these factors."""
    found = []
    if estimate.num_boxes == 0:
        return ["no boxes were counted: all factors are 1"]
    outside = estimate.left_out.get("outside the image", 0)
    beyond = (estimate.num_clipped + outside) / (estimate.num_boxes + outside)
    if beyond > USUAL_BEYOND:
        found.append(
            f"{beyond:.0%} of the boxes reach beyond their image: in a COCO file they are [x, y, "
            "width, height], elsewhere [x1, y1, x2, y2]; or are height and width swapped?"
        )
    if estimate.mean_size < 1:
        found.append("the mean object is smaller than a pixel: boxes are expected in pixels")
    if empty := _empty_levels(estimate):
        found.append(
            f"no objects on {', '.join(empty)}: the factors beside are the clamp's or 1, not the "
            "data's. Anchors that fit the boxes come first"
        )
    if estimate.clamp is not None:
        low, high = estimate.clamp
        for i, (alpha, ratio) in enumerate(zip(estimate.alpha, estimate.ratios, strict=True)):
            if factor_origin(alpha, ratio) == CLAMPED:
                found.append(
                    f"the clamp [{low:g}, {high:g}] set the factor {_edge(estimate, i)}: "
                    f"the ratio is {ratio:.3g}"
                )
    large = [_edge(estimate, i) for i, r in enumerate(factors(estimate)) if r > LARGEST_STABLE]
    if large:
        found.append(
            f"factors above {LARGEST_STABLE} ({', '.join(large)}): the paper could not make such "
            "training converge"
        )
    if _fits_badly(estimate):
        found.append(
            f"the anchors fit badly: {1 - estimate.recall(USUAL_MATCH):.0%} of the boxes have no "
            f"anchor with IoU >= {USUAL_MATCH} ({1 - estimate.recall(0.3):.0%} none with IoU >= "
            "0.3). Smaller anchors or larger images come before any factor: see compare_anchors"
        )
    if estimate.mean_size > LARGEST_TINY:
        found.append(
            f"the mean object is {estimate.mean_size:.0f} px at the network's input: the paper "
            f"found that factors do not matter above about {LARGEST_TINY:.0f} px"
        )
    if estimate.num_crowded:
        found.append(
            f"{estimate.num_crowded} images hold more than the {estimate.detections_per_image} "
            "objects that the detector may return"
        )
    return found


def anchors_come_first(estimate: LevelStatistics) -> bool:
    """Whether a warning is about the anchors: they fit badly, or leave a level without objects."""
    return bool(_empty_levels(estimate)) or _fits_badly(estimate)


def _empty_levels(estimate: LevelStatistics) -> list[str]:
    fused = zip(estimate.level_names, estimate.counts[: estimate.num_fused_levels], strict=False)
    return [name for name, count in fused if count == 0]


def _fits_badly(estimate: LevelStatistics) -> bool:
    return estimate.iou_histogram is not None and estimate.recall(USUAL_MATCH) < GOOD_RECALL


def _level_rows(estimate: LevelStatistics) -> list[tuple[str, ...]]:
    total = estimate.num_boxes * estimate.num_sizes
    rows: list[tuple[str, ...]] = []
    for i, name in enumerate(estimate.level_names):
        iou = estimate.mean_iou[i]
        rows.append(
            (
                name,
                f"{estimate.strides[i]:g}" if estimate.strides else "-",
                str(estimate.anchors_per_cell[i]) if estimate.anchors_per_cell else "-",
                f"{estimate.counts[i]:,}",
                f"{estimate.counts[i] / total if total else 0:.1%}",
                "-" if math.isnan(iou) or estimate.iou_histogram is None else f"{iou:.2f}",
            )
        )
    return rows


def _factor_rows(estimate: LevelStatistics) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for i, (factor, ratio, (low, high)) in enumerate(
        zip(factors(estimate), estimate.ratios, estimate.confidence_interval(), strict=True)
    ):
        undefined = math.isnan(ratio)
        rows.append(
            (
                _edge(estimate, i),
                f"{factor:.3f}",
                "-" if undefined else f"{ratio:.3f}",
                "-" if undefined else f"{low:.3f} - {high:.3f}",
                factor_origin(factor, ratio),
            )
        )
    return rows


def _facts(estimate: LevelStatistics) -> list[str]:
    sizes = f", each at {estimate.num_sizes} input sizes" if estimate.num_sizes > 1 else ""
    lines = [f"{estimate.num_boxes:,} boxes on {estimate.num_images:,} images{sizes}"]
    if estimate.num_boxes:
        lines[0] += f", mean size {estimate.mean_size:.1f} px at the network's input"
    if estimate.num_unmatched:
        lines.append(f"{estimate.num_unmatched:,} boxes overlap no anchor and are in no level")
    if estimate.left_out:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in estimate.left_out.items())
        lines.append(f"left out: {reasons}")
    return lines


def factors(estimate: LevelStatistics) -> tuple[float, ...]:
    """Returns the factors, or the ratios where a missing clamp leaves them undefined."""
    return estimate.ratios if estimate.clamp is None else estimate.alpha


def factor_origin(factor: float, ratio: float) -> str:
    """Says where a factor comes from that is not the ratio; else nothing."""
    if math.isnan(ratio):
        return "no objects"
    return CLAMPED if factor != ratio else ""


def _edge(estimate: LevelStatistics, i: int) -> str:
    return f"{estimate.level_names[i + 1]} -> {estimate.level_names[i]}"
