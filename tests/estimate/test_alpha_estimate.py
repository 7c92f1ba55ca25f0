from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed, multiprocessing

from alphafpn import AlphaEstimate, AnchorLayout, estimate_alpha
from tests.anchor_sets import FASTER, draw_boxes, legacy_layout
from tests.estimate.test_level_statistics import NAMES, estimate_of, tables

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
    assert first.merge(dataclasses.replace(first, strides=())).strides == ()


@pytest.mark.parametrize(
    "change",
    [
        {"level_names": ("P3", "P4", "P5")},
        {"num_fused_levels": 3},
        {"num_sizes": 2},
        {"clamp": None},
        {"detections_per_image": 5},
        {"iou_histogram": None},
    ],
)
def test_what_was_counted_otherwise_is_not_merged(change):
    estimate = estimate_of([[3, 2, 1]])
    with pytest.raises(ValueError, match="cannot merge"):
        estimate.merge(dataclasses.replace(estimate, **change))
    with pytest.raises(TypeError, match="an AlphaEstimate expected, found tuple"):
        estimate.merge(estimate.alpha)


def layout_and_images():
    layout = legacy_layout(FASTER, (64, 96))
    rng = np.random.default_rng(0)
    return layout, [draw_boxes(rng, layout, int(n)) for n in rng.integers(0, 30, 12)]


def count_shard(rank, address, results):
    torch.set_num_threads(1)  # threads do not survive a fork
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    layout, images = layout_and_images()
    # The second process has nothing to count.
    reduced = estimate_alpha(layout, images if rank == 0 else []).all_reduce()
    results.put((rank, reduced.to_dict()))
    distributed.destroy_process_group()


def test_all_reduce_with_an_empty_shard(tmp_path):
    layout, images = layout_and_images()
    whole = estimate_alpha(layout, images)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    address = f"file://{tmp_path / 'store'}"
    processes = [
        context.Process(target=count_shard, args=(rank, address, results)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    found = dict(results.get() for _ in processes)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert {rank: AlphaEstimate.from_dict(data) for rank, data in found.items()} == {
        0: whole,
        1: whole,
    }


def test_all_reduce_without_other_processes(tmp_path):
    estimate = estimate_of([[3, 2, 1]])
    assert estimate.all_reduce() == estimate
    address = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        assert estimate.all_reduce() == estimate
    finally:
        distributed.destroy_process_group()


def test_all_reduce_merges_what_all_processes_gave(monkeypatch):
    shards = [estimate_of([[3, 2, 1]]), estimate_of([[5, 0, 7], [1, 1, 1]])]

    def gather(into, own):
        assert own is shards[0]
        into[:] = shards

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather_object", gather)
    assert shards[0].all_reduce() == shards[0].merge(shards[1])
    monkeypatch.setattr(distributed, "is_available", lambda: False)
    assert shards[0].all_reduce() is shards[0]


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
        ({"counts": [1, 2]}, "entries expected"),
        ({"level_names": [1, 2, 3]}, r"\$.level_names\[0\]"),
        ({"moments": [[1, 2, 3]]}, "moments: 3 entries expected"),
        ({"moments": [[1, 2, 3], [1, 2], [1, 2, 3, 4]]}, r"moments"),
        ({"iou_sums": []}, "iou_sums: 3 entries expected"),
        ({"iou_histogram": [0] * 100}, "iou_histogram: 101 entries expected, found 100"),
        ({"num_images": None}, r"\$.num_images"),
        ({"num_images": -1}, r"\$.num_images"),
        ({"num_fused_levels": 9}, "num_fused_levels"),
        ({"clamp": [2.0, 0.2]}, "clamp"),
        ({"clamp": [0.2]}, r"\$.clamp"),
        ({"left_out": [1]}, r"\$.left_out"),
        ({"strides": [4.0]}, "strides"),
        ({"counts": [-1, 2, 3]}, r"\$.counts"),
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
    with pytest.raises(TypeError, match="a dict expected, found str"):
        AlphaEstimate.from_dict(json.dumps(data))


def test_summary_and_repr_of_an_estimate():
    layout, images = layout_and_images()
    estimate = estimate_alpha(layout, images)
    assert "P2" in estimate.summary()
    assert isinstance(layout, AnchorLayout)
    assert repr(estimate) == (
        f"AlphaEstimate(alpha=({', '.join(f'{v:.4g}' for v in estimate)}), "
        f"counts={estimate.counts}, num_images={estimate.num_images}, "
        f"num_boxes={estimate.num_boxes})"
    )
    assert repr(estimate_of([[0, 3, 1]], clamp=None)).startswith("AlphaEstimate(ratios=(inf")
