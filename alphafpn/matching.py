"""The kernel: which pyramid level holds the best-IoU anchor of each box.

Pure tensors: nothing here knows a model, a file or a fusion factor. Two exact searches share one
contract, ``boxes [G, 4] -> (level, IoU)``:

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
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Boxes of one pass on a CPU: a dozen temporaries of this length stay in the cache, and an operation
# on one still outweighs its dispatch. Elsewhere fewer, longer kernels are better.
CPU_BLOCK = 1 << 16
# Box-anchor pairs evaluated at once where pairs are evaluated, and boxes among them.
PAIRS = 1 << 18
SEARCH_ROWS = 64

Cell = tuple[float, float, float, float]


class GridLevel(NamedTuple):
    """Anchors of one level: `cells` repeated at `stride` over `size` positions; (y, x) order.

    `anchors` are the anchors themselves, [size[0] * size[1] * len(cells), 4] in (row, column, cell)
    order, where they are not exactly ``cell + index * stride``.
    """

    cells: tuple[Cell, ...]
    stride: tuple[float, float]
    size: tuple[int, int]
    anchors: Tensor | None = None


class Matcher(Protocol):
    """Gives each box the level of its best-IoU anchor."""

    def match(self, boxes: Tensor, layout: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Level (int64 [B]) and IoU [B] of the best anchor of each box [B, 4] (xyxy).

        The level is the number of levels where a box overlaps no anchor. `layout` [B] tells which
        of the matcher's layouts each box lies on.
        """
        ...


def _is_exact(value: float, dtype: torch.dtype) -> bool:
    """Whether sums of `value` and any pixel position stay exact in `dtype`."""
    return value == round(value * 8) / 8 and abs(value) < 2 ** (
        14 if dtype == torch.float32 else 40
    )


class _Axis:
    """Stride and last index of one level along one axis: a number, or one per layout."""

    def __init__(self, strides: list[float], sizes: list[int], like: Tensor) -> None:
        self.stride = strides[0]
        self.last = sizes[0] - 1
        self.strides = None if len(set(strides)) == 1 else like.new_tensor(strides)
        self.lasts = None if len(set(sizes)) == 1 else like.new_tensor(sizes) - 1

    def nearest(self, total: Tensor, centre: float, layout: Tensor | None, out: Tensor) -> Tensor:
        """Index of the grid position nearest to boxes whose corners sum to `total`."""
        if self.strides is None or layout is None:
            torch.mul(total, 0.5 / self.stride, out=out)
            if centre:
                out.sub_(centre / self.stride)
        else:
            torch.mul(total, 0.5, out=out)
            out.sub_(centre).div_(self.strides.index_select(0, layout))
        out.round_()
        if self.lasts is None or layout is None:
            return out.clamp_(0, self.last)
        return torch.minimum(out.clamp_(min=0), self.lasts.index_select(0, layout), out=out)

    def relative(
        self, corners: Tensor, index: Tensor, layout: Tensor | None, out: Tensor
    ) -> Tensor:
        """Corners [2, B] relative to the grid position `index` [B]."""
        if self.strides is None or layout is None:
            return torch.add(corners, index, alpha=-self.stride, out=out)
        stride = self.strides.index_select(0, layout)
        return torch.addcmul(corners, index, stride, value=-1, out=out)


class GridMatcher:
    """Exact best level for anchors on regular grids, at a cost per shape instead of per anchor.

    Args:
        layouts: what images look like, each a list of levels, finest first. All have the same cell
            anchors; strides and sizes may differ.
        dtype: of the computation, float32 or float64; `device` likewise.
        device: where the boxes are.
    """

    def __init__(
        self, layouts: Sequence[Sequence[GridLevel]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layouts = layouts
        self.num_levels = len(layouts[0])
        self.dtype, self.device = dtype, device
        like = torch.empty(0, dtype=dtype, device=device)
        self.cells = [level.cells for level in layouts[0]]
        self.groups = [_by_centre(cells) for cells in self.cells]
        self.axes = [
            [
                _Axis(
                    [lay[i].stride[d] for lay in layouts], [lay[i].size[d] for lay in layouts], like
                )
                for d in (1, 0)
            ]
            for i in range(self.num_levels)
        ]
        # The level's code takes the lowest mantissa bits: the finest level has the largest code,
        # so a maximum over levels prefers it among equals.
        self.code_bits = max(1, (self.num_levels - 1).bit_length())
        self.extent = max(
            level.size[d] * level.stride[d] for lay in layouts for level in lay for d in (0, 1)
        )
        self.shortest = min(
            (min(c[2] - c[0], c[3] - c[1]) for cells in self.cells for c in cells), default=1.0
        )
        self.exact = all(
            level.anchors is None
            and all(_is_exact(v, dtype) for cell in level.cells for v in cell)
            and all(s == round(s) for s in level.stride)
            for lay in layouts
            for level in lay
        )

    def match(self, boxes: Tensor, layout: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Matcher.match`."""
        size = min(CPU_BLOCK, len(boxes)) if self.device.type == "cpu" else len(boxes)
        space = _Workspace(size, self.dtype, self.device)
        level = torch.empty(len(boxes), dtype=torch.int64, device=self.device)
        value = torch.empty(len(boxes), dtype=self.dtype, device=self.device)
        lead = torch.empty_like(value)
        reach = []
        for start in range(0, len(boxes), size):
            part = slice(start, start + size)
            reach.append(
                self._match_fast(
                    boxes[part],
                    None if layout is None else layout[part],
                    space.first(len(boxes[part])),
                    level[part],
                    value[part],
                    lead[part],
                )
            )
        iou = value.div_(1 - value)  # value is I / (A + a), and IoU = I / (A + a - I)
        doubtful = lead.le(self._tolerance(torch.stack(reach).amax())).nonzero().squeeze(1)
        if len(doubtful):
            again = boxes.index_select(0, doubtful)
            where = None if layout is None else layout.index_select(0, doubtful)
            level[doubtful], iou[doubtful] = self._match_again(again, where)
        return level, iou

    def _match_fast(
        self,
        boxes: Tensor,
        layout: Tensor | None,
        s: _Workspace,
        level: Tensor,
        value: Tensor,
        lead: Tensor,
    ) -> Tensor:
        """Writes each box's level, I / (A + a) and its lead; returns the largest coordinate."""
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
        low = (1 << self.code_bits) - 1
        for i in range(self.num_levels):
            self._level_value(i, layout, s, s.value)
            bits.bitwise_or_(low)
            if i:
                bits.bitwise_xor_(i)
            torch.maximum(second, torch.minimum(best, s.value, out=s.overlap), out=second)
            torch.maximum(best, s.value, out=best)
        torch.sub(best, second, out=lead)
        value.copy_(best)
        level.copy_(best.view(bits.dtype).bitwise_and_(low).neg_().add_(low))
        return torch.maximum(s.pairs[:2].amax(), -s.pairs[:2].amin())

    def _level_value(self, level: int, layout: Tensor | None, s: _Workspace, out: Tensor) -> None:
        """Best I / (A + a) of one level, which orders anchors as IoU does."""
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

    def _tolerance(self, largest: Tensor) -> Tensor:
        """Bound on the error of the fast pass, from the largest coordinate.

        A sum of two coordinates is off by its rounding, so the cell may be the second nearest: the
        overlap is then short by twice that, relative to the anchor's shortest side.
        """
        eps = torch.finfo(self.dtype).eps
        position = largest.clamp(min=self.extent) * (4 * eps) + (0.0 if self.exact else 1e-4)
        return position * (4 / max(self.shortest, eps)) + 16 * eps * (1 << self.code_bits)

    def _match_again(self, boxes: Tensor, layout: Tensor | None) -> tuple[Tensor, Tensor]:
        """Best level from the corners of all anchors that can be best, as `box_iou` computes it."""
        boxes = boxes.to(self.dtype)
        level = torch.full((len(boxes),), self.num_levels, device=self.device)
        best = boxes.new_zeros(len(boxes))
        layout = torch.zeros_like(level) if layout is None else layout
        for i in range(self.num_levels):
            stride_y, stride_x = self._table(i, "stride", layout)
            rows, columns = self._table(i, "size", layout)
            cells = boxes.new_tensor(self.cells[i])
            near_x, near_y = (
                (boxes[:, d, None] + boxes[:, d + 2, None] - (cells[:, d] + cells[:, d + 2]))
                .div(2 * stride[:, None])
                .round()
                for d, stride in ((0, stride_x), (1, stride_y))
            )  # [B, cells]
            reach_x, reach_y = self._reach(i)
            steps_x = torch.arange(-reach_x, reach_x + 1, device=self.device)
            steps_y = torch.arange(-reach_y, reach_y + 1, device=self.device)
            chunk = max(1, PAIRS // (len(cells) * len(steps_x) * len(steps_y)))
            for start in range(0, len(boxes), chunk):
                part = slice(start, start + chunk)
                column = _inside(near_x[part, None, None, :], steps_x[:, None], columns[part])
                row = _inside(near_y[part, None, None, :], steps_y[:, None, None], rows[part])
                stored = [lay[i].anchors for lay in self.layouts]
                if stored[0] is None:
                    shift_x = column * stride_x[part, None, None, None]
                    shift_y = row * stride_y[part, None, None, None]
                    corners = [
                        shift + cells[:, d] for d, shift in enumerate((shift_x, shift_y) * 2)
                    ]
                else:
                    index = row * columns[part, None, None, None] + column
                    index = index.long() * len(cells) + torch.arange(len(cells), device=self.device)
                    corners = list(stored[0].to(boxes)[index].unbind(-1))
                iou = pair_iou(boxes[part, :, None, None, None].unbind(1), corners)
                value = iou.flatten(1).amax(1)
                better = value > best[part]
                level[part] = torch.where(better, i, level[part])
                best[part] = torch.where(better, value, best[part])
        return level, best

    def _table(self, level: int, field: str, layout: Tensor) -> tuple[Tensor, Tensor]:
        values = [getattr(lay[level], field) for lay in self.layouts]
        table = torch.tensor(values, dtype=self.dtype, device=self.device)[layout]
        return table[:, 0], table[:, 1]

    def _reach(self, level: int) -> tuple[int, int]:
        """How many cells around the nearest one may hold the best anchor.

        One, for the rounding of the nearest index. Where anchors are rounded numbers, those that
        contain a box entirely all have nearly its best IoU, and any of them may be the largest.
        """
        if self.exact:
            return 1, 1
        return tuple(  # type: ignore[return-value]
            min(
                max(lay[level].size[1 - d] for lay in self.layouts),
                1
                + math.ceil(
                    max(c[d + 2] - c[d] for c in self.cells[level])
                    / (2 * min(lay[level].stride[1 - d] for lay in self.layouts))
                ),
            )
            for d in (0, 1)
        )


class RangeMatcher:
    """FCOS: levels by regression range instead of IoU.

    Half the longer side of a box lies between 4 and 8 times the size of its level's anchors; the
    finest level takes everything smaller, the coarsest everything larger.

    Args:
        sizes: of the anchors, in pixels, one per level, each twice the one before.
    """

    def __init__(self, sizes: Sequence[float]) -> None:
        self.sizes = sizes

    def match(self, boxes: Tensor, layout: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Matcher.match`; there is no IoU, so it is 0."""
        half = (boxes[:, 2:] - boxes[:, :2]).amax(1) / 2
        bounds = half.new_tensor([4 * size for size in self.sizes[1:]])
        return torch.bucketize(half, bounds, right=True), torch.zeros_like(half)


class SearchMatcher:
    """Exact best level for any anchors: every box-anchor pair, in blocks that stay in the cache.

    Args:
        levels: one tensor of anchors [N_l, 4] (xyxy) per level, finest first.
        dtype: of the computation; `device` likewise.
        device: where the boxes are.
    """

    def __init__(self, levels: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> None:
        self.levels = [level.to(device, dtype).t().contiguous() for level in levels]
        self.dtype, self.device = dtype, device

    def match(self, boxes: Tensor, layout: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Matcher.match`."""
        level = torch.full((len(boxes),), len(self.levels), device=self.device)
        best = torch.zeros(len(boxes), dtype=self.dtype, device=self.device)
        for start in range(0, len(boxes), SEARCH_ROWS):
            part = slice(start, start + SEARCH_ROWS)
            for i, anchors in enumerate(self.levels):
                value = self._best_iou(boxes[part].to(self.dtype), anchors)
                level[part].masked_fill_(value > best[part], i)
                torch.maximum(best[part], value, out=best[part])
        return level, best

    def _best_iou(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        best = boxes.new_zeros(len(boxes))
        for chunk in anchors.split(max(1, PAIRS // max(1, len(boxes))), dim=1):
            iou = pair_iou(boxes[:, :, None].unbind(1), chunk.unbind(0))
            torch.maximum(best, iou.amax(1), out=best)
        return best


def pair_iou(boxes: Sequence[Tensor], anchors: Sequence[Tensor]) -> Tensor:
    """IoU of boxes and anchors given as columns (x1, y1, x2, y2) that broadcast.

    Operation for operation `torchvision.ops.box_iou`, so equal to it in every bit.
    """
    (x1, y1, x2, y2), (ax1, ay1, ax2, ay2) = boxes, anchors
    width = (torch.minimum(x2, ax2) - torch.maximum(x1, ax1)).clamp_(min=0)
    height = (torch.minimum(y2, ay2) - torch.maximum(y1, ay1)).clamp_(min=0)
    inter = width * height
    union = (x2 - x1) * (y2 - y1) + (ax2 - ax1) * (ay2 - ay1) - inter
    return inter.div_(union)


def _inside(nearest: Tensor, steps: Tensor, size: Tensor) -> Tensor:
    """Grid indices around `nearest`, moved onto a grid of `size` positions."""
    last = (size - 1)[:, None, None, None]
    return torch.minimum((torch.minimum(nearest.clamp(min=0), last) + steps).clamp_(min=0), last)


_Group = tuple[tuple[float, float], list[tuple[float, list[Cell]]]]


def _by_centre(cells: Sequence[Cell]) -> list[_Group]:
    """Cell anchors by their common centre, and within one centre by area."""

    def centre(cell: Cell) -> tuple[float, float]:
        return round((cell[0] + cell[2]) / 2, 4), round((cell[1] + cell[3]) / 2, 4)

    def area(cell: Cell) -> float:
        return (cell[2] - cell[0]) * (cell[3] - cell[1])

    return [
        (c, [(a, list(same)) for a, same in groupby(sorted(group, key=area), key=area)])
        for c, group in groupby(sorted(cells, key=centre), key=centre)
    ]


class _Workspace:
    """Temporaries of the fast pass, allocated once; pairs hold the low and the high corners."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._pairs = torch.empty(5, 2, size, dtype=dtype, device=device)
        self._singles = torch.empty(9, size, dtype=dtype, device=device)
        self._size = -1

    def first(self, size: int) -> _Workspace:
        """The same memory, cut to `size` boxes."""
        if size != self._size:
            self.pairs = self._pairs[..., :size]
            self.x, self.y, self.near_x, self.near_y, self.clamped = self.pairs.unbind(0)
            self.clamped_low, self.clamped_high = self.clamped.unbind(0)
            (
                self.total_x, self.total_y, self.area, self.best, self.second,
                self.value, self.overlap, self.other, self.index,
            ) = self._singles[:, :size].unbind(0)  # fmt: skip
            self._size = size
        return self
