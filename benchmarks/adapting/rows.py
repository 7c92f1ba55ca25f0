"""The rows of the experiment: how the stock detector is adapted, and its factors."""

from __future__ import annotations


class Row:
    """Names of rows, as records have them."""

    STOCK, SCALE, ADAPTED, LARGER = "stock", "scale", "adapted", "larger input"
    HALF, NONE = "adapted, alpha = 0.5", "adapted, alpha = 0"
    ESTIMATED, LEARNABLE, FIRST = (
        "adapted, S-alpha",
        "adapted, learnable",
        "adapted, first function",
    )
    STOCK_HALF, STOCK_ESTIMATED = "stock, alpha = 0.5", "stock, S-alpha"


FITS = (Row.STOCK, Row.SCALE, Row.ADAPTED, Row.LARGER)
FACTORS = (Row.HALF, Row.NONE, Row.ESTIMATED, Row.LEARNABLE, Row.FIRST)
NAMES = {
    Row.STOCK: "stock",
    Row.SCALE: "best anchors",
    Row.ADAPTED: "anchors and finer level",
    Row.LARGER: "larger input",
    Row.HALF: "factors of .5",
    Row.ESTIMATED: "S-alpha",
    Row.LEARNABLE: "learnable",
    Row.FIRST: "first function",
    Row.NONE: "factors of 0",
}
