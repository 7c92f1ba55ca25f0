"""`GridMatcher`: the level of each box's best-IoU anchor, for cell anchors repeated over grids.

For one cell anchor the overlap with a box is a product of an x and a y part, and each part falls
with the distance between the centres. So the grid position nearest to the box holds the best anchor
of that shape, and the cost depends on the number of cell anchors, not on the number of anchors.

The fast pass works in coordinates relative to that position, and its error has a bound. Boxes whose
two best levels are closer than this bound are matched again from the corners of the anchors, with
the operations of `torchvision.ops.box_iou`: so rounding never decides. (Only if anchors far from
the origin are rounded by more than the levels differ, one beyond the nearest 3 x 3 may be better.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alphafpn.estimate.anchor_layout import AnchorLayout
from alphafpn.estimate.irregular import PAIRS, best_of, pair_iou

# Boxes per block of the fast pass: on a CPU its temporaries then stay in the cache.
CPU_BLOCK, OTHER_BLOCK = 16_384, 262_144
# Centres of cell anchors that differ by less, in pixels, are taken for one.
CENTRE_SPREAD = 1e-4


class GridMatcher:
    """Finds the exact best level for anchors on grids, at a cost per cell anchor.

    Each box's result depends on this box alone, so sums of shards equal those of the whole. The
    layouts give strides and grid sizes only; `dtype` is at least as wide as boxes and anchors.
    """

    def __init__(
        self,
        cell_anchors: Sequence[Tensor],
        layouts: Sequence[AnchorLayout],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.dtype, self.device = dtype, device
        self.cells = [cells.to(device) for cells in cell_anchors]
        # Per level, x stride, y stride, number of columns and of rows: [4, layouts].
        like = torch.empty((), dtype=dtype, device=device)
        grids = [
            [(*lay.strides[i][::-1], *lay.grid_sizes[i][::-1]) for lay in layouts]
            for i in range(len(self.cells))
        ]
        self.grids = [like.new_tensor(grid).t().contiguous() for grid in grids]
        corners = [cells.to(dtype) for cells in self.cells]
        # High corners, and the negatives of the low ones: so both are bounds from above.
        self.bounds = [torch.cat([c[:, 2:], -c[:, :2]], 1)[:, :, None] for c in corners]
        sides = [c[:, 2:] - c[:, :2] for c in corners]
        # Anchors without area overlap nothing; a tiny area keeps 0 / 0 out.
        tiny = torch.finfo(dtype).tiny
        self.areas = [side.prod(1).clamp(min=tiny)[:, None] for side in sides]
        centres = [(c[:, :2] + c[:, 2:])[:, :, None] / 2 for c in corners]
        # Cell anchors with one centre share the nearest position.
        self.centres = [c[:1] if (c - c[:1]).abs().max() < CENTRE_SPREAD else c for c in centres]
        # Distances in pixels. Rounding moves a corner by a few `eps * extent`, and may prefer a
        # position to the nearest one that is as much farther away. A level loses no more than the
        # share that this is of its shortest side, on both axes; and two levels are compared.
        extent = max(float((grid[2:] * grid[:2]).max()) for grid in self.grids)
        extent += max(float(bounds.abs().max()) for bounds in self.bounds)
        eps = max(torch.finfo(cells.dtype).eps for cells in self.cells)
        shortest = torch.cat(sides).min()  # with a side of 0 all boxes are matched again
        self.bound = float(8 * (4 * eps * extent + CENTRE_SPREAD) / shortest + 16 * eps)

    def match(self, boxes: Tensor, layout_index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Matcher.match`."""
        if layout_index is None:
            layout_index = torch.zeros(len(boxes), dtype=torch.int64, device=self.device)
        level = torch.empty(len(boxes), dtype=torch.int64, device=self.device)
        iou = torch.empty(len(boxes), dtype=self.dtype, device=self.device)
        doubtful = torch.empty(len(boxes), dtype=torch.bool, device=self.device)
        size = CPU_BLOCK if self.device.type == "cpu" else OTHER_BLOCK
        for start in range(0, len(boxes), size):
            part = slice(start, start + size)
            found = self._match_fast(boxes[part], layout_index[part])
            level[part], iou[part], doubtful[part] = found
        rows = doubtful.nonzero().squeeze(1)
        for some in rows.split(max(1, PAIRS // (9 * max(map(len, self.cells))))):
            level[some], iou[some] = self._match_again(boxes[some], layout_index[some])
        return level, iou

    def _match_fast(self, boxes: Tensor, layout_index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns level and IoU of a block of boxes, and whether each level is in doubt."""
        # High corners and the negatives of the low ones: x2, y2, -x1, -y1.
        corners = torch.empty(4, len(boxes), dtype=self.dtype, device=self.device)
        corners[:2] = boxes[:, 2:].t()
        corners[2:] = boxes[:, :2].t().neg()
        centre = (corners[:2] - corners[2:]) / 2
        area = (corners[:2] + corners[2:]).prod(0)
        best, second = torch.zeros_like(area), torch.zeros_like(area)
        level = torch.zeros_like(area, dtype=torch.uint8)
        for i in range(len(self.cells)):
            value = self._best_value(i, corners, centre, area, layout_index)
            level.masked_fill_(value > best, i)
            second = torch.maximum(second, torch.minimum(best, value))
            best = torch.maximum(best, value)
        # From I / (A + a) to IoU, which is I / (A + a - I).
        return level, (best / (1 - best)).clamp_(max=1), best - second <= self.bound

    def _best_value(
        self, i: int, corners: Tensor, centre: Tensor, area: Tensor, layout_index: Tensor
    ) -> Tensor:
        """Computes the best I / (A + a) of level `i`, which orders anchors as IoU does."""
        grid = self.grids[i]
        if grid.shape[1] > 1:
            grid = grid.index_select(1, layout_index)
        index = ((centre - self.centres[i]) / grid[:2]).round_()
        shift = torch.minimum(index.clamp_(min=0), grid[2:] - 1).mul_(grid[:2])
        # Shapes [A, 2, B] from here. Overlaps may be negative, but not on both axes.
        sides = torch.minimum(corners[:2] - shift, self.bounds[i][:, :2])
        sides += torch.minimum(corners[2:] + shift, self.bounds[i][:, 2:])
        overlap = sides[:, 0].clamp_(min=0).mul_(sides[:, 1])
        return overlap.div_(area + self.areas[i]).amax(0)

    def _match_again(self, boxes: Tensor, layout_index: Tensor) -> tuple[Tensor, Tensor]:
        """Finds the best level from the anchors' corners, as `box_iou` computes it."""
        level = torch.full((len(boxes),), len(self.cells), device=self.device)
        best = torch.zeros(len(boxes), dtype=self.dtype, device=self.device)
        for i in range(len(self.cells)):
            iou = self._best_iou(i, boxes, layout_index)
            level.masked_fill_(iou > best, i)
            best = torch.maximum(best, iou)
        return level, best

    def _best_iou(self, i: int, boxes: Tensor, layout_index: Tensor) -> Tensor:
        """Computes the best IoU with anchors of level `i` at the nearest positions, 3 x 3."""
        cells, grid = self.cells[i], self.grids[i][:, layout_index, None, None]
        steps = torch.arange(-1, 2, dtype=self.dtype, device=self.device)[:, None]
        anchors = []
        for d in (0, 1):
            stride, last = grid[d], grid[2 + d] - 1
            twice = (boxes[:, d] + boxes[:, 2 + d])[:, None, None] - (cells[:, d] + cells[:, 2 + d])
            nearest = (twice / (2 * stride)).round_()
            index = (torch.minimum(nearest, last) + steps).clamp_(min=0)
            # Rounded as `AnchorLayout.anchors` rounds them, which is as torchvision does.
            shift = torch.minimum(index, last).to(cells.dtype) * stride.to(cells.dtype)
            anchors.append((shift + cells[:, d], shift + cells[:, 2 + d]))
        (x1, x2), (y1, y2) = anchors  # [B, 3, A], by steps along one axis
        columns = x1[:, :, None], y1[:, None], x2[:, :, None], y2[:, None]
        return best_of(pair_iou(boxes[:, :, None, None, None].unbind(1), columns))
