"""What all tests share: the real data, and one thread per worker where tests run in parallel."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # More threads would only wait for each other.
    torch.set_num_threads(1)

# For `tests/mutants.py`: the same examples each time, and a failing one is not made smaller.
hypothesis.settings.register_profile(
    "mutants",
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)


@pytest.fixture
def data_file() -> Callable[[str], Path]:
    """Finds a file of the real data, which cannot be shipped; without the folder the test skips."""

    def find(name: str) -> Path:
        folder = os.environ.get("ALPHAFPN_DATA")
        if not folder:
            pytest.skip(f"needs {name}: ALPHAFPN_DATA names no folder of real data")
        path = Path(folder, name)
        assert path.is_file(), f"ALPHAFPN_DATA is {folder}, which has no {name}"
        return path

    return find
