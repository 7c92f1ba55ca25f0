"""An `AlphaEstimate` as a person reads it: `summary` as text, and `plot`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from alphafpn.display import new_axes, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from alphafpn.estimate.alpha_estimate import AlphaEstimate

# Section 4.2 of the paper: training does not converge with factors above this.
LARGEST_STABLE = 1.1
# Mean sizes above this, in pixels at the network's input, gain nothing in the paper.
LARGEST_TINY = 20.0
# Detectors match anchors to objects from about this IoU; fewer boxes reaching it is a bad fit.
USUAL_MATCH = 0.4
GOOD_RECALL = 0.5
# In short trainings factors up to this lost up to 29 points of AP50 in our experiments if an object
# is recognised by what lies far from it, and gained at most 5 if not (docs/experiments.md).
LARGEST_HARMFUL = 0.35
CLAMPED = "clamped"
# Objects are often labelled beyond the border; more than this share of them hardly ever.
USUAL_BEYOND = 0.1
# Shares of boxes above these are reported.
USUAL_LEFT_OUT = USUAL_FIT_SWAPPED = 0.01


def summary(estimate: AlphaEstimate) -> str:
    """Lists levels, objects, factors with their intervals, warnings and advice."""
    header = ("level", "stride", "anchors/cell", "objects", "share", "reach IoU .5")
    lines = table(header, _level_rows(estimate))
    lines.append("")
    lines += table(("edge", "alpha", "ratio", "95% interval", ""), _factor_rows(estimate))
    lines += ["", *_facts(estimate)]
    lines += [f"warning: {text}" for text in warnings(estimate)]
    return "\n".join(lines + [f"advice: {text}" for text in advice(estimate)])


def advice(estimate: AlphaEstimate) -> list[str]:
    """Says what to train with besides these factors."""
    if estimate.num_boxes == 0:
        return []
    found = ["also train with factors of 1 and of 0.5: the counts do not tell which are best"]
    low = [edge.name for edge in _edges(estimate) if edge.factor <= LARGEST_HARMFUL]
    if low:
        found.append(
            f"factors up to {LARGEST_HARMFUL} ({', '.join(low)}) can cost many points in short "
            "trainings when objects are recognised by their surroundings"
        )
    return found


def warnings(estimate: AlphaEstimate) -> list[str]:
    """Lists the reasons not to trust or not to use these factors."""
    if estimate.num_boxes == 0:
        return ["no boxes were counted, so all factors are 1"]
    return [
        *data_problems(estimate),
        *_object_warnings(estimate),
        *_anchor_warnings(estimate),
        *_factor_warnings(estimate),
    ]


def data_problems(estimate: AlphaEstimate) -> list[str]:
    """Lists the signs that boxes are not what they are taken for."""
    found = []
    outside = estimate.left_out.get("outside the image", 0)
    leaving, boxes = estimate.num_clipped + outside, estimate.num_boxes + outside
    if leaving > USUAL_BEYOND * boxes:
        found.append(
            f"{leaving / boxes:.0%} of the boxes reach beyond their image. Boxes are [x, y, width, "
            "height] in a COCO file and [x1, y1, x2, y2] elsewhere; or height and width of the "
            "images are swapped"
        )
    swapped = estimate.num_fit_swapped
    if swapped > USUAL_FIT_SWAPPED * boxes and 2 * swapped > leaving:
        found.append(
            f"{swapped:,} boxes leave their image but would fit it with width and height swapped: "
            "were the images rotated by their EXIF orientation?"
        )
    broken = {r: n for r, n in estimate.left_out.items() if r != "other categories"}
    if sum(broken.values()) > USUAL_LEFT_OUT * (estimate.num_boxes + sum(broken.values())):
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in broken.items())
        found.append(f"{sum(broken.values()):,} boxes were left out: {reasons}")
    if estimate.mean_size < 1:
        found.append(
            "the mean object is smaller than a pixel: boxes are expected in pixels, not in shares "
            "of the image"
        )
    return found


def _object_warnings(estimate: AlphaEstimate) -> list[str]:
    found = []
    if estimate.mean_size > LARGEST_TINY:
        found.append(
            f"the mean object is {estimate.mean_size:.0f} px at the network's input: in the paper "
            f"factors made no difference above about {LARGEST_TINY:.0f} px"
        )
    if estimate.num_crowded:
        found.append(
            f"{estimate.num_crowded:,} images hold more than {estimate.detections_per_image} "
            "objects, the most that the detector returns: see adapt_detector(max_objects=)"
        )
    return found


def _anchor_warnings(estimate: AlphaEstimate) -> list[str]:
    found = []
    fused = zip(estimate.level_names, estimate.counts[: estimate.num_fused_levels], strict=False)
    if empty := [name for name, count in fused if count == 0]:
        found.append(
            f"no objects on {', '.join(empty)}: the factors next to these levels come from the "
            "clamp (or default to 1), not from your data. compare_anchors shows whether other "
            "anchors use these levels"
        )
    if estimate.iou_histogram is not None and estimate.recall(USUAL_MATCH) < GOOD_RECALL:
        found.append(
            f"the anchors fit badly: {1 - estimate.recall(USUAL_MATCH):.0%} of the boxes have no "
            f"anchor with IoU >= {USUAL_MATCH}. Fix the anchors or enlarge the input first: see "
            "compare_anchors"
        )
    return found


def _factor_warnings(estimate: AlphaEstimate) -> list[str]:
    found = []
    for edge in _edges(estimate):
        if estimate.clamp is not None and edge.origin == CLAMPED:
            low, high = estimate.clamp
            found.append(
                f"the factor {edge.name} is set by the clamp [{low:g}, {high:g}]: the ratio is "
                f"{edge.ratio:.3g}"
            )
    large = [edge.name for edge in _edges(estimate) if edge.factor > LARGEST_STABLE]
    if large:
        found.append(
            f"factors above {LARGEST_STABLE} ({', '.join(large)}): in the paper such trainings did "
            "not converge"
        )
    return found


def _level_rows(estimate: AlphaEstimate) -> list[tuple[str, ...]]:
    total = estimate.num_boxes * estimate.num_sizes
    return [
        (
            name,
            f"{estimate.strides[i]:g}" if estimate.strides else "-",
            str(estimate.anchors_per_cell[i]) if estimate.anchors_per_cell else "-",
            f"{count:,}",
            f"{count / total if total else 0:.1%}",
            f"{estimate.reached[i] / count:.1%}" if estimate.reached and count else "-",
        )
        for i, (name, count) in enumerate(zip(estimate.level_names, estimate.counts, strict=True))
    ]


def _factor_rows(estimate: AlphaEstimate) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    intervals = estimate.confidence_interval()
    for edge, (low, high) in zip(_edges(estimate), intervals, strict=True):
        shown = "-", "-"
        if not math.isnan(edge.ratio):
            shown = f"{edge.ratio:.3f}", f"{low:.3f} - {high:.3f}"
        rows.append((edge.name, f"{edge.factor:.3f}", *shown, edge.origin))
    return rows


def _facts(estimate: AlphaEstimate) -> list[str]:
    sizes = f", each at {estimate.num_sizes} input sizes" if estimate.num_sizes > 1 else ""
    lines = [f"{estimate.num_boxes:,} boxes on {estimate.num_images:,} images{sizes}"]
    if estimate.num_boxes:
        lines[0] += f", mean size {estimate.mean_size:.1f} px at the network's input"
    if estimate.num_unmatched:
        lines.append(f"{estimate.num_unmatched:,} boxes overlap no anchor and are in no level")
    if other := estimate.left_out.get("other categories"):
        lines.append(f"{other:,} boxes of other categories were not counted")
    lines += [f"note: {count:,} {text}" for text, count in estimate.notes.items()]
    return lines


def factors(estimate: AlphaEstimate) -> tuple[float, ...]:
    """Returns the factors, or without a clamp the ratios, which may be undefined."""
    return estimate.ratios if estimate.clamp is None else estimate.alpha


def factor_origin(factor: float, ratio: float) -> str:
    """Says why a factor differs from its ratio; nothing if it does not."""
    if math.isnan(ratio):
        return "no objects"
    return CLAMPED if factor != ratio else ""


class _Edge(NamedTuple):
    """An edge between two levels, and the factor that weights it."""

    name: str
    factor: float
    ratio: float
    origin: str


def _edges(estimate: AlphaEstimate) -> list[_Edge]:
    names = estimate.level_names
    return [
        _Edge(f"{names[i + 1]} -> {names[i]}", factor, ratio, factor_origin(factor, ratio))
        for i, (factor, ratio) in enumerate(zip(factors(estimate), estimate.ratios, strict=True))
    ]


def plot(estimate: AlphaEstimate, axes: Axes | None = None) -> Axes:
    """Draws objects per level as bars, and above each edge its factor and where it comes from."""
    axes = new_axes() if axes is None else axes
    positions = range(len(estimate.counts))
    bars = axes.bar(positions, estimate.counts, color="#4c78a8", width=0.6)
    axes.bar_label(bars, [f"{n:,}" for n in estimate.counts], fontsize="small")
    axes.set_xticks(list(positions), estimate.level_names)
    axes.set_ylabel("objects")
    axes.set_xlabel("pyramid level")
    top = max(1, *estimate.counts)
    axes.set_ylim(0, top * 1.4)
    axes.set_title(
        f"{estimate.num_boxes:,} boxes on {estimate.num_images:,} images", fontsize="medium"
    )
    for i, edge in enumerate(_edges(estimate)):
        axes.annotate(
            "",
            xy=(i + 0.15, top * 1.13),
            xytext=(i + 0.85, top * 1.13),
            arrowprops={"arrowstyle": "->", "color": "#e45756"},
        )
        label = f"$\\alpha$ = {edge.factor:.2f}"
        axes.text(i + 0.5, top * 1.17, label, ha="center", color="#e45756")
        axes.text(i + 0.5, top * 1.07, edge.origin, ha="center", va="center", fontsize="small")
    return axes
