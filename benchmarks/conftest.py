"""Devices to measure on, and the one results file."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.page import RESULTS
from benchmarks.records import environment

# When this run began: its records stand next to those of earlier runs.
BEGUN = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M}"
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Keeps one result next to those of earlier runs."""

    def keep(name: str, device: str = "cpu", **values: Any) -> None:
        where = _machine(device)
        entry = {"name": name, **where, **{k: _tidy(v) for k, v in values.items()}}
        entries = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        key = ("name", "device", "date")
        entries = [e for e in entries if any(e[k] != entry[k] for k in key)]
        entries.append(entry)
        entries.sort(key=lambda e: [e[k] for k in key])
        temporary = RESULTS.with_suffix(".tmp")
        lines = ",\n".join(json.dumps(e) for e in entries)
        temporary.write_text(f"[\n{lines}\n]\n")
        temporary.replace(RESULTS)

    return keep


def _machine(device: str) -> dict[str, Any]:
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"CPU, {torch.get_num_threads()} threads, {_cpu_name()}"
    return {"device": name, "date": BEGUN, **environment()["versions"]}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _tidy(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
