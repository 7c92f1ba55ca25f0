"""Renders ``docs/benchmarks.md`` and its pictures from the results file."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.targets import TARGETS, Entry, newest
from benchmarks.workload import BOXES

HEAD = """---
hide: [toc]
---

# Benchmarks

What the library should keep to, and whether it does: the newest record of each case, made from
`benchmarks/results.json`. Ratios of times and of memory are those of pairs, with the interval of
their median. *Undecided*: the bound lies inside the interval; *upper end*: that of the interval has
to keep it. A target of several cases is met if all of them keep the bound; its figure is the one
that misses by most.
"""
METHOD = """Times are medians. Where a ratio has an interval, both sides were timed in turns; it is
the distribution-free 95 % interval of the median over pairs (with fewer than six, their whole
range). Large cases have six to eight pairs only. The kernel and what it is compared with were
timed one after the other; programs that read a file and the command line in processes of their
own. What is empty was not measured: no GPU was at hand since its cases came in, and a folded
pyramid is for inference. Other work on the machine widens the intervals: `stock` in the table of
the pyramid shows by how much.

The CPU's cores are virtual ones and share their host: one and the same call of the kernel was
seen to take 23 ms for some seconds, and 57 ms for the next ones. Earlier runs of the same cases
stay in the results file.

In a clone,

```bash
python -m pip install -e ".[bench]"
python -m benchmarks
```

measures all of it again, in about 13 minutes on two CPU cores, adds the records to that file,
and renders this page. `-k` chooses cases, as in pytest; with `ALPHAFPN_RESULTS=file.json` the
records go there and the page stays.
"""

HERE = Path(__file__).parent
KEPT = HERE / "results.json"
# Where a run puts its records.
RESULTS = Path(os.environ.get("ALPHAFPN_RESULTS", KEPT))


def render() -> None:
    """Writes the page and the pictures from the records that are kept."""
    entries = json.loads(KEPT.read_text())
    docs = HERE.parent / "docs"
    _plot_scaling(newest(entries), docs / "images" / "benchmark-scaling.png")
    (docs / "benchmarks.md").write_text(page(entries))


def page(entries: list[Entry]) -> str:
    """The page in Markdown: the targets, and all else folded."""
    last = newest(entries)
    folded = {
        "Levels of 860,000 boxes": _kernel,
        "From file to factors": _file,
        "The pyramid": _pyramid,
        "How it grows": _scaling,
        "How it was measured, and how to do it again": _method,
    }
    return "\n".join([HEAD, _targets(last), *(_fold(k, f(last)) for k, f in folded.items())])


def _targets(entries: list[Entry]) -> str:
    rows, reasons, missing, notes = [], [], [], []
    for target in TARGETS:
        outcomes = target.outcomes(entries)
        for device, entry, measured, verdict in outcomes:
            if entry is None:
                missing.append(f"{target.what} ({_name(device)})")
                continue
            mark = r"\*" if "note" in entry else ""
            if mark:
                notes.append(rf"\* {target.what} ({_name(device)}): {entry['note']}." + "\n")
            rows.append((target.what, measured, target.limit, verdict, _name(device) + mark))
        if target.why and any(outcome.verdict.startswith("not met") for outcome in outcomes):
            reasons.append(f"- **{target.what}**: {target.why}\n")
    devices = sorted({e["device"] for e in entries})
    named = "; ".join(f"{_name(device)} is {device.removeprefix('CPU, ')}" for device in devices)
    parts = [
        _table(("what", "measured", "target", "verdict", "device"), rows),
        *notes,
        *([f"{named}.\n"] if named else []),
        *([f"Not measured: {'; '.join(missing)}.\n"] if missing else []),
        *([_fold("Why some are missed", "".join(reasons))] if reasons else []),
    ]
    return "\n".join(parts)


def _method(entries: list[Entry]) -> str:
    rows = {(e["device"], e["date"], e["python"], e["torch"], e["torchvision"]) for e in entries}
    table = _table(("device", "date", "Python", "torch", "torchvision"), sorted(rows))
    return f"{table}\n{METHOD}"


def _fold(title: str, text: str) -> str:
    return f'<details markdown="1">\n<summary>{title}</summary>\n\n{text}\n</details>\n'


def _kernel(entries: list[Entry]) -> str:
    return "\n".join(
        [
            "800 x 1088 pixels, P2-P6: 217,413 anchors with 3 shapes a position, 652,239 with 9. "
            "The baseline is `torchvision.ops.box_iou(...).max(1)` on a sample, per box; in the "
            "same run every clear box of the sample gets the level that brute force gives.",
            "",
            _records(
                entries,
                "kernel/",
                ("anchors", "device", "all boxes", "boxes", "brute force per box", "times faster"),
                lambda e: (
                    f"{e['candidate_median_s'] * 1e3:.1f} ms",
                    f"{e['boxes'] / e['candidate_median_s'] / 1e6:.0f} M/s",
                    f"{e['baseline_s'] / e['boxes'] * 1e3:.3g} ms",
                    f"{e['times_faster']:,.0f}",
                ),
            ),
            "What keeps plain torch from the speed of a compiled loop: each of some 230 operations "
            "per block reads and writes its operands through the cache, and is shared out among "
            "threads on its own. Two ways to do with less were tried, side by side with it, and "
            "left out:",
            "",
            "- To sort boxes by the levels that their size leaves open (1.04 of 5 on average), and "
            "compare them with these only. Results are the same to the bit. In blocks whose memory "
            "is used again it took 26 ms instead of 31, and 35 instead of 52 with 9 shapes; to "
            "sort, gather and scatter takes most of what is saved, and the table of sizes 6 to 9 "
            "ms more, once for each set of anchors.",
            "- To give whole blocks to Python threads, with torch on one thread in each: 19 ms "
            "instead of 31. Torch takes its number of threads for the whole process, and a "
            "library should not change it behind the back of its user.",
            "",
            "Others, with 3 shapes:",
            "",
            _records(
                entries,
                "baseline/",
                ("baseline", "device", "per box", "kernel beside it", "times faster"),
                lambda e: (
                    f"{e['baseline_s'] / BOXES * 1e3:.3g} ms",
                    f"{e['candidate_median_s'] * 1e3:.1f} ms",
                    f"{e['times_faster']:,.0f}",
                ),
            ),
            "The public `estimate_alpha` on a list of 122,858 small tensors, one per image; and "
            "its inner part alone, which matches one tensor of all boxes and adds up the counts "
            "per image, the IoU histogram and the sizes:",
            "",
            _records(
                entries,
                "estimate_alpha/",
                ("anchors", "device", "list of tensors", "inner part"),
                lambda e: (
                    f"{e['candidate_median_s'] * 1e3:.0f} ms",
                    f"{e['without_the_list_s'] * 1e3:.0f} ms",
                ),
            ),
        ]
    )


def _scaling(entries: list[Entry]) -> str:
    recognised = "".join(
        f"Recognising the grid in {e['anchors']:,} plain anchors takes "
        f"{e['recognise_s'] * 1e3:.1f} ms ({_short(e)}).\n"
        for e in _of(entries, "plain tensors/")
    )
    ratios = [
        (e["name"], _where(e), f"{e['ratio']:.2f} ({e['low']:.2f} - {e['high']:.2f})")
        for prefix in ("shapes/", "plain tensors/", "irregular/")
        for e in _of(entries, prefix)
    ]
    return "\n".join(
        [
            "![Time against boxes and anchors](images/benchmark-scaling.png)",
            "",
            "Time of 300 padded shapes over one; of plain tensors over a layout; of irregular "
            "anchors over the whole matrix:",
            "",
            _table(("case", "device", "ratio"), ratios),
            recognised,
            "Peak memory beyond the inputs:",
            "",
            _records(
                entries,
                "memory/",
                ("case", "device", "memory"),
                lambda e: (f"{e['extra_mib']:.0f} MiB",),
            ),
        ]
    )


def _file(entries: list[Entry]) -> str:
    sizes = sorted({f"{e['file_mib']:.0f} MiB" for e in _of(entries, "file/")})
    return "\n".join(
        [
            f"{', '.join(['118,287 images', '860,001 annotations with polygons', *sizes])}; times "
            "without imports, memory beyond what the imports take. Typed decoding is part of what "
            "estimate_alpha_for does: a ratio below 1 between them is noise.",
            "",
            _records(
                entries,
                "file/",
                (
                    "what",
                    "device",
                    "rounds",
                    "time",
                    "estimate_alpha_for / this",
                    "peak memory / file",
                ),
                lambda e: (
                    e.get("rounds", ""),
                    f"{e['median_s']:.1f} s",
                    f"{e['ours_over_this']:.2f}",
                    f"{e['peak_over_file']:.1f}",
                ),
            ),
            "A whole process on a file with one box, over one that imports torchvision and ends:",
            "",
            _records(
                entries,
                "command line/",
                ("command", "device", "ratio", "seconds"),
                lambda e: (_ratio(e), f"{e['candidate_median_s']:.1f}"),
            ),
            "Shards counted by several processes and reduced:",
            "",
            _records(
                entries,
                "shards/",
                ("processes", "device", "equal to one process"),
                lambda e: (e["equal_to_the_last_count"],),
            ),
        ]
    )


def _pyramid(entries: list[Entry]) -> str:
    cases: dict[tuple[str, ...], dict[str, Entry]] = defaultdict(dict)
    for e in _of(entries, "pyramid/"):
        kind, *case = e["name"].removeprefix("pyramid/").split("/")
        cases[(*case, _where(e))][kind] = e
    rows = [
        (
            *case,
            *(_ratio(kinds.get(kind)) for kind in ("stock", "fixed", "learnable", "folded")),
            *(_added(kinds.get(kind)) for kind in ("fixed", "learnable")),
        )
        for case, kinds in cases.items()
    ]
    return "\n".join(
        [
            "Times over those of the stock pyramid, in the same rounds. `stock` is a second stock "
            "pyramid: what the machine itself adds. The last columns are the operations that the "
            "factors add, timed on their own, over the time of the whole stock pyramid.",
            "",
            _table(
                (
                    *("detector", "size", "mode", "format", "device"),
                    *("stock", "fixed", "learnable", "folded"),
                    *("added by fixed", "added by learnable"),
                ),
                rows,
            ),
            "A whole train step of Faster R-CNN (ResNet-50), with one image of 256 px on a CPU and "
            "two of 640 px on a GPU:",
            "",
            _records(
                entries,
                "train step/",
                ("kind", "device", "over stock", "saved tensors", "peak GPU memory"),
                lambda e: (
                    _ratio(e),
                    f"{e['saved_for_backward_ratio']:.4f}",
                    f"{e['peak_memory_ratio']:.4f}" if "peak_memory_ratio" in e else "not measured",
                ),
            ),
            "A detector in inference:",
            "",
            _records(
                entries, "inference/", ("kind", "device", "over stock"), lambda e: (_ratio(e),)
            ),
        ]
    )


def _of(entries: list[Entry], prefix: str) -> list[Entry]:
    return [e for e in entries if e["name"].startswith(prefix)]


def _ratio(entry: Entry | None) -> str:
    """Ratio and interval; nothing without a record."""
    return f"{entry['ratio']:.3f} ({entry['low']:.3f} - {entry['high']:.3f})" if entry else ""


def _added(entry: Entry | None) -> str:
    return f"{entry['added_over_stock']:.2%}" if entry and "added_over_stock" in entry else ""


def _name(device: str) -> str:
    """The device in a word: ``CPU``, ``H100``."""
    return device.split(",")[0].removeprefix("NVIDIA ").split()[0]


def _short(entry: Entry) -> str:
    return f"{_name(entry['device'])} {entry['date']}"


def _where(entry: Entry) -> str:
    """Device and date, with the note that the record may have."""
    return f"{_short(entry)} ({entry['note']})" if "note" in entry else _short(entry)


def _records(
    entries: list[Entry],
    prefix: str,
    header: tuple[str, ...],
    cells: Callable[[Entry], tuple[object, ...]],
) -> str:
    """The records whose names begin with `prefix`: rest of the name, device, and `cells`."""
    rows = [(e["name"].removeprefix(prefix), _where(e), *cells(e)) for e in _of(entries, prefix)]
    return _table(header, rows)


def _table(header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    if not lines:
        return "Not measured.\n"
    return "\n".join(["| " + " | ".join(header) + " |", "|" + " --- |" * len(header), *lines, ""])


def _plot_scaling(entries: list[Entry], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axes, draw, quantity in ((left, left.loglog, "boxes"), (right, right.semilogx, "anchors")):
        curves = defaultdict(list)
        for e in _of(entries, f"{quantity}/"):
            curves[_short(e)].append((e[quantity], e["median_s"]))
        for name, points in sorted(curves.items()):
            draw(*zip(*sorted(points), strict=True), "o-", label=name)
        axes.set(xlabel=quantity, ylabel="seconds")
        axes.legend(fontsize=8)
    left.set_title("217,413 anchors")
    right.set_title("860,000 boxes")
    right.set_ylim(0, 1.1 * right.get_ylim()[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    render()
