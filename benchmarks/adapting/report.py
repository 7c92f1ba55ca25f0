"""Tables and pictures from the records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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

_MARK = "adapting"
_NAMES = {
    STOCK: "stock",
    SCALE: "anchors",
    ADAPTED: "anchors and finer level",
    LARGER: "input twice as large",
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
    pictures = {
        "steps": draw_steps,
        "cost": draw_cost,
        "reach": draw_reach,
        "factors": draw_factors,
    }
    for name, draw in pictures.items():
        _save(images / f"adapting-{name}.svg", main, draw)
    parts = [
        *("## What each step gives", _image("steps", "AP50 by data set and step"), steps(main)),
        _image("cost", "Gain against cost"),
        *("## What reach predicts", _image("reach", "AP50 against reach"), reach(main)),
        *("## Factors on the adapted detector", _image("factors", "Gain of factors")),
        factors(main, found.get("factors", [])),
    ]
    further: dict[str, tuple[str, Callable[[list[Runs]], str]]] = {
        "order": ("Factors on the stock detector", _order),
        "long": ("Four times the steps", _long),
        "heads": ("Other detectors", _heads),
        "starts": ("Other starts", _starts),
        "rates": ("Learning rates", _rates),
    }
    for study, (title, show) in further.items():
        if study in found:
            # Runs of the main study are one side of some comparisons.
            shared = [main] if study == "starts" else []
            parts += [f"## {title}", show([*found[study], *shared])]
    parts.append(fold("Settings of each data set", settings(records)))
    fill(page, _MARK, "\n\n".join(parts))


def steps(runs: Runs) -> str:
    """AP50 of stock, and what each step adds to the one before."""
    pairs = ((SCALE, STOCK), (ADAPTED, SCALE), (LARGER, STOCK), (ADAPTED, LARGER), (HALF, ADAPTED))
    head = ["data", "seeds", "stock", *(f"{_NAMES[a]} - {_NAMES[b]}" for a, b in pairs)]
    lines = [
        [
            data,
            str(runs.mean(data, STOCK).count),
            f"{runs.mean(data, STOCK).mean:.1f}",
            *(str(runs.gain(data, a, b)) for a, b in pairs),
        ]
        for data in runs.by_row
    ]
    means = [runs.mean(data, STOCK).mean for data in runs.by_row]
    lines.append(["mean", "", f"{np.mean(means):.1f}", *(str(runs.over_sets(*p)) for p in pairs)])
    return table(head, lines)


def reach(runs: Runs) -> str:
    """Reach and AP50 of each row; rank correlation; what the best row by reach loses."""
    found, lost = prediction(runs), regrets(runs)
    head = ["data", *(f"{_NAMES[row]}: reach, AP50" for row in FITS), "rank correlation", "regret"]
    lines = []
    for data in runs.by_row:
        cells = []
        for row in FITS:
            mean = runs.mean(data, row).mean
            known = bool(runs.rows(data, [row]))
            cells.append(f"{runs.constant(data, row, 'reached'):.0%}, {mean:.1f}" if known else "")
        lines.append([data, *cells, f"{found.by_data[data]:.2f}", f"{lost.get(data, np.nan):.1f}"])
    values = list(lost.values())
    text = (
        f"Rank correlation of reach with AP50 over the rows of a data set: {found.mean:.2f} in the "
        f"mean of {len(found.by_data)} data sets, 95 % interval {found.low:.2f} to "
        f"{found.high:.2f}. The best row by reach is {np.mean(values):.1f} points below the best "
        f"row by AP50 in the mean, {max(values):.1f} at worst (rows at the same input size)."
    )
    return f"{table(head, lines)}\n\n{text}"


def factors(main: Runs, further: Sequence[Runs]) -> str:
    """Paired differences to factors of 1, and of S-alpha to .5."""
    rows = _with_further(main, further)
    head = ["data", "seeds", "factors of 1", *(_NAMES[row] for row in FACTORS), "S-alpha - .5"]
    lines = []
    for data in rows.by_row:
        base = rows.mean(data, ADAPTED)
        gains = [str(rows.gain(data, row, ADAPTED)) for row in FACTORS]
        between = str(rows.gain(data, ESTIMATED, HALF))
        lines.append([data, str(base.count), f"{base.mean:.1f}", *gains, between])
    over = [str(rows.over_sets(row, ADAPTED)) for row in FACTORS]
    lines.append(["mean", "", "", *over, str(rows.over_sets(ESTIMATED, HALF))])
    return table(head, lines)


def settings(records: Sequence[Record]) -> str:
    """What the runs of each data set have in common."""
    seen = {}
    for record in records:
        config = record["config"]
        if config["study"] == "main" and config["row"] == ADAPTED:
            seen[config["data"]] = record
    head = ["data", "images", "crop", "steps", "scale", "finest anchors, px", "S-alpha"]
    alphas = {r["config"]["data"]: r["alpha"] for r in records if r["config"]["row"] == ESTIMATED}
    lines = [
        [
            data,
            f"{record['config']['train']}, {record['config']['val']}",
            str(record["config"]["crop"]),
            f"{record['config']['steps']} of {record['config']['batch']}",
            f"{record['config']['anchor_scale']:g}"
            + ", finer level" * record["config"]["finer_level"],
            ", ".join(f"{size:.1f}" for size in record["anchor_sizes"][0]),
            ", ".join(f"{factor:.2f}" for factor in alphas.get(data) or []),
        ]
        for data, record in seen.items()
    ]
    return table(head, lines)


def _with_further(main: Runs, further: Sequence[Runs]) -> Runs:
    by_row = {
        data: {row: dict(runs) for row, runs in rows.items()} for data, rows in main.by_row.items()
    }
    for group in further:
        for data, rows in group.by_row.items():
            for row, runs in rows.items():
                by_row.setdefault(data, {}).setdefault(row, {}).update(runs)
    return Runs(main.setting, by_row)


def _order(groups: list[Runs]) -> str:
    (runs,) = groups
    rows = sorted({row for data in runs.by_row for row in runs.by_row[data]} - {STOCK})
    lines = [[d, *(str(runs.gain(d, row, STOCK)) for row in rows)] for d in runs.by_row]
    return table(["data", *(f"{row} - stock" for row in rows)], lines)


def _long(groups: list[Runs]) -> str:
    lines = []
    for runs in groups:
        for data in runs.by_row:
            gains = [str(runs.gain(data, row, ADAPTED)) for row in (HALF, ESTIMATED)]
            first = [f"{runs.mean(data, row).mean:.1f}" for row in (STOCK, ADAPTED)]
            count = str(runs.mean(data, ADAPTED).count)
            lines.append([data, count, *first, str(runs.gain(data, ADAPTED, STOCK)), *gains])
    head = ["data", "seeds", "stock", "adapted", "adapted - stock", ".5 - 1", "S-alpha - 1"]
    return table(head, lines)


def _heads(groups: list[Runs]) -> str:
    by_kind: dict[str, list[Runs]] = {}
    for runs in groups:
        by_kind.setdefault(runs.setting["detector"], []).append(runs)
    lines = []
    for kind, found in by_kind.items():
        base = next(runs for runs in found if STOCK in next(iter(runs.by_row.values())))
        for runs in found:
            extra = [
                f"{k}: {runs.setting[k]}" for k in ("roi", "radius", "fit") if k in runs.setting
            ]
            for data in runs.by_row:
                gain = mean_of(paired(runs.values(data, ADAPTED), base.values(data, STOCK)))
                first = base.mean(data, STOCK).mean
                name = ", ".join([kind, *extra])
                lines.append([name, data, str(gain.count), f"{first:.1f}", str(gain)])
    return table(["detector", "data", "seeds", "stock", "adapted - stock"], lines)


def _starts(groups: list[Runs]) -> str:
    found = {(runs.setting["start"], runs.setting["finer_start"]): runs for runs in groups}
    lines = []
    for start in dict.fromkeys(start for start, _ in found):
        copy, fresh = found.get((start, "copy")), found.get((start, "random"))
        for data in copy.by_row if copy and fresh else []:
            values = [runs.values(data, ADAPTED) for runs in (copy, fresh)]
            means = [f"{np.mean(list(value.values())):.1f}" for value in values]
            lines.append([start, data, *means, str(mean_of(paired(*values)))])
    head = ["trained before", "data", "zeros and a copy", "random", "difference"]
    return table(head, lines)


def _rates(groups: list[Runs]) -> str:
    rates = sorted({runs.setting["lr"] for runs in groups})
    by_rate = {runs.setting["lr"]: runs for runs in groups}
    lines = [
        [data, row, *(f"{by_rate[rate].mean(data, row).mean:.1f}" for rate in rates)]
        for data in groups[0].by_row
        for row in (STOCK, ADAPTED)
    ]
    return table(["data", "row", *(f"{rate:g}" for rate in rates)], lines)


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
            cost = runs.constant(data, row, "cost")
            axes.plot(cost, runs.gain(data, row, STOCK).mean, "o", color=_COLOURS[row], alpha=0.45)
    for row in rows[1:]:
        costs = [runs.constant(data, row, "cost") for data in runs.by_row if runs.rows(data, [row])]
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
            (100 * runs.constant(data, r, "reached"), runs.mean(data, r).mean) for r in rows
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


def _image(name: str, text: str) -> str:
    return f"![{text}](images/adapting-{name}.svg)"
