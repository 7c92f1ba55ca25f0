"""The tables of the earlier experiments, by hand on small records, and on the records kept."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from benchmarks import tables
from benchmarks.earlier import factors, fine_tuning, systems, tinyperson
from benchmarks.earlier.groups import LOOK, groups
from benchmarks.records import kept

_END = "<!-- adapting: end -->"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "experiment-tables.md"


def cells(table):
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.split("\n")]


def run(alpha, seed, figure, data="near .2/.2/.2", start="", shares=(0.9, 0.8)):
    config = {
        "data": data, "seed": seed, "alpha": alpha, "start": start, "laterals": "",
        "weights": "scratch", "optimizer": "adamw", "rate": 0.004, "steps": 400,
    }  # fmt: skip
    return {
        "config": config,
        "figures": figure and {"AP50_tiny": figure, "AP50_all": figure / 2},
        "s_alpha": [0.2, 0.4],
        "shares": [{"forward": [share, share]} for share in shares],
    }


def test_a_group_compares_seed_by_seed():
    figures = {"1": (0.5, 0.6, 0.4), "0.5": (0.51, 0.62, 0.43), "0": (0.52, 0.50, 0.48)}
    runs = [run(alpha, seed, v) for alpha, found in figures.items() for seed, v in enumerate(found)]
    (group,) = groups([*runs, run("0.2", 0, None), run("0.2", 1, 0.5), run("0.2", 2, 0.5)])
    assert group.against("0.5") == pytest.approx([1, 2, 3])
    assert group.against("0.2") == pytest.approx([-50, -10, 10])  # what diverged found nothing
    assert group.peak == 0.5
    # On the other seeds the best constant is .5, and 0 where the second seed is left out.
    others = [0.51 - 0.5, 0.50 - 0.6, 0.43 - 0.4]
    assert group.regret("1") == pytest.approx(100 * sum(others) / 3)
    assert group.values(LOOK) == group.values("0.5")  # all shares fall
    (cell,) = groups([run("1", 0, 0.5, data="cells /5")])
    assert cell.values("1") == {0: 25.0}


def test_a_table_of_kinds_has_paired_differences():
    runs = [
        run(a, s, v + slope * s)
        for a, v, slope in (("1", 0.3, 0.1), ("0.5", 0.31, 0.101), ("S-alpha", 0.33, 0.102))
        for s in range(3)
    ]
    runs += [run("1", s, 0.5, start="S-alpha") for s in range(2)]
    text = factors.by_kind(groups(runs))
    assert cells(text)[2:7] == [
        ["S-alpha's factors", "0.2 0.4"],
        ["alpha = 1", "40.0"],
        ["alpha = 0.5", r"+1.1 ± 0.2\*"],
        ["first function only", "+15.0 ± 63.5"],
        ["S-alpha", r"+3.2 ± 0.5\*"],
    ]


def fine_tuned(way, target, seed, end):
    config = {"optimizer": "SGD", "rate": 0.1, "way": way, "target": target, "seed": seed}
    figures = {"before": 0.4, "after": 0.1, "ramped": 0.2, "end": end}
    return {"config": config, "figures": figures, "diverged_at": None, "loss": [2.0, 1.5]}


def test_fine_tuning_is_compared_with_staying_and_with_jumping():
    records = [
        *(fine_tuned("stay at 1", "1", seed, 0.3 + 0.1 * seed) for seed in range(3)),
        *(fine_tuned("jump", "0.2", seed, 0.2 + 0.1 * seed) for seed in range(3)),
        *(fine_tuned("ramp", "0.2", seed, 0.21 + 0.11 * seed) for seed in range(3)),
    ]
    rows = cells(fine_tuning.by_way(records))[2:]
    assert rows[0] == ["1", "stay at 1", "3", "40.0", "10.0", "20.0", "40.0", "", "", "1.500"]
    assert rows[2][6:] == ["32.0", "-8.0 ± 2.5", "+2.0 ± 2.5", "1.500"]


def whole(alpha, seed, value, diverged=None, **changes):
    config = {"alpha": alpha, "start": "", "seed": seed, "steps": 5, **changes}
    figures = dict.fromkeys((tinyperson._MAIN, *tinyperson._OTHERS), value)
    return {"config": config, "figures": figures, "alpha": [0.25], "diverged_at": diverged}


def test_diverged_runs_are_told_of():
    records = [whole(a, s, v + 0.1 * s) for a, v in (("1", 0.2), ("0.5", 0.22)) for s in (0, 1)]
    records += [whole("s-alpha", 0, 0.0, diverged=3)]
    rows = cells(tinyperson.by_kind(records))[2:]
    assert rows[0][:6] == ["alpha = 1", "0.25", "2", "25.00 ± 63.53", "", ""]
    assert rows[1][:3] == ["S-alpha", "", "0 (1 diverged)"]
    assert rows[2][:5] == ["alpha = 0.5", "0.25", "2", "27.00 ± 63.53", "+2.00 ± 0.00"]


def test_the_authors_figures_stand_next_to_ours():
    text = systems.detectors(kept("systems"))
    row = next(r for r in cells(text) if r[:2] == ["Adaptive RetinaNet", "none"])
    assert row[2:4] == ["10.36 ± 34.45", "15.99 ± 12.03"]
    assert row[-4:] == ["46.56", "48.34", "88.31", "87.73"]
    assert len(cells(text)) == 2 + 14


def test_the_committed_page_is_the_rendering_of_the_records(monkeypatch):
    before, _, rest = PAGE.read_text().partition("<!-- adapting: begin -->\n")
    # What the newer experiments have between these comments is their own tests' subject.
    committed = f"{before}<!-- adapting: begin -->\n<!-- adapting: end -->{rest.partition(_END)[2]}"
    # The correlations resample for ten seconds.
    start = committed.index("| the best constant rises with")
    correlations = committed[start : committed.index("\n\n", start)]
    monkeypatch.setattr(factors, "follows", lambda _: correlations)
    assert tables.page() == committed, "write it: python -m benchmarks.tables"
