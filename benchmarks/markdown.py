"""Tables, foldable blocks and pictures of the generated pages."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def fold(title: str, *parts: str) -> str:
    """A block that opens on a click."""
    return f'??? note "{title}"\n\n' + textwrap.indent(
        "\n\n".join(part.strip("\n") for part in parts if part), "    "
    )


def fill(page: Path, mark: str, parts: Iterable[str]) -> None:
    """Writes paragraphs between the comments `mark: begin` and `mark: end` of a page."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    before, found, rest = page.read_text("utf-8").partition(begin)
    if not found or begin in rest or rest.count(end) != 1:
        raise ValueError(f"{page}: expected the comments {begin} and {end}, once each")
    filled = "\n\n".join([begin, *parts, end])
    write(page, f"{before}{filled}{rest.partition(end)[2]}")


def write(page: Path, text: str) -> None:
    """Replaces a file at once, so that it is never half written."""
    partial = page.with_name(f".{page.name}.{os.getpid()}")
    partial.write_text(text, "utf-8")
    partial.replace(page)


def save(figure: Any, path: Path) -> None:
    """Saves a matplotlib figure as SVG. The same figure gives the same file."""
    import matplotlib
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "alphafpn"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
