"""The tables of the earlier experiments: the committed page is what their records give."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from benchmarks import tables
from benchmarks.earlier import factors

_END = "<!-- adapting: end -->"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "experiment-tables.md"


def test_the_committed_page_is_the_rendering_of_the_records(monkeypatch):
    before, _, rest = PAGE.read_text().partition("<!-- adapting: begin -->\n")
    # What the newer experiments have between these comments is their own tests' subject.
    committed = f"{before}<!-- adapting: begin -->\n<!-- adapting: end -->{rest.partition(_END)[2]}"
    # The correlations resample for ten seconds.
    start = committed.index("| the best constant rises with")
    correlations = committed[start : committed.index("\n\n", start)]
    monkeypatch.setattr(factors, "follows", lambda _: correlations)
    assert tables.page() == committed, "write it: python -m benchmarks.tables"
