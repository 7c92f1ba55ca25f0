"""The benchmark page: verdicts against records, and that the committed page is the rendering."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.page import TARGETS, Target, newest, page

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
VERSIONS = {"python": "3", "torch": "2", "torchvision": "0"}
MOST = Target("speed", "case/", 1.5)
LEAST = replace(MOST, least=True)
UPPER = replace(MOST, upper=True)
TIMES = replace(LEAST, bound=3.0, inverse=True)


def record(name="case/a", device="CPU, 2 threads", date="2026-01-01", **values):
    return {"name": name, "device": device, "date": date, **VERSIONS, **values}


def pair(ratio, low, high, name="case/a", **values):
    return record(name, ratio=ratio, low=low, high=high, **values)


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
    ],
)
def test_verdicts(target, entry, measured, verdict):
    ((what, *found, device),) = target.rows([entry])
    assert (what, device) == ("speed", "CPU")
    assert [found[0], found[2]] == [measured, verdict]


@pytest.mark.parametrize("reverse", [False, True])
def test_of_several_cases_the_clearest_miss_is_shown(reverse):
    met, wide = pair(1.2, 1.1, 1.3, "case/met"), pair(1.2, 0.9, 3.0, "case/wide")
    slow = pair(1.6, 1.55, 1.7, "case/slow")
    entries = [slow, met, wide][:: -1 if reverse else 1]
    ((_, measured, _, verdict, _),) = UPPER.rows(entries)
    assert (measured, verdict) == ("1.60 (1.55 - 1.70)", "not met, 1 of 3 cases")
    ((_, measured, _, verdict, _),) = replace(UPPER, bound=4.0).rows(entries)
    assert (measured, verdict) == ("1.20 (0.90 - 3.00)", "met, 3 of 3 cases")


def test_each_device_has_its_newest_record():
    old, new = pair(1.0, 1.0, 1.0), pair(2.0, 2.0, 2.0, date="2026-01-02")
    gpu = pair(1.1, 1.1, 1.1, device="NVIDIA X1 80GB")
    for entries in ([old, new, gpu], [gpu, new, old]):
        assert newest(entries) == [new, gpu]
        rows = MOST.rows(entries)
        assert [(row[3], row[4]) for row in rows] == [("not met", "CPU"), ("met", "X1")]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.what)
def test_targets_name_what_the_benchmarks_record(target):
    files = [*BENCHMARKS.glob("test_*.py"), BENCHMARKS / "pairs.py"]
    sources = "".join(path.read_text() for path in files)
    assert f'"{target.prefix.split("/")[0]}/' in sources
    assert f'"{target.field}"' in sources or f"{target.field}=" in sources


def test_the_committed_page_is_the_rendering_of_the_results():
    entries = json.loads((BENCHMARKS / "results.json").read_text())
    assert (ROOT / "docs" / "benchmarks.md").read_text() == page(entries), (
        "render it: python -m benchmarks.page"
    )
