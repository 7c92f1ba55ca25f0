"""The results file, a line of JSON for each finished run, and the pages that show it."""

from __future__ import annotations

import fcntl
import json
import math
import os
import textwrap
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


def write(path: Path, content: bytes) -> None:
    """Write a file so that it is never half there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def fill(page: Path, name: str, parts: Iterable[str]) -> None:
    """Write lines between the marks `name: begin` and `name: end` of a page, and nowhere else."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    old = page.read_text(encoding="utf-8") if page.exists() else f"{begin}\n{end}\n"
    if old.count(begin) != 1 or end not in old.partition(begin)[2]:
        raise ValueError(f"{page}: expected the marks {begin} and {end}, once each")
    before, _, rest = old.partition(begin)
    after = rest.partition(end)[2]
    text = "\n".join([f"{before}{begin}", "", *parts, "", f"{end}{after}"])
    write(page, text.encode())


def fold(head: str, text: str) -> str:
    """A block of a page that opens on a click."""
    return f'??? note "{head}"\n\n' + textwrap.indent(text, "    ")


def _parse(content: bytes) -> list[dict[str, Any]]:
    records = []
    for line in content.splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:  # the beginning of a line, of a writer that was killed
            continue
    return records
