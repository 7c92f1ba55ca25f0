"""Records of runs: a JSON Lines file that several processes share, and pages made from it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import platform
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def key_of(config: Mapping[str, Any]) -> str:
    """Names a run by what it is."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def append(path: Path, record: Record) -> None:
    """Adds a record, unless its run is there already. Safe among processes and against kills."""
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


def read(paths: Iterable[Path]) -> list[Record]:
    """The records of all files that exist, each run once: as it was found first."""
    records: dict[str, Record] = {}
    for path in paths:
        if path.exists():
            for record in _parse(path.read_bytes()):
                records.setdefault(record["key"], record)
    return list(records.values())


def finite(value: Any) -> Any:
    """The same with None for every number that is not finite, as JSON has none."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def work(
    todo: Sequence[Record],
    run: Callable[[Record], Record],
    file: Path,
    claims: Path,
    minutes: float = math.inf,
) -> None:
    """Runs each configuration that the file lacks, in order; several processes may share it.

    Args:
        todo: The configurations.
        run: Returns the results of a configuration. `key` and `config` are added to them.
        file: Where records go.
        claims: Folder of lock files, which keep two processes from doing the same run.
        minutes: No run is started after so many.
    """
    began = time.monotonic()
    for config in todo:
        if time.monotonic() - began > 60 * minutes:
            return
        key = key_of(config)
        with claim(claims / f"{key}.lock") as mine:
            if mine and key not in {record["key"] for record in read([file])}:
                append(file, {"key": key, "config": config, **run(config)})
                seconds = round(time.monotonic() - began)
                print(f"{seconds} s:", " | ".join(map(str, config.values())), flush=True)


@contextlib.contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether this process may do a run; the claim ends with the process, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    path.unlink(missing_ok=True)


def environment() -> Record:
    """Versions and device, as records hold them."""
    import torch
    import torchvision

    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
    }


def write(path: Path, content: bytes) -> None:
    """Writes a file so that it is never half there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def fill(page: Path, name: str, parts: Iterable[str]) -> None:
    """Writes lines between the marks `name: begin` and `name: end` of a page, and nowhere else."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    old = page.read_text(encoding="utf-8") if page.exists() else f"{begin}\n{end}\n"
    if old.count(begin) != 1 or end not in old.partition(begin)[2]:
        raise ValueError(f"{page}: expected the marks {begin} and {end}, once each")
    before, _, rest = old.partition(begin)
    after = rest.partition(end)[2]
    write(page, "\n".join([f"{before}{begin}", "", *parts, "", f"{end}{after}"]).encode())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fold(head: str, text: str) -> str:
    """A block of a page that opens on a click."""
    return f'??? note "{head}"\n\n' + textwrap.indent(text, "    ")


def _parse(content: bytes) -> list[Record]:
    records = []
    for line in content.splitlines():
        # A writer that was killed may have left the beginning of a line.
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records
