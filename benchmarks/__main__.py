"""Runs all benchmarks and renders the page: ``python -m benchmarks`` (extra ``bench``)."""

from __future__ import annotations

import sys

import pytest

from benchmarks.page import HERE, KEPT, RESULTS, render

if __name__ == "__main__":
    code = pytest.main([str(HERE), "-q", "--benchmark-disable-gc", *sys.argv[1:]])
    print("records with all ratios:", RESULTS)
    if RESULTS == KEPT:
        render()
    sys.exit(code)
