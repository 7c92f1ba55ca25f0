from __future__ import annotations

import pytest
import torch

from alphafpn import AnchorLayout, estimate_alpha

CELL = torch.tensor([[-8.0, -8, 8, 8]])


@pytest.mark.parametrize(
    ("levels", "names"),
    [
        ([CELL, CELL], ("level 1", "level 0")),
        ([CELL, 2 * CELL, torch.cat([2 * CELL, 2 * CELL])], ("level 2", "level 1")),
    ],
)
def test_identical_levels_are_refused(levels, names):
    layout = AnchorLayout(levels, [8] * len(levels), [(4, 4)] * len(levels), 2)
    for anchors in (layout, layout.anchors(), [a.flip(0) for a in layout.anchors()]):
        with pytest.raises(ValueError, match=f"{names[0]} also lie on {names[1]},"):
            estimate_alpha(anchors, torch.zeros(0, 4), num_fused_levels=2)


def test_levels_within_a_finer_one_are_refused_and_others_are_not():
    def layout(cells, strides, grids):
        return AnchorLayout(cells, strides, grids, 2)

    refused = {
        "coarser grid": layout([CELL, CELL], [8, 16], [(4, 4), (2, 2)]),
        "offset": layout([CELL, CELL + 8], [8, 16], [(4, 4), (1, 2)]),
        "one of several cells": layout(
            [torch.cat([2 * CELL, CELL]), CELL], [8, 16], [(4, 4), (2, 2)]
        ),
        "single position": layout([CELL, CELL + 16], [8, 99], [(4, 4), (1, 1)]),
        "third level": layout([CELL, 4 * CELL, CELL], [8, 16, 32], [(4, 4), (2, 2), (1, 1)]),
    }
    kept = {
        "other size": layout([CELL, 1.01 * CELL], [8, 16], [(4, 4), (2, 2)]),
        "off the grid": layout([CELL, CELL + 4], [8, 16], [(4, 4), (2, 2)]),
        "beyond the grid": layout([CELL, CELL], [8, 16], [(4, 4), (3, 3)]),
        "before the grid": layout([CELL, CELL - 8], [8, 16], [(4, 4), (2, 2)]),
        "other stride": layout([CELL, CELL], [8, 12], [(4, 4), (2, 2)]),
        "other stride, first and third alike": layout([CELL, CELL], [8, 12], [(6, 6), (3, 3)]),
        "first row alike": layout([CELL, CELL], [8, (8, 12)], [(6, 6), (3, 3)]),
        "finer one": layout([CELL, CELL], [16, 8], [(2, 2), (4, 4)]),
        "two of three cells": layout(
            [CELL, torch.cat([CELL, 2 * CELL])], [8, 16], [(4, 4), (2, 2)]
        ),
    }
    for name, one in refused.items():
        literal = one.anchors()
        rows = [{tuple(row) for row in a.tolist()} for a in literal]
        assert any(rows[j] <= rows[i] for j in range(len(rows)) for i in range(j)), name
        for anchors in (one, literal, [a.flip(0) for a in literal]):
            with pytest.raises(ValueError, match="also lie on"):
                estimate_alpha(anchors, torch.zeros(0, 4), num_fused_levels=2)
    for name, one in kept.items():
        literal = one.anchors()
        rows = [{tuple(row) for row in a.tolist()} for a in literal]
        assert not any(rows[j] <= rows[i] for j in range(len(rows)) for i in range(j)), name
        for anchors in (one, literal, [a.flip(0) for a in literal]):
            estimate_alpha(anchors, torch.zeros(0, 4), num_fused_levels=2)


def test_irregular_anchors_are_compared_row_by_row():
    fine = AnchorLayout([CELL] * 2, [8, 8], [(12, 12)] * 2, 2).anchors()[0]
    fine = fine[torch.randperm(len(fine), generator=torch.Generator().manual_seed(0))]
    other = fine[:1] + 1
    for coarse in (fine, fine[:1], fine[5:90:2], torch.cat([fine[3:9], fine[:7]])):
        with pytest.raises(ValueError, match="level 1 also lie on level 0"):
            estimate_alpha([fine, coarse], torch.zeros(0, 4), num_fused_levels=2)
    for coarse in (other, torch.cat([fine, other]), torch.cat([fine[:1], other])):
        estimate_alpha([fine, coarse], torch.zeros(0, 4), num_fused_levels=2)
