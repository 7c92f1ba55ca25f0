"""Runs all benchmarks and renders the page: ``python -m benchmarks`` (extra ``bench``)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.page import render

if __name__ == "__main__":
    here = Path(__file__).parent
    code = pytest.main([str(here), "-q", "--benchmark-disable-gc", *sys.argv[1:]])
    render(here / "results.json", here.parent / "docs")
    sys.exit(code)
