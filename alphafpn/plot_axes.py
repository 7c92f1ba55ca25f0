"""matplotlib's axes for the pictures of results (extra `plot`)."""

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
    axes: Axes = Figure(figsize=(6, 3.6), layout="constrained").add_subplot()
    return axes
