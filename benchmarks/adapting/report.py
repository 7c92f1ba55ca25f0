"""The tables, and the four questions with their answers, from the records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from benchmarks.adapting import pictures
from benchmarks.adapting.analysis import Runs, prediction, regrets, studies
from benchmarks.adapting.rows import FACTORS, FITS, NAMES, Row
from benchmarks.intervals import Mean, mean_of, paired
from benchmarks.markdown import fill, fold, save, table
from benchmarks.records import Record

Line: TypeAlias = tuple[str, Runs, str]  # a label, and a row of some runs

_MARK = "adapting"
_DRAWN = {
    "steps": (pictures.draw_steps, "AP50 of each step on seven data sets"),
    "cost": (pictures.draw_cost, "Gain over stock against operations"),
    "reach": (pictures.draw_reach, "AP50 against the share of boxes that reach IoU .5"),
    "factors": (pictures.draw_factors, "Gain of five kinds of factors over factors of 1"),
}
_MEASURED = """\
torchvision's RetinaNet with its own losses on EfficientNet-Lite0 with ImageNet's weights: P3 to P7,
anchors from 32 px, 64 channels, two convolutions in each part of the head. C5 is the first block at
stride 32; normalisation, and everything up to stride 4, is not trained. AdamW, rates of .001 that
rise for a tenth of the steps and then fall to 0, two images a step, gradients clipped to norm 5.
Such trainings are short: figures are low, and gains are those of an early stage.

Real images, in crops of at most 160 px: blood cells at a quarter (`cells4`, three classes of
different size) and an eighth of their size (`cells8`, one class); TinyPerson's `people`; `hituav`,
people, cars and bicycles in thermal images from a drone; `dots` of printed music, whose four
classes only the surroundings tell; `dsb2018`, cell nuclei; `insects` on sticky traps. Seeds differ
in first weights and order; all share the crops.

AP50 is that of all sizes, in percent. Other rows are paired differences with the number of seeds in
brackets; the last column has the interval over data sets. *Best anchors*: the best scale without a
finer level. *Anchors and finer level*: `comparison.best`, on every set. *Larger input*: stock on
images twice as large. *First function*: factors of 1 whose first weights compute what S-alpha does.

`python -m benchmarks.adapting run --studies main --seeds 0 1 2 3 4` does the runs that are not on
record."""


def write(records: Sequence[Record], docs: Path) -> None:
    """Draws the pictures, and fills the pages `experiments.md` and `experiment-tables.md`."""
    from matplotlib import pyplot

    found = studies(records)
    (main,) = found["main"]
    for name, (draw, _) in _DRAWN.items():
        figure = pyplot.figure(layout="constrained")
        draw(figure, main)
        save(figure, docs / "images" / f"adapting-{name}.svg")
    fill(docs / "experiments.md", _MARK, answers(found, len(records)))
    fill(docs / "experiment-tables.md", _MARK, tables(found))
    fill(docs / "adapting.md", _MARK, [expected(main)])


def in_short(records: Sequence[Record]) -> str:
    """What adapting gives, in a few sentences for the README."""
    found = studies(records)
    (main,) = found["main"]
    fitted, halved = (
        [gain.mean for gain in main.gains(row, other).values()]
        for row, other in ((Row.ADAPTED, Row.STOCK), (Row.HALF, Row.ADAPTED))
    )
    (long,) = found["long"]
    lasting = {data: gain.mean for data, gain in long.gains(Row.ADAPTED, Row.STOCK).items()}
    early = main.gains(Row.ADAPTED, Row.STOCK)
    before, after = (
        " and ".join(f"{gain:.0f}" for gain in gains)
        for gains in ([early[data].mean for data in lasting], lasting.values())
    )
    base, *_ = lines = _by_detector(found["heads"])["Faster R-CNN"]
    adapted = next(line for line in lines if line[2] == Row.ADAPTED)
    two_stages = [f"{gain.mean:.0f}" for gain in _gains(base, adapted)]
    return (
        "We trained a small RetinaNet (EfficientNet-Lite0 from ImageNet's weights) on "
        f"{len(fitted)} sets of real images, for 150 or 200 steps. Adapting gained "
        f"**{min(fitted):.0f} to {max(fitted):.0f} points** of AP50, {np.mean(fitted):.0f} on "
        f"average. After four times the steps the gain on two of the sets was {after}; it had been "
        f"{before}. Faster R-CNN, which begins at stride 4 already, gained "
        f"{' and '.join(two_stages)} on two. After adapting the RetinaNet, a factor of .5 changed "
        f"AP50 by {min(halved):+.1f} to {max(halved):+.1f} points, {np.mean(halved):+.1f} on "
        "average ([table](docs/adapting.md#what-to-expect))."
    )


def expected(runs: Runs) -> str:
    """Reached boxes, AP50 and cost of each way to fit, in one table."""
    lines = [
        [
            data,
            *(
                f"{runs.average(data, row, 'reached'):.0%}, {runs.mean(data, row).mean:.1f}"
                for row in FITS
            ),
        ]
        for data in runs.by_row
    ]
    costs = [f"{_over_stock(runs, row, 'cost'):.1f}" for row in FITS]
    head = ["boxes that reach IoU .5, AP50", *(NAMES[row] for row in FITS)]
    return table(head, [*lines, ["operations over stock's", *costs]])


_DETECTORS = {"fcos": "FCOS", "fasterrcnn": "Faster R-CNN"}
_CHANGES = {"scale": "ranges times", "radius": "radius", "roi": "adapted, RoI levels"}


def tables(found: dict[str, list[Runs]]) -> list[str]:
    """All tables, with their headings."""
    (main,) = found["main"]
    parts = {
        "Each step": steps(main),
        "Cost": cost(main),
        "Reached boxes": reach(main),
        "Factors on the adapted detector": factors(main),
        "Factors on the stock detector": _order(found["order"][0], main),
        "Four times the steps": _long(found["long"][0]),
        "Other detectors": _heads(found["heads"]),
        "Other starts": _starts(found["starts"], main),
        "Learning rates": _rates(found["rates"]),
    }
    shown = [text for title, part in parts.items() for text in (f"### {title}", part)]
    return ["## Adapting", _MEASURED, *shown, fold("Settings of each data set", settings(main))]


def answers(found: dict[str, list[Runs]], count: int) -> list[str]:
    """The four questions, each answered with its figures."""
    (main,) = found["main"]
    _, correlation, low, high = prediction(main)
    lost, wider = (list(regrets(main, among).values()) for among in (FITS[:3], FITS))
    images = {name: f"![{text}](images/adapting-{name}.svg)" for name, (_, text) in _DRAWN.items()}
    operations, seconds = (
        [f"{_over_stock(main, row, name):.1f}" for row in (Row.ADAPTED, Row.LARGER)]
        for name in ("cost", "cpu_seconds_of_training")
    )
    return [
        "## What does adapting give?",
        images["steps"],
        f"Short trainings from ImageNet's weights on seven sets of real images, {count} runs "
        "([set-up and tables](experiment-tables.md#adapting)). Gains are points of AP50: the mean "
        "of the data sets with its interval, then the least and the greatest.",
        "- **Anchors and a finer level**, `comparison.best` on every set: "
        f"{_span(main, Row.ADAPTED)}.\n"
        f"- **The best anchors alone**, at no cost: {_span(main, Row.SCALE)}.\n"
        f"- **An input twice as large**, stock anchors: {_span(main, Row.LARGER)}. The adapted "
        f"detector against it: {_span(main, Row.ADAPTED, Row.LARGER)}.\n"
        f"- **Factors of .5 on the adapted detector**: {_span(main, Row.HALF, Row.ADAPTED)}.",
        images["cost"],
        f"A finer level takes {operations[0]} times the operations of stock and {seconds[0]} times "
        f"its time of training; the larger input {operations[1]} and {seconds[1]} times. (What is "
        "not trained is computed once for all runs, and not in these times.)",
        "### Does the share of reached boxes predict AP?",
        images["reach"],
        f"To a degree: the rank correlation over the rows of a data set is {correlation:.2f} on "
        f"average ({low:.2f} to {high:.2f}). `comparison.best` "
        f"loses {np.mean(lost):.1f} points on average and {max(lost):.1f} at worst against the "
        f"best row by AP50 at the same input size; {np.mean(wider):.1f} and {max(wider):.1f} if "
        "the larger input counts as a row.",
        "### Do factors help the adapted detector?",
        images["factors"],
        "\n".join(
            f"- **{NAMES[row][0].upper() + NAMES[row][1:]}**: {_span(main, row, Row.ADAPTED)}."
            for row in FACTORS
        )
        + f"\n- **S-alpha against .5**: {_span(main, Row.ESTIMATED, Row.HALF)}.",
        "### In which order?",
        f"Levels and anchors first: on {_fits_gain_more(main)} of {len(main.by_row)} sets they "
        "gain more than the best kind of factor does afterwards "
        f"({main.over_sets(Row.ADAPTED, Row.STOCK)} "
        f"against {main.over_sets(Row.HALF, Row.ADAPTED)} for .5). Where the surroundings decide "
        f"(`dots`), .5 changes AP50 by {main.gain('dots', Row.HALF, Row.ADAPTED)} and S-alpha by "
        f"{main.gain('dots', Row.ESTIMATED, Row.ADAPTED)}.",
        "### Does it last?",
        _lasting(found["long"][0]),
        "### What about FCOS and Faster R-CNN?",
        _other_detectors(found["heads"]),
    ]


def _lasting(runs: Runs) -> str:
    return "All of the above is after 150 or 200 steps. After four times as many:\n\n" + "\n".join(
        f"- `{data}`: stock {runs.mean(data, Row.STOCK).mean:.1f}; adapting "
        f"**{runs.gain(data, Row.ADAPTED, Row.STOCK)}**; on top of it .5 "
        f"{runs.gain(data, Row.HALF, Row.ADAPTED)}, S-alpha "
        f"{runs.gain(data, Row.ESTIMATED, Row.ADAPTED)}."
        for data in runs.by_row
    )


def _other_detectors(groups: list[Runs]) -> str:
    head = (
        "Gains over the same detector as it is, on two sets with three seeds. Faster R-CNN begins "
        "at stride 4, so adapting only scales the anchors of its RPN. *RoI levels scaled* also "
        "moves the sizes at which RoI pooling changes levels:"
    )
    lines = [
        f"- {line[0]}: "
        + ", ".join(f"{d} {g}" for d, g in zip(base[1].by_row, _gains(base, line), strict=True))
        + "."
        for base, *others in _by_detector(groups).values()
        for line in others
    ]
    return "\n".join([head, "", *lines])


def _by_detector(groups: list[Runs]) -> dict[str, list[Line]]:
    """The rows of each other detector, the one as it is first."""
    found: dict[str, list[Line]] = {}
    for runs in groups:
        name = _DETECTORS[runs.setting["detector"]]
        changes = [
            f"{text} {runs.setting[key]}" for key, text in _CHANGES.items() if key in runs.setting
        ]
        for row in sorted({row for rows in runs.by_row.values() for row in rows}):
            label = ", ".join([name, *(changes or [row])])
            found.setdefault(name, []).append((label, runs, row))
    return {n: sorted(lines, key=lambda line: line[2] != Row.STOCK) for n, lines in found.items()}


def _gains(base: Line, other: Line) -> list[Mean]:
    """How much better a row is than another, perhaps of other runs, on each data set of `base`."""
    (_, runs, row), (_, found, better) = base, other
    return [
        mean_of(paired(found.values(data, better), runs.values(data, row)))
        for data in runs.by_row
        if runs.rows(data, [row])
    ]


def _fits_gain_more(runs: Runs) -> int:
    """On how many data sets adapting gains more than any kind of factor does afterwards."""
    return sum(
        runs.gain(data, Row.ADAPTED, Row.STOCK).mean
        > max(runs.gain(data, row, Row.ADAPTED).mean for row in runs.rows(data, FACTORS))
        for data in runs.by_row
        if runs.rows(data, FACTORS)
    )


def _span(runs: Runs, row: str, other: str = Row.STOCK) -> str:
    """The mean gain over data sets with its interval, the least, the greatest, and how sure."""
    gains = runs.gains(row, other)
    least, greatest = (choose(gains, key=lambda d: gains[d].mean) for choose in (min, max))
    above = sum(gain.low > 0 for gain in gains.values())
    below = sum(gain.high < 0 for gain in gains.values())
    return (
        f"**{runs.over_sets(row, other)}** ({gains[least].mean:+.1f} on {least}, "
        f"{gains[greatest].mean:+.1f} on {greatest}); {above} of {len(gains)} intervals above 0, "
        f"{below} below"
    )


def _over_stock(runs: Runs, row: str, name: str) -> float:
    """Something of a row over that of stock, averaged over the data sets."""
    sets = [data for data in runs.by_row if runs.rows(data, [row])]
    values = [runs.average(data, row, name) / runs.average(data, Row.STOCK, name) for data in sets]
    return float(np.mean(values))


def differences(base: Line, others: Sequence[Line]) -> str:
    """A table: AP50 of the first line, and how much better the others are, by data set."""
    label, runs, row = base
    sets = [data for data in runs.by_row if runs.rows(data, [row])]
    means = [runs.mean(data, row).mean for data in sets]
    lines = [[label, *(f"{mean:.1f}" for mean in means), f"{np.mean(means):.1f}"]]
    for label, found, other in others:
        gains = _gains(base, (label, found, other))
        over = mean_of([gain.mean for gain in gains if gain.count])
        cells = [f"{gain} ({gain.count})" if gain.count else "" for gain in gains]
        lines.append([label, *cells, str(over)])
    # An interval over two data sets says nothing.
    width = 1 + len(sets) + (len(sets) > 2)
    return table(["", *sets, "mean of the sets"][:width], [line[:width] for line in lines])


def within(runs: Runs, base: str, rows: Sequence[str], label: str = "") -> str:
    """`differences` of some rows of the same runs."""
    others = [(NAMES[row], runs, row) for row in rows]
    return differences((label or NAMES[base], runs, base), others)


def steps(runs: Runs) -> str:
    """What each step adds to stock, and the adapted detector to the larger input."""
    over_larger = within(runs, Row.LARGER, [Row.ADAPTED])
    return f"{within(runs, Row.STOCK, FITS[1:])}\n\n{over_larger}"


def cost(runs: Runs) -> str:
    """Operations, seconds of training and gain of each row, averaged over the data sets."""
    lines = [
        [
            NAMES[row],
            f"{_over_stock(runs, row, 'cost'):.2f}",
            f"{_over_stock(runs, row, 'cpu_seconds_of_training'):.2f}",
            str(runs.over_sets(row, Row.STOCK)),
        ]
        for row in FITS[1:]
    ]
    return table(["", "operations / stock", "seconds of training / stock", "AP50 - stock"], lines)


def reach(runs: Runs) -> str:
    """How well the share of reached boxes orders the rows by AP50, and what the best one loses."""
    by_data, mean, low, high = prediction(runs)
    lost, wider = regrets(runs), regrets(runs, FITS)
    lines = [
        [data, f"{by_data[data]:.2f}", f"{lost[data]:.1f}", f"{wider[data]:.1f}"]
        for data in runs.by_row
    ]
    means = [f"{np.mean([*losses.values()]):.1f}" for losses in (lost, wider)]
    head = ["data", "rank correlation with AP50", "`best` loses", "if the larger input counts"]
    shares = "The shares themselves are on [another page](adapting.md#what-to-expect)."
    last = ["mean of the sets", f"{mean:.2f} ({low:.2f} to {high:.2f})", *means]
    return f"{shares}\n\n{table(head, [*lines, last])}"


def factors(runs: Runs) -> str:
    """Paired differences to factors of 1, and of S-alpha to .5."""
    parts = [
        within(runs, Row.ADAPTED, FACTORS, "factors of 1"),
        within(runs, Row.HALF, [Row.ESTIMATED]),
    ]
    return "\n\n".join(parts)


def settings(runs: Runs) -> str:
    """What the runs of each data set have in common."""
    head = ["data", "images", "crop", "steps", "best row", "finest anchors, px", "S-alpha"]
    lines = []
    for data in runs.by_row:
        record = runs.any(data, Row.ADAPTED)
        config, estimated = record["config"], runs.any(data, Row.ESTIMATED)
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


def _order(runs: Runs, main: Runs) -> str:
    rows = sorted({row for rows in runs.by_row.values() for row in rows})
    lines = [(row, runs, row) for row in rows]
    return differences(("stock", main, Row.STOCK), lines)


def _long(runs: Runs) -> str:
    parts = [
        within(runs, Row.STOCK, [Row.ADAPTED]),
        within(runs, Row.ADAPTED, [Row.HALF, Row.ESTIMATED]),
    ]
    return "\n\n".join(parts)


def _heads(groups: list[Runs]) -> str:
    return "\n\n".join(differences(base, others) for base, *others in _by_detector(groups).values())


def _starts(groups: list[Runs], main: Runs) -> str:
    found = {(runs.setting["start"], runs.setting["finer_start"]): runs for runs in groups}
    found["imagenet", "random"] = Runs(main.setting, {d: main.by_row[d] for d in groups[0].by_row})
    names = {"imagenet": "ImageNet's body", "cells2": "a detector trained on larger cells"}
    parts = []
    for start, name in names.items():
        base = f"from {name}; finer level: random", found[start, "random"], Row.ADAPTED
        parts.append(differences(base, [("zeros and a copy", found[start, "copy"], Row.ADAPTED)]))
    return "\n\n".join(parts)


def _rates(groups: list[Runs]) -> str:
    rates = {runs.setting["lr"]: runs for runs in groups}
    lines = [
        [data, row, *(f"{rates[rate].mean(data, row).mean:.1f}" for rate in sorted(rates))]
        for data in groups[0].by_row
        for row in (Row.STOCK, Row.ADAPTED)
    ]
    return table(["data", "row", *(f"{rate:g}" for rate in sorted(rates))], lines)
