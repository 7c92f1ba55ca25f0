"""The results file: a line of JSON for each finished run, written whole or not at all."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a record, unless its run is there already. Safe among processes and against kills."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        if record["key"] in (known["key"] for known in _parse(content)):
            return
        line = json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        # A writer that was killed may have left the beginning of a line.
        file.write(line if not content or content.endswith(b"\n") else b"\n" + line)
        file.flush()
        os.fsync(file.fileno())


def finite(value: Any) -> Any:
    """A record with None for whatever number is not finite, as JSON has none."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """The records of all files that exist, each run once: as it was found first."""
    records: dict[str, dict[str, Any]] = {}
    for path in map(Path, paths):
        if path.exists():
            for record in _parse(path.read_bytes()):
                records.setdefault(record["key"], record)
    return list(records.values())


def _parse(content: bytes) -> list[dict[str, Any]]:
    records = []
    for line in content.splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:  # the beginning of a line, of a writer that was killed
            continue
    return records
