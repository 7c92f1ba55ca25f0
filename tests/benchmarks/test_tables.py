"""The committed pages of the experiments are what their records give."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from benchmarks import markdown, tables
from benchmarks.earlier import factors

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *("README.md", "docs/adapting.md", "docs/experiments.md", "docs/experiment-tables.md"),
]


def test_the_committed_pages_are_the_rendering_of_the_records(monkeypatch, tmp_path):
    committed = {page: (ROOT / page).read_text() for page in PAGES}
    # The correlations resample for ten seconds.
    start = committed[PAGES[-1]].index("| the best constant rises with")
    correlations = committed[PAGES[-1]][start:].split("\n\n")[0]
    monkeypatch.setattr(factors, "follows", lambda _: correlations)
    (tmp_path / "docs").mkdir()
    for page in PAGES[:-1]:
        shutil.copy(ROOT / page, tmp_path / page)
    tables.main(tmp_path)
    for page, text in committed.items():
        assert (tmp_path / page).read_text() == text, "write it: python -m benchmarks.tables"
    pictures = {path.name for path in (tmp_path / "docs" / "images").iterdir()}
    assert pictures == {
        path.name
        for kind in ("adapting", "factors")
        for path in (ROOT / "docs" / "images").glob(f"{kind}-*.svg")
    }


def test_a_page_is_filled_between_its_marks_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- x: begin -->\nold\n<!-- x: end -->\nafter\n")
    markdown.fill(page, "x", [markdown.table(["a", "b"], [["1", "2"]])])
    lines = page.read_text().split("\n")
    assert [line for line in lines if line] == [
        "before", "<!-- x: begin -->", "| a | b |", "| --- | --- |", "| 1 | 2 |",
        "<!-- x: end -->", "after",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="y: begin"):
        markdown.fill(page, "y", [])
