"""Which fixed factor is best: tables and pictures of 2,200 runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot

from benchmarks.earlier.groups import (
    BASELINE,
    CONFIRMING,
    ESTIMATED,
    FAMILIES,
    FEWEST,
    FIRST,
    LOOK,
    RATES,
    Group,
    follow,
    groups,
)
from benchmarks.intervals import mean_of
from benchmarks.markdown import fold, save, table
from benchmarks.records import Record

_CONTRASTS = (
    ("0.5", BASELINE),
    (ESTIMATED, BASELINE),
    (ESTIMATED, "0.5"),
    ("0", BASELINE),
    ("0.2", BASELINE),
    (FIRST, BASELINE),
    (RATES, BASELINE),
    ("1.4", BASELINE),
)
_RULES = ("0", "0.5", BASELINE, ESTIMATED, FIRST, LOOK)
_DRAWN = ("0", "0.5", ESTIMATED, FIRST)  # kinds in the first picture
_MAIN = ("0", "0.2", "0.5", ESTIMATED, FIRST)
_FURTHER = (
    *("S-alpha unclamped", "learnable 1", "learnable S-alpha", RATES),
    *("1, equal laterals", "S-alpha, equal laterals"),
)
_SMALL = "0.2"  # the small constant that all data sets and regimes have
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")
_NAMES = {
    FIRST: "first function only",
    RATES: "rates only",
    LOOK: "look first: 1, or .5 if the share falls",
    "1, equal laterals": "1, laterals of equal RMS",
    "S-alpha, equal laterals": "S-alpha, laterals of equal RMS",
}


def draw(records: Sequence[Record], images: Path) -> None:
    """Draws the pictures into a folder."""
    found = groups(records)
    gains(found, images / "factors-gains.svg")
    curves(found, images / "factors-curves.svg")
    cells(found, images / "factors-cells.svg")
    drift(found, images / "factors-drift.svg")


def section(records: Sequence[Record]) -> str:
    """The tables."""
    found = groups(records)
    further = [group for group in found if any(kind in group.runs for kind in _FURTHER)]
    return "\n\n".join(
        [
            contrasts(found),
            "Points of AP50: the mean over data sets and regimes with the lowest and the highest. "
            "*Above* and *below*: how many of the paired 95 % intervals lie above or below 0, each "
            f"with {FEWEST} seeds or more, not corrected for their number.",
            follows(records),
            "With 95 % intervals over resampled data sets and seeds. The idea of the drift came "
            f"after the first {CONFIRMING} seeds; the later seeds test it.",
            regrets(found),
            "Points of AP50 below the best constant, which is chosen on the other seeds.",
            "By data set and regime: AP50_tiny in percent with factors of 1 (blood cells: AP50_all)"
            ", and paired differences to it.",
            *(fold(title, by_data(part, _MAIN)) for title, part in by_family(found).items()),
            fold("Further kinds of factors, some with their factors", by_data(further, _FURTHER)),
        ]
    )


def name_of(kind: str) -> str:
    """What tables and pictures call a kind of factors."""
    return _NAMES.get(kind, f"alpha = {kind}" if kind[0].isdigit() else kind)


def by_family(found: Sequence[Group]) -> dict[str, list[Group]]:
    """The groups with enough seeds, by the name of their family."""
    parts = {
        title: [g for g in found if g.family == f and g.shown] for f, title in FAMILIES.items()
    }
    return {title: part for title, part in parts.items() if part}


def contrasts(found: Sequence[Group]) -> str:
    """What each rule gains over another: the mean over data sets, and how many are certain."""
    families, rows = by_family(found), []
    for kind, other in _CONTRASTS:
        row = [f"{name_of(kind)} over {name_of(other)}"]
        for part in families.values():
            means = [mean_of(v) for g in part if len(v := g.against(kind, other)) >= FEWEST]
            values = [mean.mean for mean in means]
            above, below = (sum(sign * m.mean - m.half > 0 for m in means) for sign in (1, -1))
            row.append(
                f"**{np.mean(values):+.1f}** ({min(values):+.1f} to {max(values):+.1f}); "
                f"{above} above, {below} below, of {len(means)}"
                if means
                else ""
            )
        rows.append(row)
    return table(["against each other", *families], rows)


def follows(records: Sequence[Record]) -> str:
    """What the best constants follow, over data sets and regimes."""
    later = [r for r in records if r["config"]["seed"] >= CONFIRMING]
    predictors: list[tuple[str, Callable[[Group], float], Sequence[Record]]] = [
        ("S-alpha (geometric mean)", _geometric, records),
        ("forward share at the start", lambda g: float(np.mean(g.first_shares)), records),
        ("drift of the forward share", _drift, records),
        (f"the same, seeds from {CONFIRMING} on alone", _drift, later),
    ]
    rows = []
    for name, predictor, some in predictors:
        shown = [g for g in groups(some) if g.shown and g.drifts and len(g.constants) > 2]
        if len(shown) > 2:
            value, low, high = follow(shown, [predictor(group) for group in shown])
            rows.append([name, f"{value:+.2f} ({low:+.2f} to {high:+.2f})", len(shown)])
    return table(["the best constant rises with", "rank correlation", "sets and regimes"], rows)


def regrets(found: Sequence[Group]) -> str:
    """What each rule costs against the best constant of the data set."""
    families, rows = by_family(found), []
    for kind in _RULES:
        row = [name_of(kind)]
        for part in families.values():
            values = [group.regret(kind) for group in part if group.values(kind)]
            row.append(f"{np.mean(values):.1f}, {max(values):.1f}" if values else "")
        rows.append(row)
    return table(["rule: mean, worst", *families], rows)


def by_data(part: Sequence[Group], kinds: Sequence[str]) -> str:
    """Some kinds of factors against factors of 1, a row for each data set and regime."""
    rows = []
    for group in sorted(part, key=lambda group: (group.regime, group.data)):
        estimated = " ".join(f"{factor:.2g}" for factor in group.s_alpha)
        base = mean_of(list(group.values(BASELINE).values()))
        cells = [_difference(group, kind) for kind in kinds]
        rows.append([group.data, group.regime, base.count, estimated, f"{base.mean:.1f}", *cells])
    head = ["data", "regime", "seeds", "S-alpha's factors", name_of(BASELINE)]
    return table([*head, *map(name_of, kinds)], rows)


def _difference(group: Group, kind: str) -> str:
    text = mean_of(group.against(kind)).text(sign="+")
    if text and ("learnable" in kind or "unclamped" in kind):
        factors = np.mean([run["alpha"] for run in group.runs[kind].values()], axis=0)
        text += f" ({' '.join(f'{factor:.2g}' for factor in factors)})"
    return text


def _geometric(group: Group) -> float:
    return float(np.exp(np.mean(np.log(group.s_alpha))))


def _drift(group: Group) -> float:
    return float(np.mean(list(group.drifts.values())))


def gains(found: Sequence[Group], path: Path) -> None:
    """Differences to factors of 1: a dot for each data set and regime, a bar at their mean."""
    families = by_family(found)
    figure, grid = _panels(len(families))
    for axes, (title, part) in zip(grid[0], families.items(), strict=True):
        for place, kind in enumerate(reversed(_DRAWN)):
            values = [mean_of(v).mean for g in part if len(v := g.against(kind)) >= FEWEST]
            axes.plot(values, [place] * len(values), "o", color=_COLOURS[0], alpha=0.5, ms=5)
            if values:
                axes.plot(np.mean(values), place, "|", color="black", ms=18, mew=2)
        axes.axvline(0, color="black", lw=0.8)
        axes.set(title=title, xlabel="points of AP50 over alpha = 1")
    grid[0][0].set_yticks(range(len(_DRAWN)), [name_of(kind) for kind in reversed(_DRAWN)])
    save(figure, path)


def curves(found: Sequence[Group], path: Path) -> None:
    """AP50 by constant factor on drawn scenes: near and far, from scratch with AdamW."""
    part = [g for g in found if g.weights == "scratch" and g.optimizer == "adamw" and g.shown]
    figure, grid = _panels(2, sharey=False, width=4.2)
    for axes, family in zip(grid[0], ("near", "far"), strict=True):
        shown = [g for g in part if g.family == family and g.steps == 400 and len(g.constants) > 4]
        for group, colour in zip(sorted(shown, key=lambda g: g.data), _COLOURS, strict=False):
            _curve(axes, group, colour)
        axes.set(title=f"drawn, {family}", xlabel="factor on every edge")
        axes.legend(fontsize=8, frameon=False, title="objects by level; ★ S-alpha")
    grid[0][0].set_ylabel("points of AP50_tiny over alpha = 1")
    save(figure, path)


def cells(found: Sequence[Group], path: Path) -> None:
    """AP50 of the same blood cells at each size, by constant factor."""
    part = [g for g in found if g.family == "cells" and g.optimizer == "adamw" and g.shown]
    part = [g for g in part if g.data.endswith("one class")]
    part.sort(key=lambda group: int(group.data.split()[1].lstrip("/")))
    figure, grid = _panels(max(1, len(part)))
    for axes, group in zip(grid[0], part, strict=False):
        _curve(axes, group, _COLOURS[0])
        factors = "/".join(f"{factor:.2g}" for factor in group.s_alpha)
        title = f"{group.data.removesuffix(' one class')}: S-alpha {factors}"
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("factor")
    grid[0][0].set_ylabel("points of AP50 over alpha = 1")
    save(figure, path)


def drift(found: Sequence[Group], path: Path) -> None:
    """What a small factor gains, by how the forward share changed while 1 was trained."""
    figure, axes = pyplot.subplots(figsize=(6.5, 3.6), layout="constrained")
    for (family, label), colour in zip(FAMILIES.items(), _COLOURS, strict=True):
        part = [g for g in found if g.family == family and len(g.against(_SMALL)) >= FEWEST]
        means = [mean_of(group.against(_SMALL)) for group in part]
        axes.errorbar(
            [_drift(group) for group in part],
            [mean.mean for mean in means],
            [mean.half for mean in means],
            fmt="o", color=colour, ms=5, capsize=2, lw=1, label=label,
        )  # fmt: skip
    axes.axhline(0, color="black", lw=0.8)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_xlabel("change of the forward share while alpha = 1 was trained")
    axes.set_ylabel(f"points of AP50, alpha = {_SMALL} over 1")
    axes.legend(frameon=False)
    save(figure, path)


def _panels(count: int, width: float = 2.5, sharey: bool = True) -> tuple[Any, Any]:
    size = (width * count + 1, 3.2)
    return pyplot.subplots(
        1, count, figsize=size, layout="constrained", squeeze=False, sharey=sharey
    )


def _curve(axes: Any, group: Group, colour: str) -> None:
    constants = [c for c in group.constants if len(group.against(f"{c:g}")) > 1]
    means = [mean_of(group.against(f"{constant:g}")) for constant in constants]
    axes.errorbar(
        constants,
        [mean.mean for mean in means],
        [mean.half for mean in means],
        fmt="o-", color=colour, ms=4, capsize=2, lw=1.4, label=group.data.partition(" ")[2],
    )  # fmt: skip
    estimated = mean_of(group.against(ESTIMATED))
    axes.errorbar(
        [_geometric(group)], [estimated.mean], [estimated.half], fmt="*", color=colour, ms=12
    )
    axes.axhline(0, color="black", lw=0.8)
