"""What the benchmarks should show, and whether the results file does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Entry = dict[str, Any]


class Outcome(NamedTuple):
    """How a target fares on one device.

    Attributes:
        device: the device, or the kind of device where none of it is in the results.
        entry: the record of the case that misses by most; None without any.
        measured: its figure, for a table.
        verdict: begins with ``met``, ``not met`` or ``not measured``.
    """

    device: str
    entry: Entry | None
    measured: str
    verdict: str


@dataclass(frozen=True)
class Target:
    """A bound on one figure of the records whose names begin with `prefix`.

    Args:
        what: is bounded.
        prefix: of the records' names; where it ends in a slash, it stands for several cases.
        bound: for each of these cases.
        field: of the records.
        least: the figure has to be at least the bound, else at most.
        inverse: the figure is one over the field.
        upper: the upper end of the interval has to keep the bound, else the median.
        on: ``CPU`` or ``GPU`` where the target speaks of one of them only.
        form: of the figure and the bound.
        why: it may be missed; without figures, which the results file has.
    """

    what: str
    prefix: str
    bound: float
    field: str = "ratio"
    least: bool = False
    inverse: bool = False
    upper: bool = False
    on: str = ""
    form: str = "{:.2f}"
    why: str = ""

    @property
    def limit(self) -> str:
        """The bound in words."""
        words = f"at {'least' if self.least else 'most'} {self.form.format(self.bound)}"
        return f"{words} (upper end)" if self.upper else words

    def outcomes(self, entries: Sequence[Entry]) -> list[Outcome]:
        """One for each device in `entries` that the target speaks of."""
        devices = sorted({e["device"] for e in entries if self.on in ("", _kind(e["device"]))})
        return [self._outcome(device, entries) for device in devices or [self.on or "any"]]

    def _outcome(self, device: str, entries: Sequence[Entry]) -> Outcome:
        cases = newest(
            e
            for e in entries
            if e["device"] == device and e["name"].startswith(self.prefix) and self.field in e
        )
        if not cases:
            return Outcome(device, None, "", "not measured")
        worst = max(cases, key=self._miss)
        value, low, high = self._figure(worst)
        measured = self.form.format(value)
        if low < high:
            measured += f" ({self.form.format(low)} - {self.form.format(high)})"
        kept = sum(self._keeps(case) for case in cases)
        verdict = "met" if kept == len(cases) else "not met"
        if low < self.bound < high:
            verdict += " (undecided)"
        if len(cases) > 1:
            verdict += f", {kept} of {len(cases)} cases"
        return Outcome(device, worst, measured, verdict)

    def _keeps(self, entry: Entry) -> bool:
        judged = self._judged(entry)
        return judged >= self.bound if self.least else judged <= self.bound

    def _miss(self, entry: Entry) -> tuple[bool, float]:
        """How far off: cases whose whole interval is on the wrong side come before wide ones."""
        _, low, high = self._figure(entry)
        if self.least:
            return high < self.bound, -self._judged(entry)
        return low > self.bound, self._judged(entry)

    def _judged(self, entry: Entry) -> float:
        value, _, high = self._figure(entry)
        return high if self.upper else value

    def _figure(self, entry: Entry) -> tuple[float, float, float]:
        """The figure and its interval; only ratios of pairs have one."""
        fields = (self.field, "low", "high") if self.field == "ratio" else (self.field,) * 3
        value, low, high = (float(entry[field]) for field in fields)
        return (1 / value, 1 / high, 1 / low) if self.inverse else (value, low, high)


def newest(entries: Iterable[Entry]) -> list[Entry]:
    """The last record of each case on each device, in the order of the names."""
    last = {(e["name"], e["device"]): e for e in sorted(entries, key=lambda e: e["date"])}
    return [last[key] for key in sorted(last)]


def _kind(device: str) -> str:
    return "CPU" if device.startswith("CPU") else "GPU"


TARGETS = (
    Target(
        "Kernel, 3 shapes: times faster than brute force",
        "kernel/3 shapes",
        150_000,
        field="times_faster",
        least=True,
        on="CPU",
        form="{:,.0f}",
        why="The fewer shapes, the less there is to gain: brute force grows with the anchors, the "
        "kernel with the shapes. How fast two virtual cores share an operation changes from run to "
        "run.",
    ),
    Target(
        "300 padded shapes of images, over one",
        "shapes/300 against 1",
        1.5,
        why="With several shapes each box first has to look up the grid of its own image.",
    ),
    Target("Plain tensors, over a layout", "plain tensors/", 1.2, on="CPU"),
    Target(
        "Irregular anchors: times faster than the matrix",
        "irregular/",
        3.0,
        least=True,
        inverse=True,
        why="The search goes block by block to stay in a CPU's cache; on a GPU each block costs "
        "the start of its operations and saves nothing.",
    ),
    Target(
        "30,000,000 boxes: memory beyond the inputs",
        "memory/30,000,000 boxes",
        500,
        field="extra_mib",
        on="CPU",
        form="{:.0f} MiB",
    ),
    Target(
        "File to factors, over the typed decode alone",
        "file/typed msgspec decode",
        1.5,
        field="ours_over_this",
        on="CPU",
    ),
    Target(
        "File to factors: times faster than pycocotools' loading",
        "file/pycocotools",
        3.5,
        field="ours_over_this",
        least=True,
        inverse=True,
        on="CPU",
        form="{:.1f}",
    ),
    Target(
        "File to factors: peak memory, over the file's size",
        "file/estimate_alpha_for",
        4.0,
        field="peak_over_file",
        on="CPU",
        form="{:.1f}",
    ),
    # Both take seconds, nearly all of them torch's own imports.
    Target(
        "Command line on one box, over importing torchvision",
        "command line/alphafpn estimate",
        1.1,
        on="CPU",
    ),
    Target(
        "The pyramid alone, fixed factors, over stock",
        "pyramid/fixed/",
        1.01,
        upper=True,
        form="{:.3f}",
        why="Without its backbone the pyramid is short. On one image on a GPU, starting an "
        "operation costs more than running it, and each edge has one operation more. On the CPU "
        "the pairs are wider apart than what the factors add, which is timed on its own above.",
    ),
    Target(
        "The pyramid alone, learnable factors, over stock",
        "pyramid/learnable/",
        1.03,
        upper=True,
        form="{:.3f}",
        why="As for fixed factors, and their gradients are operations of their own.",
    ),
    # What the pairs are too wide to show on a busy CPU.
    Target(
        "Operations that fixed factors add, over the stock pyramid",
        "pyramid/fixed/",
        0.01,
        field="added_over_stock",
        on="CPU",
        form="{:.2%}",
    ),
    Target(
        "Operations that learnable factors add, over the stock pyramid",
        "pyramid/learnable/",
        0.03,
        field="added_over_stock",
        on="CPU",
        form="{:.2%}",
    ),
    Target(
        "Whole train step, fixed factors, over stock",
        "train step/fixed",
        1.01,
        upper=True,
        form="{:.3f}",
        why="On a busy CPU the pairs are wider apart than the bound, stock over stock as well.",
    ),
    Target(
        "Train step, fixed factors: tensors saved, over stock",
        "train step/fixed",
        1.0,
        field="saved_for_backward_ratio",
        form="{:.4f}",
    ),
    Target(
        "Train step, fixed factors: peak memory, over stock",
        "train step/fixed",
        1.0,
        field="peak_memory_ratio",
        on="GPU",
        form="{:.4f}",
    ),
    Target(
        "Training step of the experiments, batched, over the loop",
        "training/batched",
        1.0,
        why="Where the network itself takes nearly all of the time, little is left to gain.",
    ),
    Target(
        "Training of the experiments: crops a second",
        "training/batched",
        1000,
        field="crops_per_s",
        least=True,
        on="GPU",
        form="{:,.0f}",
    ),
    # The graph is stock, so what differs is noise: 1.00 to two digits.
    Target("Folded detector in inference, over stock", "inference/folded", 1.005, form="{:.3f}"),
)
