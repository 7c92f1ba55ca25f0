"""Shards on several processes: `all_reduce`, with shares that are empty or broken."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing

from alphafpn import AlphaEstimate, estimate_alpha, estimate_alpha_for
from tests.anchor_sets import FASTER, draw_boxes, legacy_layout
from tests.detectors import small_detector
from tests.estimate.test_for_detector import draw_dataset

WORLD = 2
PATIENCE = 60  # seconds; without the exchange of errors, processes wait for 30 minutes


def layout_and_images():
    layout = legacy_layout(FASTER, (64, 96))
    rng = np.random.default_rng(0)
    return layout, [draw_boxes(rng, layout, int(n)) for n in rng.integers(0, 30, 12)]


def items():
    return draw_dataset(np.random.default_rng(0), 9)


def share_of_tensors(rank):
    layout, images = layout_and_images()
    return estimate_alpha(layout, images[rank * 12 :])


def share_of_items(rank):
    return estimate_alpha_for(small_detector(), items()[rank::WORLD])


def share_without_boxes(rank):
    return estimate_alpha_for(
        small_detector(), items() if rank else [((64, 64), torch.zeros(0, 4))]
    )


def share_without_images(rank):
    return estimate_alpha_for(small_detector(), items() if rank else [])


def broken_share(rank):
    given = items()[rank::WORLD]
    if rank:
        given[1] = ((64, 64), torch.tensor([[9.0, 9, 3, 3]]))
    return estimate_alpha_for(small_detector(), given)


def share_of_a_process_that_dies(rank):
    if rank:
        raise SystemExit(1)
    return share_of_items(rank)


def work(rank, share, address, results):
    torch.set_num_threads(1)  # threads do not survive a fork
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=WORLD)
    try:
        results.put((rank, share(rank).all_reduce().to_dict()))
    except Exception as error:
        results.put((rank, f"{type(error).__name__}: {error}"))
        # As a process that goes on with other things: it neither ends nor answers.
        time.sleep(5)


def run(share, tmp_path, answers=WORLD):
    """What each process found; a dictionary or an error."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    address = f"file://{tmp_path / 'store'}"
    processes = [
        context.Process(target=work, args=(rank, share, address, results), daemon=True)
        for rank in range(WORLD)
    ]
    for process in processes:
        process.start()
    start = time.monotonic()
    found = {}
    while len(found) < answers and time.monotonic() - start < PATIENCE:
        if results.empty():
            time.sleep(0.05)
        else:
            rank, result = results.get()
            found[rank] = result
    for process in processes:
        process.kill()
        process.join()
    return found


@pytest.mark.parametrize(
    ("share", "whole"),
    [
        (share_of_tensors, lambda: estimate_alpha(*layout_and_images())),
        (share_of_items, lambda: estimate_alpha_for(small_detector(), items())),
        (
            share_without_boxes,
            lambda: estimate_alpha_for(small_detector(), [*items(), ((64, 64), torch.zeros(0, 4))]),
        ),
        (share_without_images, lambda: estimate_alpha_for(small_detector(), items())),
    ],
)
def test_every_process_gets_the_estimate_of_all_shares(share, whole, tmp_path):
    found = run(share, tmp_path)
    assert {rank: AlphaEstimate.from_dict(data) for rank, data in found.items()} == dict.fromkeys(
        range(WORLD), whole()
    )


def test_a_broken_share_ends_all_processes_with_its_error(tmp_path):
    found = run(broken_share, tmp_path)
    assert found[1].startswith("ValueError: dataset[1]: boxes[0]: expected")
    assert found[0] == f"RuntimeError: process 1 failed to estimate: {found[1]}"


def test_a_process_that_dies_ends_the_others(tmp_path):
    (error,) = run(share_of_a_process_that_dies, tmp_path, answers=1).values()
    assert "Error: " in error


def test_all_reduce_without_other_processes(tmp_path):
    layout, images = layout_and_images()
    estimate = estimate_alpha(layout, images)
    assert estimate.all_reduce() is estimate
    address = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        assert estimate.all_reduce() is estimate
        with pytest.raises(ValueError, match="expected boxes to count"):
            estimate_alpha_for(small_detector(), [((64, 64), torch.zeros(0, 4))])
    finally:
        distributed.destroy_process_group()
