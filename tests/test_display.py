"""What results are shown with."""

from __future__ import annotations

import sys

import pytest

from alphafpn.display import new_axes, table


def test_a_table_is_as_wide_as_its_content():
    assert table(("", "one", "a long one"), [("left", "1", "2.5"), ("l", "12,345", "")]) == [
        "         one  a long one",
        "left       1         2.5",
        "l     12,345",
    ]
    assert table(("only", "a header"), []) == ["only  a header"]


def test_new_axes_have_a_figure_of_their_own():
    pytest.importorskip("matplotlib")
    axes, other = new_axes(), new_axes()
    assert axes.figure is not other.figure
    assert axes.figure.axes == [axes]


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "alphafpn\[plot\]"'):
        new_axes()
