"""Pictures of results; matplotlib is imported when one is drawn (extra ``plot``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from alphafpn.estimate import AlphaEstimate


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
    """Objects per level as bars, and above each edge its factor."""
    axes = new_axes() if axes is None else axes
    positions = range(len(estimate.counts))
    bars = axes.bar(positions, estimate.counts, color="#4c78a8", width=0.6)
    axes.bar_label(bars, [f"{n:,}" for n in estimate.counts], fontsize=8)
    axes.set_xticks(list(positions), estimate.level_names)
    axes.set_ylabel("objects")
    axes.set_xlabel("pyramid level")
    top = max(1, *estimate.counts)
    axes.set_ylim(0, top * 1.35)
    factors = estimate.ratios if estimate.clamp is None else estimate.alpha
    for i, factor in enumerate(factors):
        axes.annotate(
            "",
            xy=(i + 0.15, top * 1.13),
            xytext=(i + 0.85, top * 1.13),
            arrowprops={"arrowstyle": "->", "color": "#e45756"},
        )
        axes.text(i + 0.5, top * 1.17, f"$\\alpha$ = {factor:.2f}", ha="center", color="#e45756")
    return axes
