"""The picture of an `AlphaEstimate`; matplotlib is imported when it is drawn (extra `plot`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alphafpn.display import new_axes
from alphafpn.estimate.level_statistics import LevelStatistics
from alphafpn.estimate.report import factor_origin, factors

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(estimate: LevelStatistics, axes: Axes | None = None) -> Axes:
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
    for i, (factor, ratio) in enumerate(zip(factors(estimate), estimate.ratios, strict=True)):
        axes.annotate(
            "",
            xy=(i + 0.15, top * 1.13),
            xytext=(i + 0.85, top * 1.13),
            arrowprops={"arrowstyle": "->", "color": "#e45756"},
        )
        label = f"$\\alpha$ = {factor:.2f}"
        axes.text(i + 0.5, top * 1.17, label, ha="center", color="#e45756")
        origin = factor_origin(factor, ratio)
        axes.text(i + 0.5, top * 1.07, origin, ha="center", va="center", fontsize="small")
    return axes
