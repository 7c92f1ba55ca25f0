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
import platform
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

FOLDER = Path(__file__).resolve().parent / "results"


def key_of(config: Mapping[str, Any]) -> str:
    """The name of a run: twelve digits of its configuration's SHA-256."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def digest(path: Path) -> str:
    """Twelve digits of a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def read(paths: Iterable[Path]) -> list[Record]:
    """The records of all files that exist. The first record of a run counts."""
    records: dict[str, Record] = {}
    for path in paths:
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
        line = json.dumps(finite(record), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        # A writer that was killed may have left the beginning of a line.
        file.write(line if not content or content.endswith(b"\n") else b"\n" + line)
        file.flush()
        os.fsync(file.fileno())


def kept(name: str) -> list[Record]:
    """The records of an experiment that are part of the project."""
    return read([FOLDER / f"{name}.jsonl.gz", FOLDER / f"{name}.jsonl"])


def settings(records: Sequence[Record], changed: Collection[str]) -> list[list[Record]]:
    """Groups of records whose configurations differ in nothing but the keys in `changed`."""
    found: dict[str, list[Record]] = {}
    for record in records:
        common = {k: v for k, v in record["config"].items() if k not in changed}
        found.setdefault(repr(sorted(common.items())), []).append(record)
    return list(found.values())


def by_seed(records: Sequence[Record], *names: str) -> dict[tuple[Any, ...], dict[int, Record]]:
    """Records by these values of their configurations, and by seed."""
    found: dict[tuple[Any, ...], dict[int, Record]] = {}
    for record in records:
        config = record["config"]
        found.setdefault(tuple(config[name] for name in names), {})[config["seed"]] = record
    return found


def work(
    todo: Sequence[Record],
    run: Callable[[Record], Record | None],
    file: Path,
    claims: Path,
    minutes: float = math.inf,
) -> None:
    """Does the runs that are not on record, in their order; none starts after `minutes`.

    `run` returns the results of a configuration, or None if it was interrupted. Lock files in
    `claims` keep two processes from doing the same run.
    """
    deadline = time.monotonic() + 60 * minutes
    for config in todo:
        if time.monotonic() > deadline:
            return
        key = key_of(config)
        with claim(claims / f"{key}.lock") as mine:
            if mine and key not in {record["key"] for record in read([file])}:
                found = run(config)
                if found is not None:
                    append(file, {"key": key, "config": config, **found})
                    print(" | ".join(map(str, config.values())), flush=True)


def environment() -> Record:
    """Device and versions, as records hold them."""
    import torch
    import torchvision

    cuda = torch.cuda.is_available()
    threads = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "device": torch.cuda.get_device_name() if cuda else threads,
    }


@contextlib.contextmanager
def claim(path: Path) -> Iterator[bool]:
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


def finite(value: Any) -> Any:
    """The same with None for every number that is not finite, as JSON has none."""
    if isinstance(value, Mapping):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
