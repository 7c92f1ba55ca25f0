"""What a comparison prints, finds and draws, for rows made by hand."""

from __future__ import annotations

import pytest

from alphafpn import AnchorComparison, AnchorFit
from tests.estimate.test_report import estimate_of

COUNTS = (40, 20, 10, 5)


def fit(reached, scale=1.0, finer=False, input_scale=1, cost=1.0, counts=COUNTS, **more):
    """A row of a detector with levels P2 to P5, at IoU .5 for `reached` of its boxes."""
    values = {
        "anchor_sizes": ((8.0,), (16.0, 20.125), (32.0,), (64.0,)),
        "max_objects": 30,
        "estimate": estimate_of(counts, num_crowded=0, detections_per_image=300),
        "different_anchors": (1, 2, 1, 1),
        "own_anchors": (),
        "own_input": (),
    }
    return AnchorFit(scale, finer, input_scale, reached=reached, cost=cost, **{**values, **more})


def compared(*rows, is_fcos=False):
    edges, by_size = (4.0, 16.0, 64.0, 256.0), (10, 0, 40)
    reached = tuple((k, 0, 10 * k) for k in range(1, len(rows) + 1))
    return AnchorComparison(rows, is_fcos, edges, by_size, reached)


def test_the_whole_table():
    found = compared(
        fit(0.3),
        fit(0.625, 0.412, counts=(10, 30, 0, 7)),
        fit(0.9, 0.5, finer=True, cost=2.934),
        fit(0.95, input_scale=2, cost=3.94),
    )
    assert (
        str(found)
        == """\
anchors      finer level    input  reach IoU 0.5  different  cost        alpha
own                   no      own          30.0%    1 2 1 1  1.00  0.50  0.75
own x 0.412           no      own          62.5%    1 2 1 1  1.00  2.00* 0.23
own x 0.5            yes      own          90.0%    1 2 1 1  2.93  0.50  0.75   <- best
own                   no  own x 2          95.0%    1 2 1 1  3.94  0.50  0.75
* set by the clamp, or 1 because a level has no objects
different: anchors per cell that differ after rounding, by level
anchor sizes of the best row: P2 8; P3 16,20.12; P4 32; P5 64
adapt_detector(model, 0.5, finer_level=True, max_objects=30)"""
    )


def test_the_table_of_fcos_says_when_there_is_nothing_to_adapt():
    rows = [fit(share, finer=finer, anchor_sizes=()) for share, finer in ((0.5, 0), (0.51, 1))]
    assert (
        str(compared(*rows, is_fcos=True))
        == """\
anchors  finer level  input  own a location  different  cost        alpha
own               no    own           50.0%    1 2 1 1  1.00  0.50  0.75   <- best
own              yes    own           51.0%    1 2 1 1  1.00  0.50  0.75
There is nothing to adapt: no row at this input reaches 2 points more. The call only raises caps
adapt_detector(model, 1, max_objects=30)"""
    )


@pytest.mark.parametrize(("boxes", "said"), [(49, True), (50, False)])
def test_a_scale_from_few_boxes_is_not_reliable(boxes, said):
    text = str(compared(fit(0.9, counts=(boxes - 30, 20, 5, 5))))
    assert ("The scale is not reliable: 49 boxes, fewer than 50" in text) == said


@pytest.mark.parametrize(
    ("reached", "best"),
    [
        ((0.90, 0.92, 0.92), 0),  # two points are no difference
        ((0.89, 0.92, 0.92), 1),
        ((0.50, 0.90, 0.92), 1),
        ((0.50, 0.89, 0.92), 2),
        ((0.50, 0.45, 0.40), 0),
    ],
)
def test_the_best_row(reached, best):
    rows = [fit(share, cost=cost) for share, cost in zip(reached, (1.0, 1.0, 3.0), strict=True)]
    found = compared(*rows, fit(1.0, input_scale=2, cost=0.5))
    assert found.best is rows[best]
    assert [row["best"] for row in found.to_list()] == [row is rows[best] for row in found.rows]


OWN = fit(0.3)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (fit(0.9, 0.8), "30% of the boxes reach IoU 0.5; with smaller anchors 90%: "),
        (fit(0.9, 1.5), "with larger anchors 90%: adapt_detector(model, 1.5, max_objects=30)"),
        (fit(0.9, finer=True, cost=1.05), "with a finer level 90%: "),
        (fit(0.9, finer=True, cost=1.06), "with a finer level 90%, for 1.1 times the cost: "),
        (fit(0.9, 0.5, finer=True), "with smaller anchors and a finer level 90%: "),
    ],
)
def test_the_finding_of_rows_that_fit_better(row, text):
    (found,) = compared(OWN, row).findings()
    assert text in found
    if row.finer_level:
        assert found.endswith(f": adapt_detector(model, {row.anchor_scale:g}, finer_level=True, "
                              "max_objects=30)")  # fmt: skip


def test_the_finding_of_boxes_that_nothing_reaches():
    (found,) = compared(fit(0.49), fit(0.5, 2.0)).findings()
    assert found == (
        "49% of the boxes reach IoU 0.5, and no other anchors reach 2 points more. Are the boxes "
        "in pixels? Their mean size is 10 px at the network's input"
    )
    assert compared(fit(0.5), fit(0.51, 2.0)).findings() == []


def test_the_finding_of_a_larger_input():
    large = fit(0.7, input_scale=2, cost=3.94)
    (found,) = compared(fit(0.59), large).findings()
    assert found == (
        "on an input 2 times as large 70% of the boxes reach IoU 0.5, for 3.9 times the cost: "
        "adapt_detector(model, 1, input_scale=2, max_objects=30)"
    )
    assert compared(fit(0.6), large).findings() == []  # ten points are not enough


def test_problems_of_the_data_are_the_first_findings():
    broken = estimate_of(COUNTS, num_clipped=40, left_out={"crowd": 9})
    beyond, left_out, fit_better = compared(fit(0.3, estimate=broken), fit(0.9, 0.5)).findings()
    assert beyond.startswith("53% of the boxes reach beyond their image")
    assert left_out == "9 boxes were left out: 9 crowd"
    assert fit_better.startswith("30% of the boxes reach IoU 0.5; with smaller anchors 90%")


def test_the_finding_of_many_objects():
    (found,) = compared(fit(0.9, max_objects=101)).findings()
    assert found.startswith("an image holds 101 objects; evaluations count fewer detections: ")
    assert compared(fit(0.9, max_objects=100)).findings() == []


def test_findings_come_in_the_order_of_what_they_cost():
    crowd = estimate_of(COUNTS, num_crowded=20, detections_per_image=300)  # of 50 images

    def order(*rows):
        words = {"IoU 0.5": "fit", "on an input": "input", "detections per image that": "caps",
                 "evaluations": "count"}  # fmt: skip
        return [
            next(name for word, name in reversed(words.items()) if word in text)
            for text in compared(*rows).findings()
        ]

    own = fit(0.3, estimate=crowd, max_objects=500)
    larger = fit(0.8, input_scale=2)
    assert order(own, fit(0.6, 0.5)) == ["caps", "fit", "count"]
    assert order(own, fit(0.8, 0.5)) == ["fit", "caps", "count"]
    assert order(own, fit(0.6, 0.5), larger) == ["caps", "fit", "input", "count"]
    assert order(own, fit(0.3, 0.5)) == ["fit", "caps", "count"]
    # No other anchors reach more: six in ten are lost, and four in ten are on crowded images.
    own = fit(0.4, estimate=crowd, max_objects=500)
    assert order(own, fit(0.41, 0.5)) == ["fit", "caps", "count"]
    own = fit(0.49, estimate=estimate_of(COUNTS, num_crowded=30), max_objects=500)
    assert order(own) == ["caps", "fit", "count"]
    own = fit(0.55, estimate=crowd, max_objects=500)
    assert order(own, larger) == ["caps", "input", "count"]


def test_rows_as_json():
    row = fit(0.9, 0.5, finer=True, cost=2.5)
    (entry,) = compared(row).to_list()
    assert entry == {
        "anchor_scale": 0.5, "finer_level": True, "input_scale": 1, "reached": 0.9,
        "max_objects": 30, "cost": 2.5, "anchor_sizes": [[8.0], [16.0, 20.125], [32.0], [64.0]],
        "different_anchors": [1, 2, 1, 1], "best": True, "level_names": ["P2", "P3", "P4", "P5"],
        "counts": list(COUNTS), "ratios": [0.5, 0.75], "alpha": [0.5, 0.75],
    }  # fmt: skip


@pytest.mark.parametrize("is_fcos", [False, True])
def test_the_picture_shows_shares_by_size(is_fcos):
    pytest.importorskip("matplotlib")
    found = compared(fit(0.3), fit(0.6, 2.0), fit(0.9, 0.5), is_fcos=is_fcos)
    axes = found.plot()
    own, adapted = axes.get_lines()
    for line, label, shares in ((own, "as it is", [0.1, 0.25]), (adapted, "adapted", [0.3, 0.75])):
        assert line.get_label() == label
        # Between the bounds of each bin, and none where no box is.
        assert line.get_xdata() == pytest.approx([8, 128])
        assert line.get_ydata() == pytest.approx(shares)
    assert axes.get_xscale() == "log"
    assert axes.xaxis.get_transform().base == 2
    assert axes.xaxis.get_major_formatter()(8.0) == "8"
    assert axes.get_ylim() == (0, 1.02)
    assert axes.get_xlabel() == "size of a box in pixels of the image"
    expected = "share that owns a location" if is_fcos else "share with IoU >= .5"
    assert axes.get_ylabel() == expected
    assert not axes.get_legend().get_frame_on()
    assert found.plot(axes) is axes
    assert len(compared(fit(0.9), fit(0.9, 2.0)).plot().get_lines()) == 1
