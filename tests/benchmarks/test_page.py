"""The benchmark page against records: verdicts, and that the committed page is their rendering."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.page import page
from benchmarks.targets import TARGETS, Target

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
VERSIONS = {"python": "3", "torch": "2", "torchvision": "0"}
MOST = Target("speed", "case/", 1.5, why="Because.")
LEAST = replace(MOST, least=True)
UPPER = replace(MOST, upper=True)
TIMES = replace(LEAST, bound=3.0, inverse=True)


def record(name="case/a", device="CPU, 2 threads", date="2026-01-01", **values):
    return {"name": name, "device": device, "date": date, **VERSIONS, **values}


def pair(ratio, low, high, name="case/a", **values):
    return record(name, ratio=ratio, low=low, high=high, **values)


def rows(text, title=None):
    """The cells of the first table: of the page, or of what is folded under a title."""
    if title:
        text = text.split(f"<summary>{title}</summary>\n", 1)[1].split("</details>", 1)[0]
    lines = text.split("\n")
    first = next(i for i, line in enumerate(lines) if line.startswith("| --- "))
    table = lines[first + 1 : lines.index("", first)]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in table]


@pytest.mark.parametrize(
    ("target", "entry", "measured", "verdict"),
    [
        (MOST, pair(1.4, 1.3, 1.45), "1.40 (1.30 - 1.45)", "met"),
        (MOST, pair(1.4, 1.3, 1.6), "1.40 (1.30 - 1.60)", "met (undecided)"),
        (MOST, pair(1.6, 1.4, 1.7), "1.60 (1.40 - 1.70)", "not met (undecided)"),
        (MOST, pair(1.6, 1.55, 1.7), "1.60 (1.55 - 1.70)", "not met"),
        (UPPER, pair(1.4, 1.3, 1.5), "1.40 (1.30 - 1.50)", "met"),
        (UPPER, pair(1.4, 1.3, 1.6), "1.40 (1.30 - 1.60)", "not met (undecided)"),
        (LEAST, pair(1.4, 1.3, 1.45), "1.40 (1.30 - 1.45)", "not met"),
        (LEAST, pair(1.6, 1.55, 1.7), "1.60 (1.55 - 1.70)", "met"),
        # A quarter of the time is four times faster, and the ends change places.
        (TIMES, pair(0.25, 0.2, 0.5), "4.00 (2.00 - 5.00)", "met (undecided)"),
        (TIMES, pair(4, 2, 5), "0.25 (0.20 - 0.50)", "not met"),
        (replace(MOST, field="mib"), record(mib=1.5, low=1, high=2), "1.50", "met"),
        (replace(MOST, field="mib"), pair(1, 1, 1), "", "not measured"),
        (MOST, pair(1, 1, 1, name="other/a"), "", "not measured"),
        (replace(MOST, on="GPU"), pair(1, 1, 1), "", "not measured"),
    ],
)
def test_verdicts(target, entry, measured, verdict):
    ((_, _, *found),) = target.outcomes([entry])
    assert found == [measured, verdict]


@pytest.mark.parametrize("reverse", [False, True])
def test_of_several_cases_the_clearest_miss_is_shown(reverse):
    met, wide = pair(1.2, 1.1, 1.3, "case/met"), pair(1.2, 0.9, 3.0, "case/wide")
    slow = pair(1.6, 1.55, 1.7, "case/slow")
    entries = [slow, met, wide][:: -1 if reverse else 1]
    ((_, entry, measured, verdict),) = UPPER.outcomes(entries)
    assert entry is slow
    assert measured == "1.60 (1.55 - 1.70)"
    assert verdict == "not met, 1 of 3 cases"
    (outcome,) = replace(UPPER, bound=4.0).outcomes(entries)
    assert outcome.entry is wide
    assert outcome.verdict == "met, 3 of 3 cases"
    fast, faster = (pair(r, r, r, f"case/{r}") for r in (0.2, 0.1))
    assert TIMES.outcomes([faster, fast])[0].entry is fast


def test_each_device_has_its_newest_record():
    old, new = pair(1.0, 1.0, 1.0), pair(2.0, 2.0, 2.0, date="2026-01-02")
    gpu = pair(1.1, 1.1, 1.1, device="GPU X")
    for entries in ([old, new, gpu], [gpu, new, old]):
        assert [(o.entry, o.verdict) for o in MOST.outcomes(entries)] == [
            (new, "not met"),
            (gpu, "met"),
        ]
    assert [o.device for o in replace(MOST, on="CPU").outcomes([gpu, old])] == [old["device"]]


def test_a_page_without_records_says_so():
    text = page([])
    named = "; ".join(f"{target.what} ({target.on or 'any'})" for target in TARGETS)
    assert f"\nNot measured: {named}.\n" in text
    assert "Why some are missed" not in text
    assert text.count("\nNot measured.\n") > 5


def test_the_targets_come_first_and_all_else_is_folded():
    entries = json.loads((BENCHMARKS / "results.json").read_text())
    text = page(entries)
    found = {(row[0], row[-1].removesuffix(r"\*")) for row in rows(text)}
    measured = [(t.what, o) for t in TARGETS for o in t.outcomes(entries) if o.entry]
    assert found == {
        (what, "CPU" if o.device.startswith("CPU") else "H100") for what, o in measured
    }
    first, *folded = text.split('<details markdown="1">\n<summary>')
    assert first.count("| --- ") == 5
    assert text.count("</details>") == len(folded) == 6
    assert all("\n</details>\n" in part for part in folded)


def test_tables_show_the_newest_run_only():
    name = "shapes/300 against 1"
    runs = [pair(r, r, r, name, date=d) for r, d in ((1.1, "a"), (1.3, "c"), (1.2, "b"))]
    gpu = pair(1.4, 1.4, 1.4, name, device="NVIDIA X1 80GB")
    text = page([*runs, gpu])
    assert rows(text, "How it grows") == [
        [name, "CPU c", "1.30 (1.30 - 1.30)"],
        [name, "X1 2026-01-01", "1.40 (1.40 - 1.40)"],
    ]
    assert "\nCPU is 2 threads; X1 is NVIDIA X1 80GB.\n" in text


def test_one_row_has_all_kinds_of_a_pyramid():
    kinds = {"stock": {}, "fixed": {"added_over_stock": 0.004}, "learnable": {}}
    entries = [
        pair(1 + i, 1, 9, f"pyramid/{kind}/RetinaNet/1x1/forward/contiguous", **more)
        for i, (kind, more) in enumerate(kinds.items())
    ]
    ratios = [f"{1 + i}.000 (1.000 - 9.000)" for i in range(3)]
    assert rows(page(entries), "The pyramid") == [
        ["RetinaNet", "1x1", "forward", "contiguous", "CPU 2026-01-01", *ratios, "", "0.40%", ""]
    ]


def test_reasons_and_notes_are_shown_where_they_belong():
    def of(ratio):
        return page([pair(ratio, ratio, ratio, "shapes/300 against 1", note="taken again")])

    target = next(t for t in TARGETS if t.prefix.startswith("shapes/"))
    assert target.why not in of(1.5)
    assert target.why in of(1.51)
    assert rows(of(1.5)) == [[target.what, "1.50", target.limit, "met", r"CPU\*"]]
    assert f"\n\\* {target.what} (CPU): taken again.\n" in of(1.5)
    assert rows(of(1.5), "How it grows") == [
        ["shapes/300 against 1", "CPU 2026-01-01 (taken again)", "1.50 (1.50 - 1.50)"]
    ]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.what)
def test_targets_name_what_the_benchmarks_record(target):
    files = [*BENCHMARKS.glob("test_*.py"), BENCHMARKS / "pairs.py"]
    sources = "".join(path.read_text() for path in files)
    assert f'"{target.prefix.split("/")[0]}/' in sources
    assert f'"{target.field}"' in sources or f"{target.field}=" in sources
    assert not any(letter.isdigit() for letter in target.why)


def test_the_committed_page_is_the_rendering_of_the_results():
    entries = json.loads((BENCHMARKS / "results.json").read_text())
    assert (ROOT / "docs" / "benchmarks.md").read_text() == page(entries), (
        "render it: python -m benchmarks.page"
    )
