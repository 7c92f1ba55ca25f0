"""Jobs in processes of their own."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import torch

from alphafpn.demo.processes import side_by_side


def square(number):
    if number < 0:
        os._exit(9)
    return torch.tensor(number**2), torch.get_num_threads(), os.getpid()


def test_all_jobs_are_done_each_process_on_one_thread():
    found = dict(side_by_side(square, range(4), 2))
    assert {job: int(result) for job, (result, _, _) in found.items()} == {0: 0, 1: 1, 2: 4, 3: 9}
    assert {threads for _, threads, _ in found.values()} == {1}
    assert len({process for _, _, process in found.values()} | {os.getpid()}) == 3


def test_a_process_that_dies_ends_all():
    with pytest.raises(RuntimeError, match="ended with code 9"):
        list(side_by_side(square, [-1], 1))
    assert not multiprocessing.active_children()
