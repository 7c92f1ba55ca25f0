from __future__ import annotations

import dataclasses
from itertools import combinations, pairwise

import pytest

from alphafpn import AlphaEstimate
from alphafpn.estimate.report import advice, summary, warnings
from tests.pictures import drawn


def estimate_of(counts, **kwargs):
    """An estimate of boxes of ten pixels that fit their anchors well."""
    total = sum(counts) + kwargs.get("num_unmatched", 0)
    histogram = [0] * 101
    histogram[70] = sum(counts)
    histogram[0] = kwargs.get("num_unmatched", 0)
    values = {
        "counts": counts,
        "moments": tuple(tuple(a * b for b in counts) for a in counts),
        "level_names": ("P2", "P3", "P4", "P5", "P6")[: len(counts)],
        "num_fused_levels": len(counts) - 1,
        "num_images": 50,
        "num_boxes": total,
        "num_unmatched": 0,
        "iou_histogram": tuple(histogram),
        "reached": tuple(int(0.75 * n) for n in counts),
        "size_sum": 10 * total * 1024,
        "strides": (4.0, 8.0, 16.0, 32.0, 61.0)[: len(counts)],
        "anchors_per_cell": (3,) * len(counts),
    }
    return AlphaEstimate(**{**values, **kwargs})


def test_the_table_shows_levels_and_factors():
    estimate = estimate_of((1000, 480, 240, 100, 20))
    lines = estimate.summary().splitlines()
    header = "level stride anchors/cell objects share reach IoU .5"
    assert " ".join(lines[0].split()) == header
    assert lines[1].split() == ["P2", "4", "3", "1,000", "54.3%", "75.0%"]
    assert lines[5].split() == ["P6", "61", "3", "20", "1.1%", "75.0%"]
    # The columns are aligned.
    assert len({line.index("%") for line in lines[1:6]}) == 1
    assert lines[7].split() == ["edge", "alpha", "ratio", "95%", "interval"]
    assert lines[8].startswith("P3 -> P2  0.480  0.480  ")
    assert lines[10].startswith("P5 -> P4  0.500  0.500  ")
    assert lines[-2] == "1,840 boxes on 50 images, mean size 10.0 px at the network's input"
    assert warnings(estimate) == []
    assert not any(line != line.rstrip() for line in lines)


def test_what_a_person_should_know_of_the_data():
    estimate = estimate_of(
        (1000, 480, 240),
        num_unmatched=7,
        num_sizes=1,
        left_out={"crowd": 1200, "zero size": 3, "other categories": 4000},
        notes={"polygons without a box": 17},
    )
    text = estimate.summary()
    assert "7 boxes overlap no anchor and are in no level" in text
    assert "warning: 1,203 boxes were left out: 1,200 crowd, 3 zero size" in text
    assert "4,000 boxes of other categories were not counted" in text
    assert "note: 17 polygons without a box" in text
    # One in a hundred is usual.
    assert warnings(estimate_of((57, 24, 18), left_out={"crowd": 1, "other categories": 9})) == []
    (one,) = warnings(estimate_of((57, 24, 17), left_out={"no box": 1}))
    assert one == "1 boxes were left out: 1 no box"
    both = dataclasses.replace(estimate_of((1000, 480, 240)), num_sizes=2, num_boxes=860)
    assert "860 boxes on 50 images, each at 2 input sizes" in both.summary()
    assert "58.1%" in both.summary()


def test_factors_that_the_clamp_set_are_marked():
    # In turn: too small, too large, x / 0, and within.
    estimate = estimate_of((1000, 1, 100, 0, 5, 0)[:5], num_fused_levels=5)
    assert estimate.alpha == (0.2, 2.0, 0.2, 2.0)
    rows = estimate.summary().splitlines()[8:12]
    assert [row.endswith("clamped") for row in rows] == [True] * 4
    found = [text for text in warnings(estimate) if "clamp [0.2, 2]" in text]
    assert len(found) == 4
    assert "the factor P3 -> P2 is set by the clamp [0.2, 2]: the ratio is 0.001" in found
    assert "the factor P6 -> P5 is set by the clamp [0.2, 2]: the ratio is inf" in found
    # A ratio on the bound is not set by it, nor is the 1 of 0 / 0.
    for counts, marked in (((1000, 200, 0), 0), ((0, 0, 0, 0), 0), ((0, 0, 7), 1)):
        assert estimate_of(counts).summary().count("clamped") == marked


def test_without_a_clamp_the_ratios_are_shown():
    estimate = estimate_of((0, 480, 240, 0), clamp=None, num_fused_levels=4)
    rows = estimate.summary().splitlines()[7:10]
    assert [row.split()[3] for row in rows] == ["inf", "0.500", "0.000"]
    assert "clamped" not in estimate.summary()
    assert "factors above 1.1 (P3 -> P2)" in estimate.summary()
    nothing = estimate_of((0, 0, 5), clamp=None, num_fused_levels=3)
    assert nothing.summary().splitlines()[6].split()[3:] == ["nan", "-", "-", "no", "objects"]


@pytest.mark.parametrize(("counts", "warned"), [((100, 110, 0), False), ((100, 111, 0), True)])
def test_factors_that_did_not_converge_in_the_paper(counts, warned):
    text = " ".join(warnings(estimate_of(counts)))
    assert ("factors above 1.1 (P3 -> P2)" in text) == warned


def test_anchors_that_fit_badly():
    histogram = [0] * 101
    histogram[10], histogram[35], histogram[60] = 84, 10, 86
    estimate = estimate_of((100, 60, 20), iou_histogram=tuple(histogram))
    (text,) = warnings(estimate)
    assert "the anchors fit badly: 52% of the boxes have no anchor with IoU >= 0.4." in text
    histogram[60] += 4  # half of the boxes
    histogram[10] -= 4
    assert warnings(estimate_of((100, 60, 20), iou_histogram=tuple(histogram))) == []


def test_objects_too_large_to_matter_and_crowded_images():
    estimate = estimate_of((100, 60, 20), size_sum=180 * 21 * 1024)
    assert "the mean object is 21 px at the network's input" in warnings(estimate)[0]
    assert warnings(estimate_of((100, 60, 20), size_sum=180 * 20 * 1024)) == []
    estimate = estimate_of((100, 60, 20), num_crowded=4, detections_per_image=100)
    assert "4 images hold more than 100 objects" in warnings(estimate)[0]


def test_boxes_in_another_format():
    cut = estimate_of((90, 60, 20), num_clipped=10, left_out={"outside the image": 10, "crowd": 5})
    text = warnings(cut)[0]
    assert text.startswith("11% of the boxes reach beyond their image")
    assert warnings(estimate_of((90, 60, 20), num_clipped=17)) == []
    rotated = estimate_of((90, 60, 20), num_clipped=10, num_fit_swapped=6)
    assert warnings(rotated) == [
        "6 boxes leave their image but would fit it with width and height swapped: were the "
        "images rotated by their EXIF orientation?"
    ]
    for few in (5, 1):
        assert warnings(dataclasses.replace(rotated, num_fit_swapped=few)) == []
    assert "smaller than a pixel" in warnings(estimate_of((90, 60, 20), size_sum=170 * 1023))[0]
    assert warnings(estimate_of((90, 60, 20), size_sum=170 * 1024)) == []


def test_levels_without_objects():
    (text,) = [text for text in warnings(estimate_of((90, 0, 0, 0, 5))) if "no objects" in text]
    assert text.startswith("no objects on P3, P4, P5: ")
    # An extra level has no factor of its own.
    assert warnings(estimate_of((90, 60, 0))) == []


def test_nothing_counted():
    estimate = estimate_of((0, 0, 0))
    assert warnings(estimate) == ["no boxes were counted, so all factors are 1"]
    text = estimate.summary()
    assert text.count("no objects") == 1
    assert text.count("0.0%") == 3
    assert "0 boxes on 50 images\n" in text


def test_fcos_and_irregular_anchors_leave_columns_open():
    unknown = {"iou_histogram": None, "reached": (), "strides": (), "anchors_per_cell": ()}
    names = ("level 0", "level 1", "level 2")
    estimate = estimate_of((100, 60, 20), level_names=names, **unknown)
    lines = estimate.summary().splitlines()
    assert lines[1].split() == ["level", "0", "-", "-", "100", "55.6%", "-"]
    assert warnings(estimate) == []


def test_advice_names_the_edges_whose_factor_may_do_harm():
    assert advice(estimate_of((100, 40, 20))) == [
        "also train with factors of 1 and of 0.5: the counts do not tell which are best"
    ]
    (_, low) = advice(estimate_of((100, 20, 15)))
    assert "P3 -> P2)" in low
    assert "P3 -> P2" not in "".join(advice(estimate_of((100, 20, 16))))
    assert advice(estimate_of((0, 0, 0))) == []
    assert summary(estimate_of((100, 20, 15))).splitlines()[-1] == f"advice: {low}"


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
