from __future__ import annotations

from itertools import combinations, pairwise

import pytest

from tests.estimate.test_report import estimate_of
from tests.pictures import drawn


def test_levels_and_factors_are_drawn():
    pytest.importorskip("matplotlib")
    estimate = estimate_of((1000, 480, 0, 100, 20))
    axes = estimate.plot()
    assert [bar.get_height() for bar in axes.patches[:5]] == [1000, 480, 0, 100, 20]
    assert [label.get_text() for label in axes.get_xticklabels()] == list(estimate.level_names)
    texts = [text.get_text() for text in axes.texts]
    for factor in ("0.48", "0.20", "2.00"):
        assert any(factor in text for text in texts)
    assert texts.count("clamped") == 2
    assert axes.get_title() == "1,600 boxes on 50 images"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("pyramid level", "objects")
    assert estimate.plot(axes) is axes
    # Without a clamp, and with nothing counted.
    estimate_of((0, 0, 0, 0, 0), clamp=None).plot()


@pytest.mark.parametrize("counts", [(1000, 480, 0, 100, 20), (1, 0, 0), (0, 0, 0, 0, 0)])
def test_each_factor_stands_over_its_edge_and_nothing_overlaps(counts):
    pytest.importorskip("matplotlib")
    axes = estimate_of(counts).plot()
    figure, place = drawn(axes)
    inside = place(axes)
    bars = [place(bar) for bar in axes.patches[: len(counts)]]
    middles = [(bar.x0 + bar.x1) / 2 for bar in bars]
    for left, right in pairwise(bars):
        # Apart, but wider than the gap between them.
        assert 0 < right.x0 - left.x1 < left.width

    artists = list(axes.texts)
    numbers, edges = artists[: len(counts)], artists[len(counts) :]
    for number, bar, middle in zip(numbers, bars, middles, strict=True):
        shown = place(number)
        assert 0 <= shown.y0 - bar.y1 < shown.height
        assert (shown.x0 + shown.x1) / 2 == pytest.approx(middle, abs=1)
    assert len(edges) == 3 * (len(counts) - 2)
    for i, (arrow, label, origin) in enumerate(zip(*[iter(edges)] * 3, strict=True)):
        (x0, y0), (x1, y1) = axes.transData.transform([arrow.xyann, arrow.xy])
        # From the coarser level to the finer one.
        assert middles[i] < x1 < x0 < middles[i + 1]
        assert y0 == y1
        assert x0 - x1 > (middles[i + 1] - middles[i]) / 2
        for artist in (label, origin):
            shown = place(artist)
            if artist.get_text():
                assert (shown.x0 + shown.x1) / 2 == pytest.approx((x0 + x1) / 2, abs=1)
        assert place(origin).y1 < y0 < place(label).y0
    shown = [place(artist) for artist in artists if artist.get_text()]
    for text in shown:
        assert inside.x0 < text.x0 < text.x1 < inside.x1
        assert inside.y0 - 0.5 < text.y0 < text.y1 < inside.y1
    for one, other in combinations(shown, 2):
        assert not one.overlaps(other)
    if any(counts):
        assert max(bar.height for bar in bars) > inside.height / 2
    # What lies beside the axes is on the figure as well.
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        assert figure.bbox.x0 <= place(text).x0 < place(text).x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= place(text).y0 < place(text).y1 <= figure.bbox.y1
