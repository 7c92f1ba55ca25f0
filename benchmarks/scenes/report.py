"""Turns records into pictures and tables: `python -m benchmarks.scenes report`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot

from benchmarks.paper import results
from benchmarks.paper.pairs import Mean, mean_of
from benchmarks.scenes.analysis import (
    BASELINE,
    BOTH,
    CONFIRMING,
    EQUAL,
    ESTIMATED,
    FIRST,
    HALF,
    LOOK,
    RATES,
    Group,
    follow,
    groups,
    holm,
)

_RULES = ("0", "0.2", "0.5", BASELINE, ESTIMATED, HALF, FIRST, LOOK)
# Data sets by the beginning of their names, and what pictures call them.
_FAMILIES = {
    "near": "drawn, near",
    "far": "drawn, far",
    "cells": "blood cells",
    "people": "TinyPerson",
}
_CONTRASTS = (
    ("0.5", BASELINE),
    (ESTIMATED, BASELINE),
    (ESTIMATED, "0.5"),
    ("0", BASELINE),
    (FIRST, BASELINE),
    (RATES, BASELINE),
    (HALF, BASELINE),
    ("1.4", BASELINE),
)
_ON_PEOPLE = ("0", "0.2", "0.35", "0.5", "0.7", ESTIMATED, FIRST)
_SMALL = "0.2"  # the constant that all data sets and regimes have, beside 0 and 1
_FEWEST = 3  # seeds, for a kind to be shown
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")
_NAMES = {
    BASELINE: "alpha = 1",
    HALF: "half-way from S-alpha to 1",
    FIRST: "first function only",
    RATES: "rates only",
    LOOK: "look first: 1, or .5 where its drift is below 0",
    EQUAL: "1, laterals of equal RMS",
    BOTH: "S-alpha, laterals of equal RMS",
}


def write(records: Sequence[dict[str, Any]], page: Path) -> None:
    """Writes the tables between the page's marks, and the pictures into `images/` beside it.

    Raises:
        ValueError: If the page lacks the marks.
    """
    found = groups(records)
    drawn, cells, people = (
        [group for group in found if group.data.startswith(names)]
        for names in (("near", "far"), "cells", "people")
    )
    images = page.parent / "images"
    drift(found, images / "scenes-drift.svg")
    rules(found, images / "scenes-rules.svg")
    parts = [
        contrasts(found),
        "![AP50 at alpha = .2 against alpha = 1, by how the forward share changed while alpha = 1 "
        "was trained](images/scenes-drift.svg)",
        follows(records),
        "![How far each rule is below the best constant, mean and worst data set]"
        "(images/scenes-rules.svg)",
        regrets(found),
    ]
    if people:
        on_people(people, images / "scenes-people.svg")
        parts.append(
            "![AP50 of TinyPerson's people against alpha = 1, in each regime]"
            "(images/scenes-people.svg)"
        )
    if cells:
        on_cells(cells, images / "scenes-cells.svg")
        parts.append(
            "![AP50 of blood cells against alpha = 1 at each size](images/scenes-cells.svg)"
        )
    if drawn:
        curves(drawn, images / "scenes-curves.svg")
        parts.append(
            "![AP50_tiny against alpha = 1, by constant factor, for near and far scenes]"
            "(images/scenes-curves.svg)"
        )
    for name, part in {"drawn scenes": drawn, "blood cells": cells, "TinyPerson": people}.items():
        if part:
            parts.append(results.fold(f"where the peak is: {name}", peaks(part)))
    parts += [_folded(regime, part) for regime, part in _by_regime(found)]
    results.fill(page, "scenes", ["\n\n".join(parts)])


def _save(figure: Any, path: Path) -> None:
    with matplotlib.rc_context({"svg.hashsalt": "alphafpn"}):  # the same picture is the same file
        figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def _by_regime(found: Iterable[Group]) -> list[tuple[str, list[Group]]]:
    result: dict[str, list[Group]] = {}
    for group in found:
        what = {"cells": "blood cells", "people": "TinyPerson's images"}
        regime = f"{what.get(group.data.split()[0], 'drawn scenes')}, {group.regime}"
        result.setdefault(regime, []).append(group)
    return [(name, sorted(part, key=_order)) for name, part in sorted(result.items(), reverse=True)]


def _order(group: Group) -> tuple[bool, str]:
    return not group.data.startswith("near"), group.data


def name_of(kind: str) -> str:
    """What tables and pictures call a kind of factors."""
    return _NAMES.get(kind, kind if not kind[0].isdigit() else f"alpha = {kind}")


def _folded(regime: str, part: Sequence[Group]) -> str:
    """All kinds of a regime against the baseline, in a block that opens on a click."""
    kinds = list(dict.fromkeys(kind for group in part for kind in group.runs))
    kinds.sort(key=lambda kind: (kind != BASELINE, not kind[0].isdigit(), kind))
    verdicts = _verdicts(part, kinds)
    seeds = sorted({len(group.values(BASELINE)) for group in part})
    count = sum(len(runs) for group in part for runs in group.runs.values())
    head = f"{regime}: {count} runs, {seeds[0]}"
    head += f" to {seeds[-1]} seeds" if len(seeds) > 1 else " seeds"
    lines = [
        "| factors | " + " | ".join(group.data for group in part) + " |",
        "|" + "---|" * (len(part) + 1),
    ]
    for kind in kinds:
        cells = []
        for group in part:
            values = group.values(kind)
            if kind == BASELINE:
                cells.append(f"{mean_of(list(values.values())).mean:.1f}")
            elif values:
                difference = mean_of(group.against(kind))
                cells.append(_shown(difference) + "\\*" * verdicts.get((group.data, kind), False))
            else:
                cells.append("")
        lines.append(f"| {name_of(kind)} | " + " | ".join(cells) + " |")
    smallest = [
        mean_of(group.against(kind)).detectable
        for group in part
        for kind in kinds
        if kind != BASELINE and len(group.against(kind)) > 1
    ]
    measures = " and ".join(sorted({group.measure for group in part}))
    lines += [
        "",
        f"{measures} in percent: of the baseline, and differences to it of the same seed with "
        "95 % t-intervals. \\*: below 0.05 after Holm's correction for all comparisons of this "
        f"table. In the median, {np.median(smallest):.1f} points or more would be found in four of "
        "five experiments."
        if smallest
        else "",
    ]
    return results.fold(head, "\n".join(lines).rstrip())


def _verdicts(part: Sequence[Group], kinds: Sequence[str]) -> dict[tuple[str, str], bool]:
    pairs = [
        (group, kind)
        for group in part
        for kind in kinds
        if kind != BASELINE and len(group.against(kind)) >= _FEWEST
    ]
    values = holm([group.against(kind) for group, kind in pairs])
    return {
        (group.data, kind): value < 0.05 for (group, kind), value in zip(pairs, values, strict=True)
    }


def _shown(mean: Mean) -> str:
    half = "" if math.isnan(mean.half) else f" ± {mean.half:.1f}"
    return f"{mean.mean:+.1f}{half}"


def peaks(found: Sequence[Group]) -> str:
    """Where the best constant lies, and what it follows."""
    lines = [
        "| data | regime | seeds | S-alpha | forward share at alpha = 1, start | best constant | "
        "best against alpha = 1 | S-alpha against alpha = 1 |",
        "|---" * 8 + "|",
    ]
    shown = [g for _, part in _by_regime(found) for g in part if len(g.values(BASELINE)) >= _FEWEST]
    for group in shown:
        best = f"{group.peak:g}"
        cells = [
            group.data,
            group.regime,
            str(len(group.values(BASELINE))),
            " ".join(f"{factor:.2g}" for factor in group.s_alpha),
            " ".join(f"{share:.2f}" for share in group.shares(BASELINE, 0)),
            best,
            "" if best == BASELINE else _shown(mean_of(group.against(best))),
            _shown(mean_of(group.against(ESTIMATED))),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def follows(records: Sequence[dict[str, Any]]) -> str:
    """What the best constants are in the order of, over data sets and regimes."""
    lines = [
        "| the best constant rises with | rank correlation | data sets and regimes |",
        "|---" * 3 + "|",
    ]
    confirming = [r for r in records if r["config"]["seed"] >= CONFIRMING]
    predictors: list[tuple[str, Callable[[Group], float], Sequence[dict[str, Any]]]] = [
        ("S-alpha, geometric mean of its factors", _counted, records),
        (
            "forward share at the start, alpha = 1",
            lambda g: np.mean(g.shares(BASELINE, 0)),
            records,
        ),
        ("drift of the forward share while alpha = 1 is trained", _drift, records),
        (f"drift, seeds from {CONFIRMING} on alone", _drift, confirming),
    ]
    for name, predictor, some in predictors:
        shown = [group for group in groups(some) if _complete(group)]
        if len(shown) > 2:
            found = follow(shown, [predictor(group) for group in shown])
            interval = f"({found.low:+.2f} to {found.high:+.2f})"
            lines.append(f"| {name} | {found.value:+.2f} {interval} | {found.count} |")
    return "\n".join(lines)


def _complete(group: Group) -> bool:
    return (
        len(group.values(BASELINE)) >= _FEWEST and bool(group.drifts) and len(group.constants) > 2
    )


def _counted(group: Group) -> float:
    return float(np.exp(np.mean(np.log(group.s_alpha))))


def _drift(group: Group) -> float:
    return float(np.mean(list(group.drifts.values())))


def drift(found: Sequence[Group], path: Path) -> None:
    """What a small factor gains, by where a training with 1 took the top-down path."""
    figure, axes = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    for (family, label), colour in zip(_FAMILIES.items(), _COLOURS, strict=False):
        part = [g for g in found if g.data.startswith(family) and len(g.against(_SMALL)) >= _FEWEST]
        gains = [mean_of(group.against(_SMALL)) for group in part]
        axes.errorbar(
            [_drift(group) for group in part],
            [gain.mean for gain in gains],
            [gain.half for gain in gains],
            fmt="o", color=colour, ms=5, capsize=2, lw=1, label=label,
        )  # fmt: skip
    axes.axhline(0, color="black", lw=0.8)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_xlabel("change of the forward share while alpha = 1 was trained (mean over edges)")
    axes.set_ylabel(f"AP50, alpha = {_SMALL} against alpha = 1")
    axes.legend(frameon=False)
    _save(figure, path)


def contrasts(found: Sequence[Group]) -> str:
    """What each rule has over another: the mean over data sets, and how many are sure."""
    families = _shown_by_family(found)
    lines = [
        f"| against each other | {' | '.join(_FAMILIES[name] for name in families)} |",
        "|---" * (1 + len(families)) + "|",
    ]
    for kind, other in _CONTRASTS:
        cells = [f"{name_of(kind)} over {name_of(other)}"]
        for part in families.values():
            means = [mean_of(v) for g in part if len(v := g.against(kind, other)) >= _FEWEST]
            if not means:
                cells.append("")
                continue
            values = [mean.mean for mean in means]
            above, below = (sum(sign * m.mean - m.half > 0 for m in means) for sign in (1, -1))
            cells.append(
                f"**{np.mean(values):+.1f}** ({min(values):+.1f} to {max(values):+.1f}); "
                f"{above} above, {below} below, of {len(means)}"
            )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Points of AP50, in the mean over data sets and regimes, with the lowest and the highest; "
        "*above* and *below* say how many have a paired 95 % interval that lies so of 0, each with "
        f"{_FEWEST} seeds or more, without correction for their number.",
    ]
    return "\n".join(lines)


def regrets(found: Sequence[Group]) -> str:
    """What each rule of thumb costs against the best constant of the data set."""
    families = _shown_by_family(found)
    heads = " | ".join(f"{name}: mean | {name}: worst" for name in families)
    lines = [f"| rule | {heads} |", "|---" * (1 + 2 * len(families)) + "|"]
    for kind in _RULES:
        cells = [name_of(kind)]
        for part in families.values():
            values = [group.regret(kind) for group in part if group.values(kind)]
            cells += [f"{np.mean(values):.1f}", f"{max(values):.1f}"] if values else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    counts = ", ".join(f"{len(part)} ({name})" for name, part in families.items())
    lines += [
        "",
        "Points of AP50 below the best constant, which is chosen on the other seeds. Data sets and "
        f"regimes: {counts}.",
    ]
    return "\n".join(lines)


def _shown_by_family(found: Sequence[Group]) -> dict[str, list[Group]]:
    shown = [group for group in found if len(group.values(BASELINE)) >= _FEWEST]
    parts = {f: [group for group in shown if group.data.startswith(f)] for f in _FAMILIES}
    return {family: part for family, part in parts.items() if part}


def curves(found: Sequence[Group], path: Path) -> None:
    """Differences to alpha = 1 by constant: near and far, from scratch and pretrained."""
    regimes = list(dict.fromkeys(g.regime for g in found if len(g.values(BASELINE)) >= _FEWEST))
    figure, grid = pyplot.subplots(
        len(regimes), 2, figsize=(10, 2.9 * len(regimes)), layout="constrained", squeeze=False
    )
    for row, regime in zip(grid, regimes, strict=True):
        for axes, family in zip(row, ("near", "far"), strict=True):
            part = [g for g in found if g.regime == regime]
            part = sorted((g for g in part if g.data.startswith(family)), key=_order)
            for index, group in enumerate(part):
                _curve(axes, group, index, len(part))
            axes.axhline(0, color="black", lw=0.8)
            axes.set_title(f"{family}: {regime}", fontsize=10)
            axes.set_xlabel("factor on every edge")
            axes.set_ylabel("AP50_tiny against 1")
            axes.legend(fontsize=8, frameon=False, title="objects by level; ★ S-alpha")
    _save(figure, path)


def _curve(axes: Any, group: Group, index: int, count: int) -> None:
    constants = [c for c in group.constants if len(group.against(f"{c:g}")) > 1]
    means = [mean_of(group.against(f"{constant:g}")) for constant in constants]
    shift = 0.012 * (index - (count - 1) / 2)
    colour = _COLOURS[index % len(_COLOURS)]
    axes.errorbar(
        [constant + shift for constant in constants],
        [mean.mean for mean in means],
        [mean.half for mean in means],
        color=colour,
        marker="o",
        markersize=4,
        capsize=2,
        lw=1.4,
        label=group.data.partition(" ")[2],
    )
    estimated = mean_of(group.against(ESTIMATED))
    place = float(np.exp(np.mean(np.log(group.s_alpha))))
    axes.errorbar(
        [place], [estimated.mean], [estimated.half], color=colour, marker="*", markersize=12
    )


def rules(found: Sequence[Group], path: Path) -> None:
    """Regret of each rule: a dot for each data set, a bar at the mean."""
    families = _shown_by_family(found)
    figure, grid = pyplot.subplots(
        1, len(families), figsize=(3.1 * len(families), 3.6), layout="constrained", sharey=True,
        squeeze=False,
    )  # fmt: skip
    for axes, (family, part) in zip(grid[0], families.items(), strict=True):
        for place, kind in enumerate(reversed(_RULES)):
            values = [group.regret(kind) for group in part if group.values(kind)]
            axes.plot(values, [place] * len(values), "o", color=_COLOURS[0], alpha=0.5, ms=5)
            if values:
                axes.plot(np.mean(values), place, "|", color="black", ms=18, mew=2)
        axes.axvline(0, color="black", lw=0.8)
        axes.set_title(_FAMILIES[family], fontsize=10)
        axes.set_xlabel("points below the best")
    grid[0][0].set_yticks(range(len(_RULES)), [name_of(kind) for kind in reversed(_RULES)])
    _save(figure, path)


def on_people(found: Sequence[Group], path: Path) -> None:
    """Differences to alpha = 1 on real people, a panel for each regime."""
    part = [group for group in found if len(group.values(BASELINE)) >= _FEWEST]
    kinds = [k for k in _ON_PEOPLE if any(len(group.against(k)) > 1 for group in part)]
    figure, grid = pyplot.subplots(
        1, len(part), figsize=(2.9 * len(part), 3.4), layout="constrained", sharey=True,
        squeeze=False,
    )  # fmt: skip
    for axes, group in zip(grid[0], part, strict=True):
        shown = [(i, group.against(k)) for i, k in enumerate(reversed(kinds))]
        for place, values in shown:
            if len(values) > 1:
                mean = mean_of(values)
                axes.plot(values, [place] * len(values), "o", color=_COLOURS[0], alpha=0.3, ms=4)
                axes.errorbar(
                    mean.mean,
                    place,
                    xerr=mean.half,
                    fmt="|",
                    color="black",
                    ms=12,
                    mew=2,
                    capsize=3,
                )
        axes.axvline(0, color="black", lw=0.8)
        baseline = np.mean(list(group.values(BASELINE).values()))
        title = group.regime.replace(", ", "\n", 1)
        axes.set_title(f"{title}\nalpha = 1: {baseline:.1f}", fontsize=9)
        axes.set_xlabel("AP50_tiny against 1")
    grid[0][0].set_yticks(range(len(kinds)), [name_of(kind) for kind in reversed(kinds)])
    _save(figure, path)


def on_cells(found: Sequence[Group], path: Path) -> None:
    """Differences to alpha = 1 at each size of the same cells."""
    part = [g for g in found if g.optimizer == "adamw" and g.data.endswith("one class")]
    part = sorted(part, key=lambda group: int(group.data.split()[1].lstrip("/")))
    part = [group for group in part if len(group.values(BASELINE)) >= _FEWEST]
    if not part:
        return
    figure, row = pyplot.subplots(
        1, len(part), figsize=(2.5 * len(part), 3.2), layout="constrained", sharey=True
    )
    for axes, group in zip(np.atleast_1d(row), part, strict=True):
        _curve(axes, group, 0, 1)
        axes.axhline(0, color="black", lw=0.8)
        ratios = "/".join(f"{factor:.2g}" for factor in group.s_alpha)
        axes.set_title(f"{group.data.removesuffix(' one class')}: S-alpha {ratios}", fontsize=9)
        axes.set_xlabel("factor")
    np.atleast_1d(row)[0].set_ylabel("AP50 against 1")
    _save(figure, path)
