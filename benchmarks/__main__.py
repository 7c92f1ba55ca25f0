"""Runs all benchmarks and renders the page: ``python -m benchmarks`` (extra ``bench``)."""

from __future__ import annotations

import os
import sys

import pytest

from benchmarks.page import HERE, render

if __name__ == "__main__":
    code = pytest.main([str(HERE), "-q", "--benchmark-disable-gc", *sys.argv[1:]])
    elsewhere = os.environ.get("ALPHAFPN_RESULTS")
    print("records with all ratios:", elsewhere or HERE / "results.json")
    if not elsewhere:
        render()
    sys.exit(code)
