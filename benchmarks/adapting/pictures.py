"""The pictures: what each step gives, what it costs, what reach predicts, what factors add."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.adapting.analysis import Runs
from benchmarks.adapting.rows import FITS, NAMES, Row

_COLOURS = {
    Row.STOCK: "#9e9e9e",
    Row.SCALE: "#8fb8de",
    Row.ADAPTED: "#1f5f99",
    Row.HALF: "#3a9a5b",
    Row.ESTIMATED: "#b3446c",
    Row.LARGER: "#e0a030",
}
_SIZE = 13  # of letters, so that a picture can be read at 400 pixels


def draw_steps(figure: Any, runs: Runs) -> None:
    """A panel for each data set, a bar for each step, with its interval."""
    rows = (Row.STOCK, Row.SCALE, Row.ADAPTED, Row.HALF, Row.ESTIMATED, Row.LARGER)
    figure.set_size_inches(6.2, 7.6)
    panels = figure.subplots(4, 2, sharex=True).ravel()
    for axes, data in zip(panels, runs.by_row, strict=False):
        means = [runs.mean(data, row) for row in rows]
        axes.barh(
            range(len(rows)),
            [mean.mean for mean in means],
            xerr=np.nan_to_num([mean.half for mean in means]),
            color=[_COLOURS[row] for row in rows],
            error_kw={"lw": 1},
        )
        axes.set_title(data, fontsize=_SIZE, pad=3)
        axes.set(yticks=[], xlim=(0, 100))
        axes.invert_yaxis()
        axes.tick_params(labelsize=_SIZE - 2)
    for axes in panels[len(runs.by_row) :]:
        axes.axis("off")
    labels = [
        "stock",
        "best anchors",
        "+ finer level",
        "+ factors of .5",
        "+ S-alpha",
        "stock, input x 2",
    ]
    handles = [panels[0].barh([0], [0], color=_COLOURS[row]) for row in rows]
    panels[-1].legend(handles, labels, fontsize=_SIZE - 2, loc="center", frameon=False)
    for axes in panels[len(runs.by_row) - 2 : len(runs.by_row)]:
        axes.set_xlabel("AP50", fontsize=_SIZE)
        axes.tick_params(labelbottom=True)


def draw_cost(figure: Any, runs: Runs) -> None:
    """Gain over stock against operations: dots for data sets, a diamond for their mean."""
    rows = (Row.STOCK, Row.SCALE, Row.ADAPTED, Row.LARGER)
    figure.set_size_inches(6.2, 3.8)
    axes = figure.subplots()
    for data in runs.by_row:
        for row in runs.rows(data, rows[1:]):
            cost = runs.average(data, row, "cost")
            axes.plot(
                cost, runs.gain(data, row, Row.STOCK).mean, "o", color=_COLOURS[row], alpha=0.45
            )
    for row in rows[1:]:
        costs = [runs.average(data, row, "cost") for data in runs.by_row if runs.rows(data, [row])]
        mean = runs.over_sets(row, Row.STOCK)
        style = {"ms": 11, "capsize": 4, "color": _COLOURS[row], "label": NAMES[row]}
        axes.errorbar(np.mean(costs), mean.mean, yerr=np.nan_to_num(mean.half), fmt="D", **style)
    axes.axhline(0, color="grey", lw=0.8)
    axes.set_xlabel("operations, stock = 1", fontsize=_SIZE)
    axes.set_ylabel("AP50 - stock", fontsize=_SIZE)
    axes.tick_params(labelsize=_SIZE - 1)
    axes.legend(fontsize=_SIZE - 2, loc="best")


def draw_reach(figure: Any, runs: Runs) -> None:
    """AP50 against reach: rows at the input's own size on a line, the larger input as a square."""
    figure.set_size_inches(6.2, 4.2)
    axes = figure.subplots()
    for index, data in enumerate(runs.by_row):
        for rows, style in ((FITS[:-1], "o-"), (FITS[-1:], "s")):
            points = [
                (100 * runs.average(data, row, "reached"), runs.mean(data, row).mean)
                for row in runs.rows(data, rows)
            ]
            label = data if style == "o-" else None
            if points:
                x, y = zip(*sorted(points), strict=True)
                axes.plot(
                    x,
                    y,
                    style,
                    color=f"C{index}",
                    mfc="white" * (style == "s") or None,
                    label=label,
                )
    axes.plot([], [], "s", color="grey", mfc="white", label=NAMES[Row.LARGER])
    axes.set_xlabel("boxes that reach IoU .5, %", fontsize=_SIZE)
    axes.set_ylabel("AP50", fontsize=_SIZE)
    axes.tick_params(labelsize=_SIZE - 1)
    axes.legend(fontsize=_SIZE - 3, ncols=2)


def draw_factors(figure: Any, runs: Runs) -> None:
    """Gain of each kind of factor over factors of 1: data sets as dots, their mean as a diamond."""
    rows = [Row.HALF, Row.ESTIMATED, Row.LEARNABLE, Row.FIRST, Row.NONE]
    figure.set_size_inches(6.2, 4.2)
    axes = figure.subplots()
    for place, row in enumerate(rows):
        for index, data in enumerate(runs.by_row):
            gain = runs.gain(data, row, Row.ADAPTED)
            offset = place + 0.07 * (index - 3)
            axes.errorbar(
                gain.mean, offset, xerr=np.nan_to_num(gain.half), fmt="o", color=f"C{index}",
                label=data if place == 0 else None, lw=1,
            )  # fmt: skip
        axes.plot(runs.over_sets(row, Row.ADAPTED).mean, place, "D", color="black", ms=8)
    axes.axvline(0, color="grey", lw=0.8)
    axes.set_yticks(range(len(rows)), [NAMES[row] for row in rows], fontsize=_SIZE)
    axes.invert_yaxis()
    axes.set_xlabel("AP50 - factors of 1", fontsize=_SIZE)
    axes.tick_params(axis="x", labelsize=_SIZE - 1)
    axes.legend(fontsize=_SIZE - 4)
