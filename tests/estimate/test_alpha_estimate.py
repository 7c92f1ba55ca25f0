from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alphafpn import AlphaEstimate

NAMES = ("P2", "P3", "P4", "P5", "P6")


def estimate_of(per_image, num_fused_levels=None, unmatched=0, **kwargs):
    """An estimate with the given boxes per image and level, and nothing else of interest."""
    table = np.array(per_image, dtype=int)
    counts = table.sum(0)
    num_levels = len(counts)
    values = {
        "counts": tuple(counts.tolist()),
        "moments": tuple(map(tuple, (table.T @ table).tolist())),
        "level_names": NAMES[:num_levels],
        "num_fused_levels": num_fused_levels or num_levels - 1,
        "num_images": len(table),
        "num_boxes": int(counts.sum()) + unmatched,
        "num_unmatched": unmatched,
        "iou_histogram": (0,) * 101,
        "reached": (0,) * num_levels,
    }
    return AlphaEstimate(**{**values, **kwargs})


tables = st.integers(2, 5).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, 9), min_size=n, max_size=n), min_size=1, max_size=9)
)


# A sequence, immutable


def test_it_is_a_sequence_of_its_factors():
    estimate = estimate_of([[100, 50, 20, 8, 2]])
    assert list(estimate) == [0.5, 0.4, 0.5]
    assert (len(estimate), estimate[0], estimate[-1], estimate[1:]) == (3, 0.5, 0.5, (0.4, 0.5))
    assert 0.4 in estimate
    assert estimate.index(0.4) == 1
    assert list(reversed(estimate)) == [0.5, 0.4, 0.5]
    assert torch.tensor(estimate).tolist() == pytest.approx([0.5, 0.4, 0.5])
    assert np.asarray(estimate).tolist() == [0.5, 0.4, 0.5]
    with pytest.raises(IndexError):
        estimate[3]


def test_it_is_immutable_and_hashable():
    estimate = estimate_of([[3, 2, 1]], left_out={"crowd": 2})
    with pytest.raises(dataclasses.FrozenInstanceError):
        estimate.clamp = None
    with pytest.raises(TypeError):
        estimate[0] = 1.0
    twin = estimate_of([[3, 2, 1]], left_out={"crowd": 2})
    assert estimate == twin
    assert len({estimate, twin, estimate_of([[3, 2, 2]])}) == 2
    assert estimate != estimate_of([[3, 2, 1]])
    assert estimate != estimate.alpha
    for copied in (copy.deepcopy(estimate), pickle.loads(pickle.dumps(estimate))):
        assert copied == estimate
        assert hash(copied) == hash(estimate)


# Shards


@given(tables, st.data())
def test_merging_is_counting_together(table, data):
    cut = data.draw(st.integers(0, len(table)))
    table = np.array(table)
    whole = estimate_of(table, 2)
    first, second = estimate_of(table[:cut], 2), estimate_of(table[cut:], 2)
    assert first.merge(second) == second.merge(first) == whole


def test_merging_adds_what_adds_and_keeps_the_rest():
    first = estimate_of(
        [[3, 2, 1]],
        left_out={"crowd": 2, "ignore": 1},
        strides=(4.0, 8.0, 15.0),
        anchors_per_cell=(3, 3, 3),
        num_clipped=3,
        num_crowded=1,
        detections_per_image=100,
        size_sum=7,
    )
    second = dataclasses.replace(first, left_out={"crowd": 5, "zero size": 1}, strides=(4, 7, 16))
    merged = first.merge(second)
    assert merged.left_out == {"crowd": 7, "ignore": 1, "zero size": 1}
    assert merged.strides == (4.0, 8.0, 16.0)
    assert merged.anchors_per_cell == (3, 3, 3)
    assert (merged.num_crowded, merged.size_sum, merged.detections_per_image) == (2, 14, 100)
    assert (merged.num_images, merged.num_boxes, merged.num_clipped) == (2, 12, 6)
    other_cells = dataclasses.replace(first, anchors_per_cell=(9, 9, 9))
    assert first.merge(other_cells).anchors_per_cell == ()


def test_levels_of_small_images_take_the_names_of_large_ones():
    # Level 2 of small images has a single position, so its stride is no power of two.
    large = estimate_of([[3, 2, 1]], strides=(4.0, 8.0, 16.0))
    small = estimate_of([[1, 0, 2]], strides=(4.0, 8.0, 8.0), level_names=("0", "1", "pool"))
    whole = estimate_of([[3, 2, 1], [1, 0, 2]], strides=(4.0, 8.0, 16.0))
    assert small.merge(large) == large.merge(small) == whole
    # Without images strides are unknown, and names may be.
    empty = estimate_of(np.zeros((0, 3)), 2, level_names=("level 0", "level 1", "level 2"))
    assert empty.merge(large) == large.merge(empty) == large
    assert empty.merge(empty) == empty
    with pytest.raises(ValueError, match="other: expected levels"):
        empty.merge(estimate_of([[1, 2]], 2))


@pytest.mark.parametrize(
    "change",
    [
        {"level_names": ("P3", "P4", "P5")},
        {"level_names": ("P3", "P4", "P5"), "strides": (8.0, 16.0, 32.0)},
        {"num_fused_levels": 3},
        {"num_sizes": 2},
        {"clamp": None},
        {"detections_per_image": 5},
        {"iou_histogram": None},
    ],
)
def test_what_was_counted_otherwise_is_not_merged(change):
    estimate = estimate_of([[3, 2, 1]])
    with pytest.raises(ValueError, match="other: expected"):
        estimate.merge(dataclasses.replace(estimate, **change))
    with pytest.raises(TypeError, match="other: expected an AlphaEstimate, found tuple"):
        estimate.merge(estimate.alpha)


# JSON


@given(tables, st.sampled_from([None, (0.2, 2.0)]), st.booleans())
def test_json_round_trip(table, clamp, follows_iou):
    estimate = estimate_of(
        table,
        2,
        clamp=clamp,
        iou_histogram=tuple(range(101)) if follows_iou else None,
        left_out={"crowd": 3},
        strides=(4.0,) * len(table[0]),
        anchors_per_cell=(3,) * len(table[0]),
        detections_per_image=100,
    )
    text = json.dumps(estimate.to_dict(), allow_nan=False)
    again = AlphaEstimate.from_dict(json.loads(text))
    assert again == estimate
    assert hash(again) == hash(estimate)
    assert again.to_dict() == estimate.to_dict()


def test_the_dict_says_what_the_estimate_says():
    estimate = estimate_of([[0, 4, 2, 1, 0]], left_out={"crowd": 3})
    data = estimate.to_dict()
    assert data["ratios"] == [None, 0.5, 0.5]
    assert data["alpha"] == [2.0, 0.5, 0.5]
    assert data["confidence_interval"] == [[0.0, None]] * 3
    assert data["counts"] == [0, 4, 2, 1, 0]
    assert data["level_names"] == list(NAMES)
    assert data["left_out"] == {"crowd": 3}
    # A later change of the dict does not reach the estimate.
    again = AlphaEstimate.from_dict(data)
    data["left_out"]["crowd"] = 4
    assert again == estimate


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": "many"}, r"\$.counts"),
        ({"counts": [1, 2.5, 3]}, r"\$.counts\[1\]"),
        ({"counts": [1, 2]}, "expected 2 entries"),
        ({"level_names": [1, 2, 3]}, r"\$.level_names\[0\]"),
        ({"moments": [[1, 2, 3]]}, "moments: expected 3 entries"),
        ({"moments": [[1, 2, 3], [1, 2], [1, 2, 3, 4]]}, r"moments"),
        ({"reached": [1]}, "reached: expected 3 entries"),
        ({"iou_histogram": [0] * 100}, "iou_histogram: expected 101 entries, found 100"),
        ({"num_images": None}, r"\$.num_images"),
        *(
            ({name: -1}, rf">= 0.*\$.{name}")
            for name in ("num_images", "num_boxes", "num_unmatched", "num_sizes", "size_sum")
        ),
        ({"num_fused_levels": 9}, "num_fused_levels"),
        ({"clamp": [2.0, 0.2]}, "clamp"),
        ({"clamp": [0.2]}, r"\$.clamp"),
        ({"left_out": [1]}, r"\$.left_out"),
        ({"strides": [4.0]}, "strides"),
        ({"counts": [3, 2, -1]}, r">= 0.*\$.counts\[2\]"),
    ],
)
def test_dicts_that_are_refused(change, message):
    data = {**estimate_of([[3, 2, 1]]).to_dict(), **change}
    with pytest.raises(ValueError, match=message):
        AlphaEstimate.from_dict(data)


def test_dicts_that_lack_something():
    data = estimate_of([[3, 2, 1]]).to_dict()
    for name in ("counts", "moments", "level_names", "num_images", "clamp", "iou_histogram"):
        with pytest.raises(ValueError, match=name):
            AlphaEstimate.from_dict({k: v for k, v in data.items() if k != name})
    with pytest.raises(TypeError, match="data: expected a dict, found str"):
        AlphaEstimate.from_dict(json.dumps(data))


def test_an_estimate_shows_its_factors():
    estimate = estimate_of([[3, 2, 1]], 2)
    assert repr(estimate) == "AlphaEstimate(alpha=(1), counts=(3, 2, 1), num_images=1, num_boxes=6)"
    assert repr(estimate_of([[0, 3, 1]], clamp=None)).startswith("AlphaEstimate(ratios=(inf")


# Eq. 2, and the clamp


def test_ratios_and_the_extra_levels():
    assert estimate_of([[100, 50, 20, 8, 2]]).ratios == (0.5, 0.4, 0.5)
    assert estimate_of([[100, 50, 20, 8, 2]], 3).ratios == (0.5, 0.6)
    assert estimate_of([[100, 50, 20, 8, 2]], 5).ratios == (0.5, 0.4, 0.4, 0.25)
    assert estimate_of([[100, 50, 20, 8, 2]], 2).ratios == (0.8,)


def test_the_clamp_and_zeros():
    estimate = estimate_of([[0, 0, 5, 1, 100]])
    assert math.isnan(estimate.ratios[0])
    assert estimate.ratios[1:] == (math.inf, 101 / 5)
    assert estimate.alpha == (1.0, 2.0, 2.0)
    assert estimate_of([[100, 1, 100, 30, 0]]).alpha == (0.2, 2.0, 0.3)
    assert estimate_of([[0, 0, 5, 1, 0]], clamp=(0.5, 1.1)).alpha == (1.0, 1.1, 0.5)
    # 0 / 0 is 1 whatever the clamp.
    assert estimate_of([[0, 0, 0]], clamp=(0.2, 0.5)).alpha == (1.0,)
    assert estimate_of([[7, 0, 0]], clamp=(0.0, 2.0)).alpha == (0.0,)


def test_without_a_clamp():
    assert estimate_of([[1, 30, 0]], clamp=None).alpha == (30.0,)
    for table, name in (([[0, 0, 5]], "P2"), ([[0, 3, 5]], "P2"), ([[4, 0, 5, 0]], "P3")):
        estimate = estimate_of(table, clamp=None)
        for read in (lambda e: e.alpha, lambda e: e[0], list):
            with pytest.raises(ValueError, match=f"expected boxes on {name}.*'{name}': 0.*clamp"):
                read(estimate)
        assert len(estimate) == len(estimate.ratios)
        assert estimate.to_dict()["alpha"] is None


@given(tables)
def test_alpha_is_finite_and_within_the_clamp(table):
    estimate = estimate_of(table, num_fused_levels=len(table[0]))
    assert all(0.2 <= a <= 2.0 for a in estimate.alpha)
    for a, r, x, y in zip(
        estimate.alpha, estimate.ratios, estimate.counts[1:], estimate.counts, strict=False
    ):
        if y:
            assert r == x / y
            assert a == min(max(r, 0.2), 2.0)


def test_what_is_not_given_was_not_counted():
    estimate = AlphaEstimate((3, 2, 1), ((0,) * 3,) * 3, ("P2", "P3", "P4"), 2, 5, 6, 0)
    given, others = dataclasses.astuple(estimate)[:7], dataclasses.astuple(estimate)[7:]
    assert given[3:] == (2, 5, 6, 0)
    assert others == (1, (0.2, 2.0), None, (), 0, (), (), {}, 0, 0, {}, None, 0)


# Confidence


@settings(max_examples=100)
@given(tables)
def test_the_interval_is_the_delta_method_over_images(table):
    table = np.array(table)
    k = max(2, table.shape[1] - 1)
    estimate = estimate_of(table, k)
    n = len(table)
    assert estimate.confidence_interval() == estimate.confidence_interval(0.95)
    for i, (low, high) in enumerate(estimate.confidence_interval(0.9)):
        y = table[:, i]
        x = table[:, i + 1 :].sum(1) if i == k - 2 else table[:, i + 1]
        if n < 2 or not x.sum() or not y.sum():
            assert (low, high) == (0.0, math.inf)
            continue
        influence = x / x.sum() - y / y.sum()
        half = 1.6448536269514722 * math.sqrt(influence @ influence * n / (n - 1))
        ratio = x.sum() / y.sum()
        assert low == pytest.approx(ratio * math.exp(-half), rel=1e-6)
        assert high == pytest.approx(ratio * math.exp(half), rel=1e-6)
        assert 0 < low <= ratio <= high


def test_the_interval_is_that_of_a_bootstrap_over_images():
    rng = np.random.default_rng(0)
    # Crowded images: boxes of one image are alike, so images and not boxes are independent.
    rate = rng.gamma(0.7, 1.0, (400, 1)) * [9, 5, 2.5, 1.2, 0.4] * rng.gamma(3, 1 / 3, (400, 5))
    table = rng.poisson(rate)
    estimate = estimate_of(table)
    counts = table[rng.integers(0, 400, (4000, 400))].sum(1)
    numerators = np.stack([counts[:, 1], counts[:, 2], counts[:, 3] + counts[:, 4]], axis=1)
    bootstrap = np.quantile(numerators / counts[:, :3], [0.025, 0.975], axis=0).T
    total = table.sum(0)
    totals = zip([total[1], total[2], total[3] + total[4]], total[:3], strict=True)
    naive = [math.sqrt(1 / x + 1 / y) for x, y in totals]
    for found, expected, alone in zip(
        estimate.confidence_interval(), bootstrap, naive, strict=True
    ):
        assert found == pytest.approx(tuple(expected), rel=0.04)
        # Boxes are not independent: were they, the interval would be much narrower.
        assert math.log(found[1] / found[0]) > 1.2 * 2 * 1.96 * alone


def test_intervals_without_information():
    everything = (0.0, math.inf)
    assert estimate_of([[5, 3, 1]]).confidence_interval() == (everything,)
    assert estimate_of(np.zeros((0, 3))).confidence_interval() == (everything,)
    assert estimate_of([[5, 0, 0], [3, 0, 0]]).confidence_interval() == (everything,)
    assert estimate_of([[0, 1, 0], [0, 3, 0]]).confidence_interval() == (everything,)
    # The same shares everywhere: no spread at all.
    low, high = estimate_of([[4, 2, 0], [8, 4, 0]]).confidence_interval()[0]
    assert (low, high) == (pytest.approx(0.5), pytest.approx(0.5))
    # One box in each of two images, at a level so strict that the bounds overflow.
    low, high = estimate_of([[10**9, 1], [1, 10**9]], 2).confidence_interval(1 - 1e-15)[0]
    assert 0 <= low < high <= math.inf
    for level in (0, 1, -0.5, 95, math.nan):
        with pytest.raises(ValueError, match="confidence_level"):
            estimate_of([[5, 3, 1]]).confidence_interval(level)


# Recall


def test_recall():
    histogram = [0] * 101
    histogram[0], histogram[29], histogram[50], histogram[100] = 1, 2, 3, 4
    estimate = estimate_of([[5, 3, 1]], unmatched=1, iou_histogram=tuple(histogram))
    assert [estimate.recall(q) for q in (0, 0.01, 0.29, 0.3, 0.5, 0.51, 1.0)] == pytest.approx(
        [1, 0.9, 0.9, 0.7, 0.7, 0.4, 0.4]
    )
    # Every hundredth finds its own bin, however it is written.
    even = estimate_of([[101, 0]], 2, iou_histogram=(1,) * 101)
    for hundredth in range(101):
        expected = (101 - hundredth) / 101
        assert even.recall(hundredth / 100) == even.recall(hundredth * 0.01) == expected
    for iou in (-0.01, 1.01, math.nan):
        with pytest.raises(ValueError, match="iou: "):
            estimate.recall(iou)
    with pytest.raises(ValueError, match="regression ranges"):
        estimate_of([[1, 1]], 2, iou_histogram=None).recall(0.5)
    assert math.isnan(estimate_of(np.zeros((1, 3))).recall(0.5))


def test_the_mean_size():
    assert estimate_of([[2, 0, 2]], size_sum=40 << 10, num_sizes=2).mean_size == 5
    assert math.isnan(estimate_of(np.zeros((1, 3))).mean_size)
