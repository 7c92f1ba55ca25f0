"""Where the parts of a picture lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def drawn(axes: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The figure of `axes`, drawn at its own size, and a function from an artist to its place."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(axes.figure)
    canvas.draw()
    return axes.figure, lambda artist: artist.get_window_extent(canvas.get_renderer())
