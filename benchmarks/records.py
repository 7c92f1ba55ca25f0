"""Records of runs: a JSON object per line, in a file that may be compressed.

Any number of processes may work through the same list of configurations. Each run is done once.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

FOLDER = Path(__file__).resolve().parent / "records"


def key_of(config: Mapping[str, Any]) -> str:
    """The name of a run: twelve digits of its configuration's SHA-256."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def read(*paths: str | Path) -> list[Record]:
    """The records of all files that exist. The first record of a run counts."""
    records: dict[str, Record] = {}
    for path in map(Path, paths):
        if path.exists():
            content = path.read_bytes()
            for record in _parse(gzip.decompress(content) if path.suffix == ".gz" else content):
                records.setdefault(record["key"], record)
    return list(records.values())


def append(path: Path, record: Record) -> None:
    """Adds a record to an uncompressed file, unless its run is there.

    Safe with several writers, and after a writer was killed. Numbers that are not finite become
    null.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        if record["key"] in (known["key"] for known in _parse(content)):
            return
        line = json.dumps(_finite(record), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        # A writer that was killed may have left the beginning of a line.
        file.write(line if not content or content.endswith(b"\n") else b"\n" + line)
        file.flush()
        os.fsync(file.fileno())


def work(
    configs: Sequence[Mapping[str, Any]],
    run: Callable[[Mapping[str, Any]], Record | None],
    file: Path,
    *others: Path,
    minutes: float = math.inf,
) -> int:
    """Does the runs that are not on record, in their order.

    Args:
        configs: What to run.
        run: Returns the record without its key and configuration; None if it was interrupted.
        file: Where records are added.
        *others: More files whose runs are not repeated.
        minutes: No run starts later than this.

    Returns:
        How many of the runs are still missing.
    """
    deadline = time.monotonic() + 60 * minutes
    for config in configs:
        key = key_of(config)
        if key in _keys(file, *others) or time.monotonic() > deadline:
            continue
        with _claim(file.with_name(f".{file.stem}-{key}.lock")) as mine:
            # Another process may have finished it between the first look and the claim.
            if mine and key not in _keys(file):
                record = run(config)
                if record is not None:
                    append(file, {"key": key, "config": dict(config), **record})
    known = _keys(file, *others)
    return sum(key_of(config) not in known for config in configs)


def _keys(*paths: Path) -> set[str]:
    return {record["key"] for record in read(*paths)}


@contextlib.contextmanager
def _claim(path: Path) -> Iterator[bool]:
    """Whether this process may do a run. The claim ends with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
        path.unlink(missing_ok=True)


def _parse(content: bytes) -> Iterable[Record]:
    for line in content.splitlines():
        # The last line of a writer that was killed may not be complete.
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
