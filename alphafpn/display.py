"""What results are shown with: an aligned table, and axes for a picture (extra `plot`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def new_axes() -> Axes:
    """Makes axes of a new figure that needs no display.

    Raises:
        ImportError: Without matplotlib; the message names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plotting needs matplotlib: pip install "alphafpn[plot]"') from error
    axes: Axes = Figure(layout="constrained").add_subplot()
    return axes


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Aligns columns as wide as their content: the first one left, the others right."""
    widths = [max(len(row[c]) for row in [header, *rows]) for c in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if c == 0 else cell.rjust(width)
            for c, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, *rows]
    ]
