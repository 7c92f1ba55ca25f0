"""Tables and pictures from the records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from benchmarks.adapting.analysis import FITS, Runs, prediction, regrets, studies
from benchmarks.adapting.experiment import (
    ADAPTED,
    ESTIMATED,
    FACTORS,
    FIRST,
    HALF,
    LARGER,
    LEARNABLE,
    NONE,
    SCALE,
    STOCK,
)
from benchmarks.intervals import mean_of, paired
from benchmarks.markdown import fill, fold, table
from benchmarks.records import Record

Line: TypeAlias = tuple[str, Runs, str]  # a label, and a row of some runs

_MARK = "adapting"
_NAMES = {
    STOCK: "stock",
    SCALE: "best anchors",
    ADAPTED: "anchors and finer level",
    LARGER: "larger input",
    HALF: "factors of .5",
    ESTIMATED: "S-alpha",
    LEARNABLE: "learnable",
    FIRST: "first function",
    NONE: "factors of 0",
}
_COLOURS = {
    STOCK: "#9e9e9e",
    SCALE: "#8fb8de",
    ADAPTED: "#1f5f99",
    HALF: "#3a9a5b",
    ESTIMATED: "#b3446c",
    LARGER: "#e0a030",
}
_SIZE = 13  # of letters, so that a picture can be read at 400 pixels


def write(records: Sequence[Record], page: Path) -> None:
    """Draws the pictures, and writes the tables between the marks of the page."""
    found = studies(records)
    (main,) = found["main"]
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    parts: list[str] = []
    for title, name, draw, show in (
        ("What each step gives", "steps", draw_steps, steps),
        ("What it costs", "cost", draw_cost, cost),
        ("What the share of reached boxes predicts", "reach", draw_reach, reach),
        ("Factors on the adapted detector", "factors", draw_factors, factors),
    ):
        _save(images / f"adapting-{name}.svg", main, draw)
        parts += [f"## {title}", f"![{title}](images/adapting-{name}.svg)", show(main)]
    further: dict[str, tuple[str, Callable[[list[Runs], Runs], str]]] = {
        "order": ("Factors on the stock detector", _order),
        "long": ("Four times the steps", _long),
        "heads": ("Other detectors", _heads),
        "starts": ("Other starts", _starts),
        "rates": ("Learning rates", _rates),
    }
    for study, (title, show_groups) in further.items():
        if study in found:
            parts += [f"## {title}", show_groups(found[study], main)]
    parts.append(fold("Settings of each data set", settings(main)))
    fill(page, _MARK, ["\n\n".join(parts)])


def differences(base: Line, others: Sequence[Line]) -> str:
    """A table: AP50 of the first line, and how much better the others are, by data set."""
    label, runs, row = base
    sets = [data for data in runs.by_row if runs.rows(data, [row])]
    means = [runs.mean(data, row).mean for data in sets]
    lines = [[label, *(f"{mean:.1f}" for mean in means), f"{np.mean(means):.1f}"]]
    for label, found, other in others:
        gains = [
            mean_of(paired(found.values(data, other), runs.values(data, row))) for data in sets
        ]
        over = mean_of([gain.mean for gain in gains if gain.count])
        cells = [f"{gain} ({gain.count})" if gain.count else "" for gain in gains]
        lines.append([label, *cells, str(over)])
    return table(["", *sets, "mean of the sets"], lines)


def steps(runs: Runs) -> str:
    """What each step adds, over stock and over the step before."""
    over_stock = [(_NAMES[row], runs, row) for row in (SCALE, ADAPTED, LARGER)]
    before = (_NAMES[SCALE], runs, SCALE), [(_NAMES[ADAPTED], runs, ADAPTED)]
    return "\n\n".join(
        [
            differences(("stock", runs, STOCK), over_stock),
            "Over the step before, and over the larger input:",
            differences(*before),
            differences((_NAMES[LARGER], runs, LARGER), [(_NAMES[ADAPTED], runs, ADAPTED)]),
        ]
    )


def cost(runs: Runs) -> str:
    """Operations, seconds of training and gain of each row, in the mean of the data sets."""

    def over_stock(row: str, name: str) -> float:
        sets = [data for data in runs.by_row if runs.rows(data, [row])]
        values = [runs.average(data, row, name) / runs.average(data, STOCK, name) for data in sets]
        return float(np.mean(values))

    lines = [
        [
            _NAMES[row],
            f"{over_stock(row, 'cost'):.2f}",
            f"{over_stock(row, 'cpu_seconds_of_training'):.2f}",
            str(runs.over_sets(row, STOCK)),
        ]
        for row in (SCALE, ADAPTED, LARGER)
    ]
    return table(["", "operations / stock", "seconds of training / stock", "AP50 - stock"], lines)


def reach(runs: Runs) -> str:
    """Reach and AP50 of each row; rank correlation; what the best row by reach loses."""
    found, lost = prediction(runs), regrets(runs)
    head = [
        "data",
        *(f"{_NAMES[row]}: reached, AP50" for row in FITS),
        "rank correlation",
        "regret",
    ]
    lines = []
    for data in runs.by_row:
        cells = [
            f"{runs.average(data, row, 'reached'):.0%}, {runs.mean(data, row).mean:.1f}"
            if runs.rows(data, [row])
            else ""
            for row in FITS
        ]
        lines.append([data, *cells, f"{found.by_data[data]:.2f}", f"{lost.get(data, np.nan):.1f}"])
    wider = list(regrets(runs, FITS).values())
    text = (
        f"Rank correlation of the share of reached boxes with AP50 over the rows of a data set: "
        f"{found.mean:.2f} in the mean of {len(found.by_data)} data sets, 95 % interval "
        f"{found.low:.2f} to {found.high:.2f}. `comparison.best` is "
        f"{np.mean(list(lost.values())):.1f} points below the best row by AP50 in the mean, "
        f"{max(lost.values()):.1f} at worst; with the larger input among the rows "
        f"{np.mean(wider):.1f} and {max(wider):.1f}."
    )
    return f"{table(head, lines)}\n\n{text}"


def factors(runs: Runs) -> str:
    """Paired differences to factors of 1, and of S-alpha to .5."""
    lines = [(_NAMES[row], runs, row) for row in FACTORS]
    parts = [
        differences(("factors of 1", runs, ADAPTED), lines),
        differences(("factors of .5", runs, HALF), [("S-alpha", runs, ESTIMATED)]),
    ]
    return "\n\n".join(parts)


def settings(runs: Runs) -> str:
    """What the runs of each data set have in common."""
    head = ["data", "images", "crop", "steps", "best row", "finest anchors, px", "S-alpha"]
    lines = []
    for data in runs.by_row:
        record = runs.any(data, ADAPTED)
        config, estimated = record["config"], runs.any(data, ESTIMATED)
        lines.append(
            [
                data,
                f"{config['train']}, {config['val']}",
                str(config["crop"]),
                f"{config['steps']} of {config['batch']}",
                f"{config['anchor_scale']:g}" + ", finer level" * config["finer_level"],
                ", ".join(f"{size:.1f}" for size in record["anchor_sizes"][0]),
                ", ".join(f"{factor:.2f}" for factor in estimated["alpha"]),
            ]
        )
    return table(head, lines)


def _order(groups: list[Runs], main: Runs) -> str:
    (runs,) = groups
    rows = sorted({row for rows in runs.by_row.values() for row in rows})
    lines = [(row, runs, row) for row in rows]
    return differences(("stock", main, STOCK), lines)


def _long(groups: list[Runs], _: Runs) -> str:
    (runs,) = groups
    lines = [(_NAMES[row], runs, row) for row in (HALF, ESTIMATED)]
    parts = [
        differences(("stock", runs, STOCK), [(_NAMES[ADAPTED], runs, ADAPTED)]),
        differences((_NAMES[ADAPTED], runs, ADAPTED), lines),
    ]
    return "\n\n".join(parts)


def _heads(groups: list[Runs], _: Runs) -> str:
    by_kind: dict[str, list[Line]] = {}
    for runs in groups:
        setting = runs.setting
        extra = [
            f"{name} {setting[name]}" for name in ("scale", "radius", "roi") if name in setting
        ]
        for row in sorted({row for rows in runs.by_row.values() for row in rows}):
            line = ", ".join([setting["detector"], row, *extra]), runs, row
            by_kind.setdefault(setting["detector"], []).append(line)
    parts = []
    for lines in by_kind.values():
        base = next(line for line in lines if line[2] == STOCK)
        parts.append(differences(base, [line for line in lines if line is not base]))
    return "\n\n".join(parts)


def _starts(groups: list[Runs], main: Runs) -> str:
    found = {(runs.setting["start"], runs.setting["finer_start"]): runs for runs in groups}
    found["imagenet", "random"] = Runs(main.setting, {d: main.by_row[d] for d in groups[0].by_row})
    names = {"imagenet": "ImageNet's body", "cells2": "a detector trained on larger cells"}
    parts = []
    for start, name in names.items():
        base = f"from {name}; finer level: random", found[start, "random"], ADAPTED
        parts.append(differences(base, [("zeros and a copy", found[start, "copy"], ADAPTED)]))
    return "\n\n".join(parts)


def _rates(groups: list[Runs], _: Runs) -> str:
    rates = {runs.setting["lr"]: runs for runs in groups}
    lines = [
        [data, row, *(f"{rates[rate].mean(data, row).mean:.1f}" for rate in sorted(rates))]
        for data in groups[0].by_row
        for row in (STOCK, ADAPTED)
    ]
    return table(["data", "row", *(f"{rate:g}" for rate in sorted(rates))], lines)


def draw_steps(figure: Any, runs: Runs) -> None:
    """A panel for each data set, a bar for each step, with its interval."""
    rows = (STOCK, SCALE, ADAPTED, HALF, ESTIMATED, LARGER)
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
    rows = (STOCK, SCALE, ADAPTED, LARGER)
    figure.set_size_inches(6.2, 3.8)
    axes = figure.subplots()
    for data in runs.by_row:
        for row in runs.rows(data, rows[1:]):
            cost = runs.average(data, row, "cost")
            axes.plot(cost, runs.gain(data, row, STOCK).mean, "o", color=_COLOURS[row], alpha=0.45)
    for row in rows[1:]:
        costs = [runs.average(data, row, "cost") for data in runs.by_row if runs.rows(data, [row])]
        mean = runs.over_sets(row, STOCK)
        style = {"ms": 11, "capsize": 4, "color": _COLOURS[row], "label": _NAMES[row]}
        axes.errorbar(np.mean(costs), mean.mean, yerr=np.nan_to_num(mean.half), fmt="D", **style)
    axes.axhline(0, color="grey", lw=0.8)
    axes.set_xlabel("operations, stock = 1", fontsize=_SIZE)
    axes.set_ylabel("AP50 - stock", fontsize=_SIZE)
    axes.tick_params(labelsize=_SIZE - 1)
    axes.legend(fontsize=_SIZE - 2, loc="best")


def draw_reach(figure: Any, runs: Runs) -> None:
    """AP50 against reach: the rows of a data set on one line."""
    figure.set_size_inches(6.2, 4.2)
    axes = figure.subplots()
    for data in runs.by_row:
        rows = runs.rows(data, FITS)
        points = sorted(
            (100 * runs.average(data, r, "reached"), runs.mean(data, r).mean) for r in rows
        )
        axes.plot(*zip(*points, strict=True), "o-", label=data)
    axes.set_xlabel("boxes that reach IoU .5, %", fontsize=_SIZE)
    axes.set_ylabel("AP50", fontsize=_SIZE)
    axes.tick_params(labelsize=_SIZE - 1)
    axes.legend(fontsize=_SIZE - 3, ncols=2)


def draw_factors(figure: Any, runs: Runs) -> None:
    """Gain of each kind of factor over factors of 1: data sets as dots, their mean as a diamond."""
    rows = [HALF, ESTIMATED, LEARNABLE, FIRST, NONE]
    figure.set_size_inches(6.2, 4.2)
    axes = figure.subplots()
    for place, row in enumerate(rows):
        for index, data in enumerate(runs.by_row):
            gain = runs.gain(data, row, ADAPTED)
            offset = place + 0.07 * (index - 3)
            axes.errorbar(
                gain.mean, offset, xerr=np.nan_to_num(gain.half), fmt="o", color=f"C{index}",
                label=data if place == 0 else None, lw=1,
            )  # fmt: skip
        axes.plot(runs.over_sets(row, ADAPTED).mean, place, "D", color="black", ms=8)
    axes.axvline(0, color="grey", lw=0.8)
    axes.set_yticks(range(len(rows)), [_NAMES[row] for row in rows], fontsize=_SIZE)
    axes.invert_yaxis()
    axes.set_xlabel("AP50 - factors of 1", fontsize=_SIZE)
    axes.tick_params(axis="x", labelsize=_SIZE - 1)
    axes.legend(fontsize=_SIZE - 4)


def _save(path: Path, runs: Runs, draw: Callable[[Any, Runs], None]) -> None:
    from matplotlib import pyplot, rc_context

    # The same records make the same file.
    with rc_context({"svg.hashsalt": path.stem}):
        figure = pyplot.figure(layout="constrained")
        draw(figure, runs)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
