from __future__ import annotations

import math

import pytest
import torch

from alphafpn import AnchorLayout, estimate_alpha
from alphafpn.estimate.checks import check_boxes, check_clamp


@pytest.mark.parametrize("shape", [(0,), (1, 0), (0, 4), (0, 0)])
def test_no_boxes_in_every_shape(shape):
    assert check_boxes(torch.zeros(shape), "here").shape == (0, 4)


@pytest.mark.parametrize(
    ("boxes", "error", "message"),
    [
        ([[0, 0, 1, 1]], TypeError, "here: expected a tensor .* found list"),
        (torch.zeros(2, 4, dtype=torch.bool), TypeError, "here: expected real numbers"),
        (torch.zeros(2, 4, dtype=torch.complex64), TypeError, "here: expected real numbers"),
        (torch.zeros(4), ValueError, r"here: expected shape \[N, 4\], found \[4\]"),
        (torch.zeros(0, 5), ValueError, r"found \[0, 5\]"),
        (torch.zeros(5, 0), ValueError, r"found \[5, 0\]"),
        (torch.zeros(1, 2, 4), ValueError, r"found \[1, 2, 4\]"),
        (torch.tensor([[0.0, 0, 1, 1], [0, 0, math.nan, 1]]), ValueError, r"here\[1\]: .*nan"),
        (torch.tensor([[0.0, 0, 1, math.inf]]), ValueError, r"here\[0\]: .*inf"),
        (torch.tensor([[-math.inf, 0, 1, 1]]), ValueError, r"here\[0\]: .*inf"),
        (torch.tensor([[math.inf, 0, math.inf, 1]]), ValueError, r"here\[0\]: .*inf"),
        (torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]]), ValueError, r"here\[1\]: .* finite x1 <= x2"),
        (torch.tensor([[-3e38, 0, 3e38, 1]]), ValueError, r"here\[0\]: .* finite area"),
        (torch.tensor([[0, 0, 1e20, 1e20]]), ValueError, r"here\[0\]: .* finite area"),
    ],
)
def test_boxes_that_are_refused(boxes, error, message):
    with pytest.raises(error, match=message):
        check_boxes(boxes, "here")


def test_boxes_in_other_types():
    for dtype in (torch.uint8, torch.int64, torch.float16, torch.bfloat16):
        boxes = check_boxes(torch.tensor([[1, 2, 1, 4]], dtype=dtype), "here")
        assert boxes.dtype == torch.float32
        assert boxes.tolist() == [[1, 2, 1, 4]]
    wanting = torch.tensor([[0.0, 0, 1e20, 1]], requires_grad=True)
    assert not check_boxes(wanting, "here").requires_grad


def test_boxes_without_area_are_boxes():
    boxes = torch.tensor([[0.0, 0, 0, 9], [-2, 3, 5, 3], [1, 1, 1, 1]])
    assert torch.equal(check_boxes(boxes, "here"), boxes)


def test_a_clamp_may_start_at_zero_and_be_a_point():
    assert check_clamp((0, 2)) == (0.0, 2.0)
    assert check_clamp([1, 1]) == (1.0, 1.0)
    assert check_clamp(None) is None


@pytest.mark.parametrize(
    ("clamp", "error"),
    [(2.0, TypeError), ("ab", TypeError), ((1, 2, 3), TypeError)]
    + [(pair, ValueError) for pair in ((2, 0.2), (-1, 2), (0.2, math.inf), (math.nan, 2))],
)
def test_clamps_that_are_refused(clamp, error):
    with pytest.raises(error, match="clamp: "):
        check_clamp(clamp)
    layout = AnchorLayout([torch.ones(1, 4)] * 2, [8, 16], [(1, 1)] * 2, 2)
    with pytest.raises(error, match="clamp: "):
        estimate_alpha(layout, torch.zeros(0, 4), clamp=clamp)
