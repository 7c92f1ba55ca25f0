"""Renders docs/benchmarks.md from the results file: `python -m benchmarks.page`."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.markdown import fold, table, write

Entry = dict[str, Any]

HERE = Path(__file__).parent
KEPT = HERE / "results.json"
RESULTS = Path(os.environ.get("ALPHAFPN_RESULTS", KEPT))  # where a run puts its records

HEAD = """\
---
hide: [toc]
---

# Benchmarks

What the library costs, from the newest record of each case in `benchmarks/results.json`.
"""
TARGETS_HEAD = """\
## Targets

A ratio compares two things that were timed in turns; its interval is that of the median. *Upper
end*: the upper end of the interval has to keep the bound. *Undecided*: the bound lies inside the
interval. A target with several cases is met if all of them keep it, and shows the case that misses
by most.
"""
METHOD = """\
Times are medians. Intervals are distribution-free 95 % intervals of the median ratio over pairs
(their whole range with fewer than six pairs). The CPU's cores are virtual and share their host, so
single times vary by a factor of two from minute to minute. Other work on the machine widens the
intervals: `stock` shows by how much. Earlier records stay in the results file.

```bash
python -m pip install -e ".[bench]"
python -m benchmarks
```

measures all of it again, adds the records to the file and renders this page. `-k` chooses cases, as
in pytest. With `ALPHAFPN_RESULTS=file.json` the records go there and this page stays as it is.
"""


@dataclass(frozen=True)
class Target:
    """A bound on one figure of the records whose names begin with `prefix`."""

    what: str
    prefix: str
    bound: float
    field: str = "ratio"
    least: bool = False  # the figure has to be at least the bound; otherwise at most
    inverse: bool = False  # the figure is one over the field
    upper: bool = False  # the upper end of the interval has to keep the bound, not the median
    on: str = ""  # `CPU` or `GPU` if the target holds there only
    form: str = "{:.2f}"

    def rows(self, entries: Sequence[Entry]) -> list[tuple[str, ...]]:
        """A row of the table for each device: what, measured, target, verdict, device."""
        limit = f"at {'least' if self.least else 'most'} {self.form.format(self.bound)}"
        limit += " (upper end)" * self.upper
        cases: dict[str, list[Entry]] = defaultdict(list)
        for entry in newest(entries):
            if entry["name"].startswith(self.prefix) and self.field in entry:
                cases[entry["device"]].append(entry)
        return [
            (self.what, *self._judged(found, limit), short(device))
            for device, found in sorted(cases.items())
            if self.on in ("", "CPU" if device.startswith("CPU") else "GPU")
        ]

    def _judged(self, cases: Sequence[Entry], limit: str) -> tuple[str, str, str]:
        figures = [self._figure(case) for case in cases]
        sign = -1 if self.least else 1
        misses = [sign * (high if self.upper else value) for value, _, high in figures]
        # A case whose whole interval is on the wrong side is a clearer miss than a wide one.
        clear = [
            sign * (high if self.least else low) > sign * self.bound for _, low, high in figures
        ]
        value, low, high = max(zip(clear, misses, figures, strict=True))[2]
        kept = sum(miss <= sign * self.bound for miss in misses)
        measured = self.form.format(value)
        if low < high:
            measured += f" ({self.form.format(low)} - {self.form.format(high)})"
        verdict = "met" if kept == len(cases) else "not met"
        verdict += " (undecided)" * (low < self.bound < high)
        return measured, limit, verdict + f", {kept} of {len(cases)} cases" * (len(cases) > 1)

    def _figure(self, entry: Entry) -> tuple[float, float, float]:
        """The figure and its interval; only ratios of pairs have one."""
        fields = (self.field, "low", "high") if self.field == "ratio" else (self.field,) * 3
        value, low, high = (float(entry[field]) for field in fields)
        return (1 / value, 1 / high, 1 / low) if self.inverse else (value, low, high)


# fmt: off
TARGETS = (
    Target("Counting, 3 shapes: times faster than brute force", "kernel/3 shapes", 10_000,
           field="times_faster", least=True, on="CPU", form="{:,.0f}"),
    Target("300 padded shapes of images, over one", "shapes/", 1.5),
    Target("Plain tensors, over a layout", "plain tensors/", 1.2, on="CPU"),
    Target("Irregular anchors: times faster than the matrix", "irregular/", 3,
           least=True, inverse=True),
    Target("30,000,000 boxes: memory beyond the inputs", "memory/30,000,000 boxes", 500,
           field="extra_mib", form="{:.0f} MiB"),
    Target("File to factors: times faster than pycocotools' loading", "file/pycocotools", 3.5,
           field="ours_over_this", least=True, inverse=True, form="{:.1f}"),
    Target("File to factors: peak memory, over the file's size", "file/estimate_alpha_for", 4,
           field="peak_over_file", form="{:.1f}"),
    Target("`alphafpn estimate` with its comparison, over the factors alone",
           "file/alphafpn estimate", 3, field="ours_over_this", inverse=True, form="{:.1f}"),
    Target("Command line on one box, over importing torchvision", "command line/", 1.1),
    Target("Pyramid alone, fixed factors, over stock", "pyramid/fixed/", 1.01,
           upper=True, form="{:.3f}"),
    Target("Pyramid alone, learnable factors, over stock", "pyramid/learnable/", 1.03,
           upper=True, form="{:.3f}"),
    Target("Train step, fixed factors, over stock", "train step/fixed", 1.01,
           upper=True, form="{:.3f}"),
    Target("Train step, fixed factors: tensors saved, over stock", "train step/fixed", 1,
           field="saved_for_backward_ratio", form="{:.4f}"),
    Target("Train step, fixed factors: peak memory, over stock", "train step/fixed", 1,
           field="peak_memory_ratio", form="{:.4f}"),
)
# fmt: on


def render() -> None:
    """Writes the page from the records that are kept."""
    write(HERE.parent / "docs" / "benchmarks.md", page(json.loads(KEPT.read_text())))


def page(entries: Sequence[Entry]) -> str:
    """The page in Markdown."""
    last = newest(entries)
    rows = [row for target in TARGETS for row in target.rows(last)]
    missing = [target.what for target in TARGETS if not target.rows(last)]
    notes = {
        f"{e['name'].split('/')[0]} ({short(e['device'])}): {e['note']}"
        for e in last
        if "note" in e
    }
    runs = {(e["device"], e["date"], e["python"], e["torch"], e["torchvision"]) for e in last}
    return (
        "\n\n".join(
            part.strip("\n")
            for part in (
                HEAD,
                meanings(entries),
                TARGETS_HEAD,
                table(("what", "measured", "target", "verdict", "device"), rows),
                f"Older code: {'; '.join(sorted(notes))}." if notes else "",
                f"Not measured: {'; '.join(missing)}." if missing else "",
                "## All figures",
                *(fold(title, text, show(last)) for title, text, show in SECTIONS),
                fold(
                    "How it was measured, and how to do it again",
                    table(("device", "date", "Python", "torch", "torchvision"), sorted(runs)),
                    METHOD,
                ),
            )
            if part
        )
        + "\n"
    )


def newest(entries: Iterable[Entry]) -> list[Entry]:
    """The last record of each case on each device, in the order of the names."""
    last = {(e["name"], e["device"]): e for e in sorted(entries, key=lambda e: e["date"])}
    return [last[key] for key in sorted(last)]


def short(device: str) -> str:
    """The device in a word: `CPU`, `H100`."""
    return device.split(",")[0].removeprefix("NVIDIA ").split()[0]


def meanings(entries: Sequence[Entry]) -> str:
    """What the newest figures mean for a user."""
    last = newest(entries)
    cpu = {e["name"]: e for e in last if short(e["device"]) == "CPU"}
    kernel, file = cpu["kernel/3 shapes"], cpu["file/estimate_alpha_for"]
    loading, memory = cpu["file/pycocotools"], cpu["memory/30,000,000 boxes"]
    fixed = [e for e in last if "pyramid/fixed" in e["name"] and short(e["device"]) != "CPU"]
    gpu = [100 * (e["ratio"] - 1) for e in fixed]
    added = [
        e["added_over_stock"] for e in entries if "/fixed/" in e["name"] and "added_over_stock" in e
    ]
    lines = (
        f"**Counting is never what you wait for.** All {kernel['boxes']:,} boxes of COCO take "
        f"{1e3 * kernel['candidate_median_s']:.0f} ms on two CPU cores. The matrix of their "
        f"overlaps with all anchors would take {kernel['baseline_s'] / 60:.0f} minutes.",
        f"**From a file of COCO's size ({file['file_mib']:.0f} MiB) to factors** takes "
        f"{file['median_s']:.1f} s. Loading it with pycocotools takes "
        f"{loading['median_s']:.0f} s. Memory peaks at {file['peak_over_file']:.1f} times the "
        "file's size.",
        f"**Memory does not grow with the anchors**: {memory['boxes']:,} boxes take "
        f"{memory['extra_mib']:.0f} MiB beyond the boxes themselves.",
        f"**Fixed factors on a CPU** add {min(added):.1%} to {max(added):.1%} to the "
        "time of the pyramid alone (their multiplications timed by themselves). In a whole "
        "train step that is lost in the noise.",
        f"**Fixed factors on a GPU** ({short(fixed[0]['device'])}, batch of 1) add "
        f"{min(gpu):.0f} to {max(gpu):.0f} % to the time of the pyramid alone, where "
        "starting an operation costs more than running it. Larger batches add less. A folded "
        "detector is stock and costs nothing.",
    )
    return "\n".join(f"- {line}" for line in lines)


def _cases(
    prefixes: Sequence[str], columns: dict[str, Callable[[Entry], str]]
) -> Callable[[list[Entry]], str]:
    """A table of the records whose names begin with one of the prefixes."""

    def show(entries: list[Entry]) -> str:
        rows = [
            (
                e["name"],
                f"{short(e['device'])} {e['date']}",
                *(_cell(f, e) for f in columns.values()),
            )
            for prefix in prefixes
            for e in entries
            if e["name"].startswith(prefix)
        ]
        return table(("case", "device", *columns), rows)

    return show


def _cell(show: Callable[[Entry], str], entry: Entry) -> str:
    try:
        return show(entry)
    except KeyError:  # older records lack some fields
        return ""


def _ratio(entry: Entry) -> str:
    return f"{entry['ratio']:.3f} ({entry['low']:.3f} - {entry['high']:.3f})"


def _pyramids(entries: list[Entry]) -> str:
    """The range of the ratios over detectors, image sizes and memory formats."""
    ratios: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        if entry["name"].startswith("pyramid/") and "folded" not in entry["name"]:
            _, kind, _, _, mode, _ = entry["name"].split("/")
            ratios[short(entry["device"]), mode][kind].append(entry["ratio"])
    kinds = ("stock", "fixed", "learnable")
    rows = [
        (device, mode, *(_range(found[kind]) for kind in kinds))
        for (device, mode), found in sorted(ratios.items())
    ]
    return table(("device", "mode", *kinds), rows)


def _range(values: Sequence[float]) -> str:
    return f"{np.median(values):.3f} ({min(values):.3f} to {max(values):.3f}, {len(values)} cases)"


SECTIONS: tuple[tuple[str, str, Callable[[list[Entry]], str]], ...] = (
    (
        "Counting",
        "800 x 1088 pixels, P2-P6: 217,413 anchors with 3 shapes, 652,239 with 9. *kernel*: "
        "860,000 boxes in one tensor, over `box_iou(...).max(1)` on a sample; the counts of the "
        "sample agree. *estimate_alpha*: a list with a tensor of seven boxes for each image.",
        _cases(
            ("kernel/", "estimate_alpha/", "memory/30"),
            {
                "time": lambda e: f"{1e3 * e['candidate_median_s']:.0f} ms",
                "times faster": lambda e: f"{e['times_faster']:,.0f}",
                "memory": lambda e: f"{e['extra_mib']:.0f} MiB",
            },
        ),
    ),
    (
        "Other anchors",
        "Time over: one shape for all images; a layout; the matrix of `box_iou`.",
        _cases(("shapes/", "plain tensors/", "irregular/"), {"ratio": _ratio}),
    ),
    (
        "Files and the command line",
        "118,287 images and 860,001 annotations with polygons. Times without imports, memory "
        "beyond the imports. *command line*: a process on a file with one box, over one that "
        "imports torchvision.",
        _cases(
            ("file/", "command line/"),
            {
                "time": lambda e: f"{e.get('median_s') or e['candidate_median_s']:.1f} s",
                "estimate_alpha_for over this": lambda e: f"{e['ours_over_this']:.2f}",
                "peak memory over file": lambda e: f"{e['peak_over_file']:.1f}",
                "ratio": _ratio,
            },
        ),
    ),
    (
        "The pyramid alone",
        "Batch of 1, over the stock pyramid in the same rounds: median, smallest and largest ratio "
        "over two detectors, two image sizes and two memory formats. *stock* is a second stock "
        "pyramid.",
        _pyramids,
    ),
    (
        "A train step",
        "Faster R-CNN with ResNet-50; one image of 256 px on a CPU, two of 640 px on a GPU.",
        _cases(
            ("train step/",),
            {
                "over stock": _ratio,
                "saved tensors": lambda e: f"{e['saved_for_backward_ratio']:.4f}",
                "peak memory": lambda e: f"{e['peak_memory_ratio']:.4f}",
            },
        ),
    ),
)


if __name__ == "__main__":
    render()
