from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from alphafpn.estimate import counting
from alphafpn.estimate.counting import count_levels, images_of

NUM_LEVELS = 3
ONE = torch.tensor([0])


class FromBoxes:
    """Reads level and IoU off the boxes themselves, plus the image's layout; records its calls."""

    device = torch.device("cpu")

    def __init__(self):
        self.lengths = []

    def match(self, boxes, layout):
        self.lengths.append(len(boxes))
        return (boxes[:, 0].long() + layout) % (NUM_LEVELS + 1), boxes[:, 1]


@pytest.fixture
def drawn():
    """Boxes whose first numbers are level and IoU, and how many there are on each image."""
    rng = np.random.default_rng(0)
    sizes = torch.tensor([0, 3, 0, 0, 7, 1, 12, 0, 5, 0])
    boxes = torch.tensor(
        np.stack([rng.integers(0, 4, 28), rng.integers(0, 129, 28) / 128, *np.ones((2, 28))], 1)
    ).float()
    boxes[:, 2:] += boxes[:, :2]
    return boxes, sizes


@pytest.mark.parametrize("block", [1, 2, 5, 28, 100])
def test_blocks_add_up_to_a_count_of_every_image(drawn, monkeypatch, block):
    boxes, sizes = drawn
    monkeypatch.setattr(counting, "BLOCK", {"cpu": block, "other": 0})
    layout = torch.arange(len(sizes)) % 3
    matcher = FromBoxes()
    found = count_levels(matcher, boxes, sizes, NUM_LEVELS, layout)
    assert max(matcher.lengths) == min(block, len(boxes))
    assert sum(matcher.lengths) == len(boxes)
    image = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    level = (boxes[:, 0].long() + layout[image]) % 4
    expected = torch.zeros(len(sizes), 4, dtype=torch.int64)
    iou_sums = [Fraction(0)] * 4
    for i, j, iou in zip(image.tolist(), level.tolist(), boxes[:, 1].tolist(), strict=True):
        expected[i, j] += 1
        iou_sums[j] += Fraction(iou)
    assert torch.equal(found.per_image, expected)
    assert found.iou_sums.tolist() == [s * 2**20 for s in iou_sums]
    assert found.size_sum == len(boxes) * 2**10


def test_hundredths_of_iou_belong_to_their_bin():
    hundredths = torch.arange(101)
    for dtype in (torch.float32, torch.float64):
        boxes = torch.zeros(101, 4, dtype=dtype)
        boxes[:, 1] = hundredths.to(dtype) / 100
        found = count_levels(FromBoxes(), boxes, torch.tensor([101]), NUM_LEVELS, ONE)
        assert found.histogram.tolist() == [1] * 101
    boxes[:, 1] -= 0.001
    found = count_levels(FromBoxes(), boxes[1:], torch.tensor([100]), NUM_LEVELS, ONE)
    assert found.histogram.tolist() == [1] * 100 + [0]


def test_the_images_of_a_block():
    ends = torch.tensor([0, 3, 3, 10])
    assert images_of(ends, 0, 3) == (1, 2)
    assert images_of(ends, 2, 4) == (1, 4)
    assert images_of(ends, 3, 10) == (3, 4)


def test_a_device_has_its_own_block():
    assert counting.block_size(torch.device("cpu")) < counting.block_size(torch.device("cuda"))
    # Boxes of 8 and of 16 MiB.
    assert counting.block_size(torch.device("cpu")) * 16 <= 2**23
    assert counting.block_size(torch.device("cuda")) * 16 <= 2**24
    assert counting.block_size(torch.device("mps")) == counting.block_size(torch.device("cuda"))


def test_sizes_of_input_add_up(drawn):
    boxes, sizes = drawn
    once = count_levels(FromBoxes(), boxes, sizes, NUM_LEVELS, torch.zeros_like(sizes))
    twice = once + once
    assert (once.num_sizes, twice.num_sizes) == (1, 2)
    assert torch.equal(twice.per_image, 2 * once.per_image)
    names = {"level_names": ("P2", "P3", "P4")}
    estimate = twice.estimate(2, None, len(boxes), **names)
    assert estimate.num_sizes == 2
    assert sum(estimate.counts) + estimate.num_unmatched == 2 * len(boxes)
    table = once.per_image[:, :-1].numpy()
    assert once.estimate(2, None, 28, **names).moments == tuple(
        map(tuple, (table.T @ table).tolist())
    )
    assert once.estimate(2, None, 28, follows_iou=False, **names).iou_histogram is None
