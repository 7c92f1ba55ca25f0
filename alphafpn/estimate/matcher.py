"""The kernel: which pyramid level holds the best-IoU anchor of each box.

Pure tensors: nothing here knows a model, a file or a fusion factor. Two exact searches share one
contract, `boxes [G, 4] -> (level, IoU)`:

- `GridMatcher`, for anchors that are one set of cell anchors repeated over a grid. For one anchor
  shape the overlap is a product of an x and a y part, and each falls with the distance between
  the centres. So the grid cell nearest to the box holds the best anchor of that shape, and the cost
  depends on the number of shapes, not on the number of anchors.
- `SearchMatcher`, for any other anchors: every pair, block by block.

Floating point decides nothing silently. The fast pass works in coordinates relative to the cell and
knows a bound on its own error; boxes whose two best levels are closer than that bound are matched
again from the anchors' corners, with the operations of `torchvision.ops.box_iou`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from alphafpn.estimate.grids import Cell, GridLevel
from alphafpn.estimate.search import PAIRS, SEARCH_ROWS, best_of, pair_iou

# Boxes of one pass on a CPU, for each thread: a dozen temporaries of this length stay in the cache,
# and an operation on one still outweighs its dispatch. Elsewhere fewer, longer kernels are better.
CPU_BLOCK = 1 << 17
# Blocks that are held at once: what bounds their memory where there are many cores.
MAX_THREADS = 8
# Centres of one cell that agree to this many decimals are taken for one.
CENTRE_DECIMALS = 4


class _Axis:
    """Holds stride and last index of a level along one axis: a number, or one per layout."""

    def __init__(self, strides: list[float], sizes: list[int], like: Tensor) -> None:
        self.strides, self.lasts = like.new_tensor(strides), like.new_tensor(sizes) - 1
        self.stride = strides[0] if len(set(strides)) == 1 else None
        self.last = sizes[0] - 1 if len(set(sizes)) == 1 else None

    def nearest(self, total: Tensor, centre: float, layout: Tensor, out: Tensor) -> Tensor:
        """Computes the index of the grid position nearest to boxes whose corners sum to `total`."""
        if self.stride is not None:
            torch.mul(total, 0.5 / self.stride, out=out)
            if centre:
                out.sub_(centre / self.stride)
        else:
            torch.mul(total, 0.5, out=out)
            out.sub_(centre).div_(self.strides.index_select(0, layout))
        out.round_()
        if self.last is not None:
            return out.clamp_(0, self.last)
        return torch.minimum(out.clamp_(min=0), self.lasts.index_select(0, layout), out=out)

    def relative(self, corners: Tensor, index: Tensor, layout: Tensor, out: Tensor) -> Tensor:
        """Moves corners [2, B] to the grid position `index` [B], which is overwritten."""
        if self.stride is not None and self.stride.is_integer():
            return torch.add(corners, index, alpha=-self.stride, out=out)
        # The product is rounded, so keep it out of fused operations: a box's result must not
        # depend on its place in the block.
        index.mul_(self.strides.index_select(0, layout) if self.stride is None else self.stride)
        return torch.sub(corners, index, out=out)


class GridMatcher:
    """Finds the exact best level for anchors on grids, at a cost per shape and not per anchor.

    Each box's result depends on this box alone, so sums of shards equal those of the whole.

    Args:
        layouts: What images look like, each a list of levels, finest first. All have the same cell
            anchors; strides and sizes may differ. Only a single one may hold stored anchors.
        dtype: Of the computation: float32 or float64, at least as wide as boxes and anchors.
        device: Where the boxes are.
    """

    def __init__(
        self, layouts: Sequence[Sequence[GridLevel]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.levels = [level.to(device) for level in layouts[0]]
        self.num_levels = len(self.levels)
        self.dtype, self.device = dtype, device
        like = torch.tensor([], dtype=dtype, device=device)
        self.axes = [
            [
                _Axis(
                    [lay[i].stride[d] for lay in layouts], [lay[i].size[d] for lay in layouts], like
                )
                for d in (1, 0)
            ]
            for i in range(self.num_levels)
        ]
        self.groups = [_by_centre(level.cells) for level in self.levels]
        self.cells = [like.new_tensor(level.cells) for level in self.levels]
        # The level's code takes the lowest mantissa bits: the finest level has the largest code,
        # so a maximum over levels prefers it among equals.
        self.largest_code = (1 << (self.num_levels - 1).bit_length()) - 1
        self._memory = like.new_empty(_Workspace.ROWS, 0)
        self._bound_errors([level for layout in layouts for level in layout])

    def match(self, boxes: Tensor, layout: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Matcher.match`."""
        if layout is None:
            layout = torch.zeros((), dtype=torch.int64, device=self.device).expand(len(boxes))
        level = torch.empty(len(boxes), dtype=torch.int64, device=self.device)
        iou = torch.empty(len(boxes), dtype=self.dtype, device=self.device)
        doubtful = [level[:0]]
        size = max(1, len(boxes))
        if self.device.type == "cpu":
            size = CPU_BLOCK * min(torch.get_num_threads(), MAX_THREADS)
        for start in range(0, len(boxes), size):
            part = slice(start, start + size)
            some = self._match_fast(boxes[part], layout[part], level[part], iou[part])
            doubtful.append(some.add_(start))
        rows = torch.cat(doubtful)
        if len(rows):
            level[rows], iou[rows] = self._match_again(boxes[rows], layout[rows])
        return level, iou

    def _match_fast(self, boxes: Tensor, layout: Tensor, level: Tensor, iou: Tensor) -> Tensor:
        """Writes level and IoU of up to a block of boxes; returns the rows that are in doubt.

        These are the ones where the lead over the second-best level is within the bound on the
        error of the box.
        """
        # Kept from call to call: memory that was given back is mapped again page by page, which
        # costs as much as a good part of the arithmetic.
        if self._memory.shape[1] < len(boxes):
            self._memory = self._memory.new_empty(_Workspace.ROWS, len(boxes))
        s = _Workspace(self._memory[:, : len(boxes)])
        for d in range(2):
            s.x[d].copy_(boxes[:, 2 * d])
            s.y[d].copy_(boxes[:, 2 * d + 1])
        torch.add(s.x[0], s.x[1], out=s.total_x)
        torch.add(s.y[0], s.y[1], out=s.total_y)
        torch.sub(s.x[1], s.x[0], out=s.area)
        s.area.mul_(torch.sub(s.y[1], s.y[0], out=s.overlap))
        # A box without area overlaps nothing; this keeps 0 / 0 out.
        s.area.clamp_(min=torch.finfo(self.dtype).tiny)
        best, second = s.best.zero_(), s.second.zero_()
        bits = s.value.view(torch.int32 if self.dtype == torch.float32 else torch.int64)
        for i in range(self.num_levels):
            self._level_value(i, layout, s, s.value)
            bits.bitwise_or_(self.largest_code)
            if i:
                bits.bitwise_xor_(i)
            torch.maximum(second, torch.minimum(best, s.value, out=s.overlap), out=second)
            torch.maximum(best, s.value, out=best)
        margin = torch.sub(best, second, out=s.value)
        torch.maximum(s.total_x.abs_(), s.total_y.abs_(), out=s.other)
        margin.sub_(s.other.mul_(self.tolerance_per_pixel / 2))
        # From I / (A + a) to IoU, which is I / (A + a - I).
        torch.div(best, torch.neg(best, out=s.other).add_(1), out=iou).clamp_(max=1)
        code = best.view(bits.dtype).bitwise_and_(self.largest_code)
        level.copy_(code.neg_().add_(self.largest_code))
        return margin.le(self.tolerance).nonzero().squeeze(1)

    def _level_value(self, level: int, layout: Tensor, s: _Workspace, out: Tensor) -> None:
        """Computes the best I / (A + a) of one level, which orders anchors as IoU does."""
        axis_x, axis_y = self.axes[level]
        first = True
        for (centre_x, centre_y), shapes in self.groups[level]:
            axis_x.nearest(s.total_x, centre_x, layout, s.index)
            axis_x.relative(s.x, s.index, layout, s.near_x)
            axis_y.nearest(s.total_y, centre_y, layout, s.index)
            axis_y.relative(s.y, s.index, layout, s.near_y)
            # Anchors of equal area share the denominator: compare their overlaps only.
            for area, cells in shapes:
                for i, (x1, y1, x2, y2) in enumerate(cells):
                    overlap = s.overlap if i == 0 else s.other
                    # Lengths of the overlaps with [x1, x2] and [y1, y2].
                    torch.clamp(s.near_x, x1, x2, out=s.clamped)
                    torch.sub(s.clamped_high, s.clamped_low, out=overlap)
                    torch.clamp(s.near_y, y1, y2, out=s.clamped)
                    torch.sub(s.clamped_high, s.clamped_low, out=s.clamped_high)
                    overlap.mul_(s.clamped_high)
                    if i:
                        torch.maximum(s.overlap, overlap, out=s.overlap)
                torch.add(s.area, area, out=s.other)
                if first:
                    torch.div(s.overlap, s.other, out=out)
                else:
                    torch.maximum(out, s.overlap.div_(s.other), out=out)
                first = False

    def _bound_errors(self, levels: Sequence[GridLevel]) -> None:
        """Sets a bound on twice the error of the fast pass: `tolerance`, and more per pixel.

        Below, `e` are distances in pixels by which things are off. An index off by e may choose
        the second-nearest cell, which is up to 2e farther away, and shortens an overlap by as much.
        A corner off by e changes an overlap by up to 2e, since it has two ends. I / (A + a) falls
        by no more than the share that is lost of the anchor's shortest side, on both axes. Anchors
        that are off themselves change their area too.
        """
        eps = torch.finfo(self.dtype).eps
        cells = [cell for level in levels for cell in level.cells]
        reach = max(abs(v) for cell in cells for v in cell)
        extent = max(
            n * s for level in levels for n, s in zip(level.size, level.stride, strict=True)
        )
        # Zero-size anchors are exact: they overlap nothing.
        shortest = min(
            (side for c in cells for side in (c[2] - c[0], c[3] - c[1]) if side > 0), default=1.0
        )
        # Anchors that all arithmetic keeps exact, as those of torchvision.
        self.exact = all(
            level.anchors is None
            and all(s.is_integer() for s in level.stride)
            and all((8 * v).is_integer() for cell in level.cells for v in cell)
            for level in levels
        ) and (extent + reach < 2**20)
        e_index, e_corner, e_anchor = 2 * eps * reach, eps * reach, 0.0
        if not self.exact:
            e_index += 10.0**-CENTRE_DECIMALS
            e_corner += eps * (extent + reach)
            e_anchor = max(
                (2 if level.anchors is None else 8) * torch.finfo(level.dtype).eps
                for level in levels
            ) * (extent + reach)
        off = 4 * (e_index + e_corner) + 6 * e_anchor
        self.tolerance = 2 * off / shortest + 16 * eps * (self.largest_code + 1)
        # Half the sum of a box's corners is its distance from the origin: the index errs with it.
        self.tolerance_per_pixel = 2 * 4 * 2 * eps / shortest
        # IoU changes by up to four times as much as I / (A + a).
        self.anchor_noise = 2 * 4 * 6 * e_anchor / shortest

    def _match_again(self, boxes: Tensor, layout: Tensor) -> tuple[Tensor, Tensor]:
        """Finds the best level from the anchors' corners, as `box_iou` computes it."""
        levels = range(self.num_levels)
        ious = [self._best_iou(i, boxes, layout) for i in levels]
        if not self.exact:
            # Anchors that are rounded themselves may all be best as long as they contain the box
            # or lie in it: look at all of these, on levels that can still win.
            best = torch.stack(ious).amax(0)
            close = [(best - iou).le(self.anchor_noise) & (best > 0) for iou in ious]
            open_ = torch.stack(close).sum(0) > 1
            for i in levels:
                rows = (close[i] & open_).nonzero().squeeze(1)
                sides = (boxes[rows, 2:] - boxes[rows, :2]).amax(1)
                # Boxes of similar size have windows of similar size.
                rows = rows[sides.argsort()]
                for start in range(0, len(rows), SEARCH_ROWS):
                    some = rows[start : start + SEARCH_ROWS]
                    ious[i][some] = self._best_iou(i, boxes[some], layout[some], wide=True)
        level = torch.full((len(boxes),), self.num_levels, device=self.device)
        best = torch.zeros(len(boxes), dtype=self.dtype, device=self.device)
        for i in levels:
            level.masked_fill_(ious[i] > best, i)
            torch.maximum(best, ious[i], out=best)
        return level, best

    def _best_iou(self, i: int, boxes: Tensor, layout: Tensor, *, wide: bool = False) -> Tensor:
        """Computes the best IoU with the anchors of level `i` that are nearest.

        Rounding may prefer a neighbour of the nearest one. With `wide`, all anchors that contain
        the box or lie in it are among them.
        """
        cells, axes = self.cells[i], self.axes[i]
        reach = [1, 1]
        if wide:
            for d, axis in enumerate(axes):
                side = boxes[:, 2 + d, None] - boxes[:, d, None]
                spare = (side - (cells[:, 2 + d] - cells[:, d])).abs().amax(1)
                steps = torch.minimum(spare / (2 * axis.strides[layout]), axis.lasts[layout])
                reach[d] += math.ceil(float(steps.amax()))
        window = torch.cartesian_prod(
            *(torch.arange(-n, n + 1, device=self.device, dtype=self.dtype) for n in reach)
        )
        best = torch.zeros(len(boxes), dtype=self.dtype, device=self.device)
        rows = max(1, PAIRS // (9 * len(cells)))
        for start in range(0, len(boxes), rows):
            part = slice(start, start + rows)
            some, where, out = boxes[part], layout[part], best[part]
            for steps in window.split(max(1, PAIRS // (len(some) * len(cells)))):
                index = [self._indices(i, d, some, where, steps[:, d, None]) for d in (0, 1)]
                corners = self._corners(i, index, where)
                iou = pair_iou(some[:, :, None, None].unbind(1), corners)
                torch.maximum(out, best_of(iou), out=out)
        return best

    def _indices(self, i: int, d: int, boxes: Tensor, layout: Tensor, steps: Tensor) -> Tensor:
        """Computes grid indices [B, steps, cells] so many `steps` from the nearest one."""
        cells, axis = self.cells[i], self.axes[i][d]
        stride, last = axis.strides[layout, None, None], axis.lasts[layout, None, None]
        total = boxes[:, d, None, None].to(self.dtype) + boxes[:, 2 + d, None, None]
        nearest = ((total - (cells[:, d] + cells[:, 2 + d])) / (2 * stride)).round_()
        index = torch.minimum(nearest.clamp_(min=0), last).add(steps)
        return torch.minimum(index.clamp_(min=0), last)

    def _corners(self, i: int, index: Sequence[Tensor], layout: Tensor) -> list[Tensor]:
        """Returns columns of the anchors at `index` (x, y), in their own type."""
        cells, level = self.cells[i], self.levels[i]
        if level.anchors is not None:
            position = index[1].long() * level.size[1] + index[0].long()
            cell = torch.arange(len(cells), device=self.device)
            return list(level.anchors[position * len(cells) + cell].unbind(-1))
        shifts = [
            index[d].to(level.dtype) * self.axes[i][d].strides[layout, None, None].to(level.dtype)
            for d in (0, 1)
        ]
        return [shift + cells[:, k].to(level.dtype) for k, shift in enumerate(shifts * 2)]


_Group = tuple[tuple[float, float], list[tuple[float, list[Cell]]]]


def _by_centre(cells: Sequence[Cell]) -> list[_Group]:
    """Groups cell anchors by their common centre, and within one centre by area."""

    def centre(cell: Cell) -> tuple[float, float]:
        x, y = (cell[0] + cell[2]) / 2, (cell[1] + cell[3]) / 2
        return round(x, CENTRE_DECIMALS), round(y, CENTRE_DECIMALS)

    def area(cell: Cell) -> float:
        return (cell[2] - cell[0]) * (cell[3] - cell[1])

    return [
        (c, [(a, list(same)) for a, same in groupby(sorted(group, key=area), key=area)])
        for c, group in groupby(sorted(cells, key=centre), key=centre)
    ]


class _Workspace:
    """Names the temporaries of the fast pass, rows of `memory`; pairs are low and high corners."""

    ROWS = 19

    def __init__(self, memory: Tensor) -> None:
        self.x, self.y, self.near_x, self.near_y, self.clamped = memory[:10].unflatten(0, (5, 2))
        self.clamped_low, self.clamped_high = self.clamped
        (
            self.total_x, self.total_y, self.area, self.best, self.second,
            self.value, self.overlap, self.other, self.index,
        ) = memory[10:]  # fmt: skip
