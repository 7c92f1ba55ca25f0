"""Pictures of results; matplotlib is imported when one is drawn (extra ``plot``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alphafpn.estimate.result.report import factor_origin, factors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from alphafpn.estimate.result.alpha_estimate import AlphaEstimate
    from alphafpn.gradients import GradientShares


def new_axes() -> Axes:
    """Axes of a new figure that needs no display.

    Raises:
        ImportError: without matplotlib; the message names the extra.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plotting needs matplotlib: pip install "alphafpn[plot]"') from error
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Axes = figure.add_subplot()
    return axes


def plot_estimate(estimate: AlphaEstimate, axes: Axes | None = None) -> Axes:
    """Objects per level as bars, and above each edge its factor and where it comes from."""
    axes = new_axes() if axes is None else axes
    positions = range(len(estimate.counts))
    bars = axes.bar(positions, estimate.counts, color="#4c78a8", width=0.6)
    axes.bar_label(bars, [f"{n:,}" for n in estimate.counts], fontsize=8)
    axes.set_xticks(list(positions), estimate.level_names)
    axes.set_ylabel("objects")
    axes.set_xlabel("pyramid level")
    top = max(1, *estimate.counts)
    axes.set_ylim(0, top * 1.4)
    axes.set_title(f"{estimate.num_boxes:,} boxes on {estimate.num_images:,} images", fontsize=10)
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
        axes.text(i + 0.5, top * 1.07, origin, ha="center", va="center", fontsize=8)
    return axes


def plot_gradient_shares(result: GradientShares, axes: Axes | None = None) -> Axes:
    """One stacked bar for each backbone feature, one colour for each pyramid level."""
    axes = new_axes() if axes is None else axes
    palette = ["#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#9d755d"]
    rows = result.shares.nan_to_num().tolist()
    base = [0.0] * len(rows)
    for j, name in enumerate(result.level_names):
        heights = [row[j] for row in rows]
        color = palette[j % len(palette)]
        axes.bar(result.feature_names, heights, bottom=base, width=0.6, label=name, color=color)
        base = [low + height for low, height in zip(base, heights, strict=True)]
    axes.set_ylabel("share of the gradient")
    axes.set_xlabel("backbone feature")
    axes.set_ylim(0, 1)
    axes.legend(title="through", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return axes
