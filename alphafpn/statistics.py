"""Algorithm 1 and Eq. 2: from boxes and anchors to counts per level and fusion factors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from alphafpn.anchors import (
    AnchorLayout,
    check_boxes,
    check_num_fused_levels,
    indistinguishable_levels,
    recognise_grid,
)
from alphafpn.estimate import IOU_BINS, IOU_UNIT, SIZE_UNIT, AlphaEstimate
from alphafpn.matching import GridMatcher, Matcher, SearchMatcher

Levels = Sequence[Tensor]

# Boxes matched and added up at once: what bounds the memory beyond the inputs.
BLOCK = 1 << 20


def estimate_alpha(
    anchors: AnchorLayout | Sequence[AnchorLayout] | Levels | Sequence[Levels],
    gt_boxes: Tensor | Sequence[Tensor],
    *,
    num_fused_levels: int | None = None,
    clamp: tuple[float, float] | None = (0.2, 2.0),
) -> AlphaEstimate:
    """Fusion factors from boxes and anchors (Algorithm 1 and Eq. 2).

    Each box is given to the level of its best-IoU anchor, the finest one among equals, without any
    threshold; the factor into a level is the number of boxes on the next coarser level over the
    number on this one.

    Args:
        anchors: what all images share, a layout or anchors [N_l, 4] per level, finest level first;
            or a sequence of one of these per image. Plain anchors on a regular grid take the same
            fast path as a layout; others are searched exactly, in blocks.
        gt_boxes: boxes [G, 4] of one image, or a sequence of them, one per image; xyxy in pixels of
            the image as the network sees it. An image may have none.
        num_fused_levels: K, the number of levels that the pyramid fuses, its
            ``len(in_channels_list)``; by default the layout's own, else all levels but one.
        clamp: (lower, upper) bound of the factors, or None. The paper's is (0.2, 2.0).

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: if a box or an anchor is not finite or inverted, if anchors and boxes are for
            different numbers of images, or if two levels cannot be told apart.

    Example:
        >>> import torch
        >>> cell = torch.tensor([[-8.0, -8.0, 8.0, 8.0]])
        >>> layout = AnchorLayout([cell, 2 * cell], [8, 16], [(8, 8), (4, 4)], 2)
        >>> boxes = torch.tensor([[8.0, 8.0, 20.0, 22.0], [2, 2, 18, 16], [9, 9, 41, 40]])
        >>> estimate_alpha(layout, boxes).alpha
        (0.5,)
    """
    clamp = check_clamp(clamp)
    boxes, sizes = _concatenate(gt_boxes)
    kinds, kind_of_image = _kinds(anchors, len(sizes))
    num_levels = _num_levels(kinds[0])
    if num_fused_levels is None:
        num_fused_levels = getattr(kinds[0], "num_fused_levels", num_levels - 1)
    check_num_fused_levels(num_fused_levels, num_levels)
    families = _families(kinds)
    result: AlphaEstimate | None = None
    for family in families:
        layouts = [kinds[k] for k in family]
        first = layouts[0]
        if len(families) == 1:
            part, part_sizes, layout = boxes, sizes, kind_of_image
        else:
            assert kind_of_image is not None
            member = torch.isin(kind_of_image, torch.tensor(family))
            part = boxes[member.repeat_interleave(sizes).to(boxes.device)]
            part_sizes = sizes[member]
            layout = torch.searchsorted(torch.tensor(family), kind_of_image[member])
        matcher: Matcher
        if isinstance(first, AnchorLayout):
            grids = [layout._levels for layout in layouts if isinstance(layout, AnchorLayout)]
            matcher = GridMatcher(grids, boxes.dtype, boxes.device)
        else:
            matcher = SearchMatcher(first, boxes.dtype, boxes.device)
        counts = count_levels(matcher, part, part_sizes, num_levels, layout)
        estimate = counts.estimate(
            kinds[0], num_fused_levels, clamp, num_boxes=len(part), same_cells=len(families) == 1
        )
        result = estimate if result is None else result.merge(estimate)
    assert result is not None
    return result


@dataclass
class LevelCounts:
    """What boxes and anchors add up to; the base of an `AlphaEstimate`.

    Attributes:
        per_image: boxes per image and level, int64 [M, L + 1]; last the boxes without any anchor.
        histogram: boxes per hundredth of best IoU, int64 [101].
        iou_sums: per level, in `IOU_UNIT`, float64 [L].
        size_sum: in `SIZE_UNIT`, float64.
        num_sizes: input sizes that were added.
    """

    per_image: Tensor
    histogram: Tensor
    iou_sums: Tensor
    size_sum: Tensor
    num_sizes: int = 1

    def __add__(self, other: LevelCounts) -> LevelCounts:
        """The same images, counted at another input size too."""
        return LevelCounts(
            *(getattr(self, f.name) + getattr(other, f.name) for f in fields(LevelCounts))
        )

    def estimate(
        self,
        anchors: AnchorLayout | Levels,
        num_fused_levels: int,
        clamp: tuple[float, float] | None,
        *,
        num_boxes: int,
        same_cells: bool = True,
        follows_iou: bool = True,
        **more: Any,
    ) -> AlphaEstimate:
        """The estimate, described by the first image's `anchors`."""
        *counts, num_unmatched = self.per_image.sum(0).tolist()
        # Products of counts in float64 are exact far beyond any data set.
        per_image = self.per_image[:, :-1].double()
        moments = (per_image.t() @ per_image).round().long().tolist()
        names: tuple[str, ...] = tuple(f"level {i}" for i in range(len(counts)))
        strides: tuple[float, ...] = ()
        anchors_per_cell: tuple[int, ...] = ()
        if isinstance(anchors, AnchorLayout):
            names = anchors.level_names
            strides = tuple(max(level.stride) for level in anchors._levels)
            if same_cells:
                anchors_per_cell = tuple(len(level.cells) for level in anchors._levels)
        return AlphaEstimate(
            counts=tuple(counts),
            moments=tuple(tuple(row) for row in moments),
            level_names=names,
            num_fused_levels=num_fused_levels,
            num_images=len(per_image),
            num_boxes=num_boxes,
            num_unmatched=num_unmatched,
            num_sizes=self.num_sizes,
            clamp=clamp,
            iou_histogram=tuple(self.histogram.tolist()) if follows_iou else None,
            iou_sums=tuple(int(s) for s in self.iou_sums.tolist()),
            size_sum=int(self.size_sum),
            strides=strides,
            anchors_per_cell=anchors_per_cell,
            **more,
        )


def count_levels(
    matcher: Matcher,
    boxes: Tensor,
    sizes: Tensor,
    num_levels: int,
    layout: Tensor | None = None,
) -> LevelCounts:
    """Matches and adds up, block by block.

    Args:
        matcher: of the anchors.
        boxes: [G, 4] xyxy, image after image.
        sizes: boxes per image, int64 [M] on the CPU, with sum G.
        num_levels: L.
        layout: which of the matcher's layouts each image has, int64 [M]; None if there is one.
    """
    device = boxes.device
    counts = LevelCounts(
        torch.zeros(len(sizes), num_levels + 1, dtype=torch.int64, device=device),
        torch.zeros(IOU_BINS, dtype=torch.int64, device=device),
        torch.zeros(num_levels, dtype=torch.float64, device=device),
        torch.zeros((), dtype=torch.float64, device=device),
    )
    ends = sizes.cumsum(0)
    for start in range(0, len(boxes), BLOCK):
        part = boxes[start : start + BLOCK]
        # The images of this block; the first and the last may lie in others as well.
        first, last = torch.searchsorted(
            ends, torch.tensor([start, start + len(part) - 1]), right=True
        ).tolist()
        bounds = ends[first : last + 1].clamp(max=start + len(part))
        image = torch.arange(last + 1 - first).repeat_interleave(
            torch.diff(bounds, prepend=torch.tensor([start])), output_size=len(part)
        )
        where = None if layout is None else layout[first : last + 1][image].to(device)
        level, iou = matcher.match(part, where)
        key = image.to(device).mul_(num_levels + 1).add_(level)
        rows = counts.per_image[first : last + 1]
        rows += torch.bincount(key, minlength=rows.numel()).view_as(rows)
        # The small number makes up for the rounding of an IoU that is a whole hundredth.
        bins = (iou * (IOU_BINS - 1) + 1e-4).long()
        counts.histogram += torch.bincount(bins, minlength=IOU_BINS)
        units = (iou / IOU_UNIT).round_().double()
        counts.iou_sums += torch.bincount(level, units, minlength=num_levels + 1)[:num_levels]
        sides = part[:, 2:] - part[:, :2]
        counts.size_sum += (sides.prod(1).sqrt_() / SIZE_UNIT).round_().double().sum()
    return counts


def check_clamp(clamp: Any) -> tuple[float, float] | None:
    """`clamp` as two floats.

    Raises:
        TypeError: if it is not None or a pair of numbers.
        ValueError: unless 0 <= lower <= upper < inf.
    """
    if clamp is None:
        return None
    try:
        low, high = (float(bound) for bound in clamp)
    except (TypeError, ValueError):
        raise TypeError(f"clamp: None or (lower, upper) expected, found {clamp!r}") from None
    if not 0 <= low <= high < math.inf:
        raise ValueError(f"clamp: 0 <= lower <= upper < inf expected, found {clamp!r}")
    return low, high


def _concatenate(gt_boxes: Any) -> tuple[Tensor, Tensor]:
    """Boxes [G, 4] of all images, and boxes per image."""
    if isinstance(gt_boxes, Tensor):
        boxes = check_boxes(gt_boxes, "gt_boxes")
        return boxes, torch.tensor([len(boxes)])
    if not isinstance(gt_boxes, Iterable) or isinstance(gt_boxes, str | bytes | dict):
        raise TypeError(
            "gt_boxes: a tensor [G, 4], or a sequence of one per image expected, found "
            f"{type(gt_boxes).__name__}"
        )
    images = list(gt_boxes)
    for i, boxes in enumerate(images):
        # Values are checked all at once below; this loop runs over every image.
        if (
            not isinstance(boxes, Tensor)
            or boxes.dim() != 2
            or boxes.shape[1] != 4
            or not boxes.is_floating_point()
        ):
            images[i] = check_boxes(boxes, f"gt_boxes[{i}]")
    if not images:
        return torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    devices = {boxes.device for boxes in images}
    if len(devices) > 1:
        raise ValueError(f"gt_boxes: one device expected, found {sorted(map(str, devices))}")
    together = torch.cat(images)
    if together.dtype not in (torch.float32, torch.float64):
        together = together.float()
    try:
        check_boxes(together, "gt_boxes")
    except ValueError:
        for i, boxes in enumerate(images):
            check_boxes(boxes, f"gt_boxes[{i}]")
        raise
    return together, torch.tensor([len(boxes) for boxes in images])


def _kinds(anchors: Any, num_images: int) -> tuple[list[AnchorLayout | Levels], Tensor | None]:
    """The different anchors in `anchors`, and which of them each image has (None: the same)."""
    if isinstance(anchors, AnchorLayout):
        return [_checked(anchors, "anchors")], None
    if isinstance(anchors, Tensor) or not isinstance(anchors, Sequence) or len(anchors) == 0:
        raise TypeError(
            "anchors: an AnchorLayout, a sequence of tensors [N_l, 4] per level, or a sequence of "
            f"one of these per image expected, found {_describe(anchors)}"
        )
    if all(isinstance(level, Tensor) for level in anchors):
        return [_checked(anchors, "anchors")], None
    if len(anchors) != num_images:
        raise ValueError(f"anchors for {len(anchors)} images, but boxes for {num_images}")
    seen: dict[tuple[int, ...], int] = {}
    kinds: list[AnchorLayout | Levels] = []
    kind_of_image = []
    for i, image in enumerate(anchors):
        if not isinstance(image, AnchorLayout | Sequence) or isinstance(image, str | bytes):
            raise TypeError(
                f"anchors[{i}]: an AnchorLayout or a sequence of tensors per level expected, "
                f"found {_describe(image)}"
            )
        identity = (
            (id(image),) if isinstance(image, AnchorLayout) else tuple(id(level) for level in image)
        )
        if identity not in seen:
            kind = _checked(image, f"anchors[{i}]")
            if kinds and _num_levels(kind) != _num_levels(kinds[0]):
                raise ValueError(
                    f"anchors[{i}]: {_num_levels(kinds[0])} levels expected, as on the first "
                    f"image, found {_num_levels(kind)}"
                )
            seen[identity] = len(kinds)
            kinds.append(kind)
        kind_of_image.append(seen[identity])
    return kinds, torch.tensor(kind_of_image)


def _describe(value: Any) -> str:
    return (
        f"an empty {type(value).__name__}" if value == [] or value == () else type(value).__name__
    )


def _checked(anchors: AnchorLayout | Levels, where: str) -> AnchorLayout | Levels:
    """The layout, also of plain tensors where they have one; its levels can be told apart."""
    layout: AnchorLayout | None
    if isinstance(anchors, AnchorLayout):
        layout = anchors
    else:
        levels = [check_boxes(level, f"{where}[{i}]") for i, level in enumerate(anchors)]
        for i, level in enumerate(levels):
            if len(level) == 0:
                raise ValueError(f"{where}[{i}]: at least one anchor expected, found none")
        grids = [recognise_grid(level) for level in levels]
        if any(grid is None for grid in grids):
            _check_distinct(levels, where)
            return levels
        layout = AnchorLayout._from_grids([g for g in grids if g is not None], levels, None)
    pair = indistinguishable_levels(layout)
    if pair is not None:
        raise ValueError(same_levels_message(where, *(layout.level_names[i] for i in pair)))
    return layout


def _check_distinct(levels: Levels, where: str) -> None:
    for coarse in range(1, len(levels)):
        for fine in range(coarse):
            if _contains(levels[fine], levels[coarse]):
                raise ValueError(same_levels_message(where, f"level {fine}", f"level {coarse}"))


def _contains(fine: Tensor, coarse: Tensor) -> bool:
    """Whether every row of `coarse` is a row of `fine`."""
    # Two rows settle nearly every case without sorting either tensor.
    for row in coarse[:: max(1, len(coarse) - 1)][:2]:
        if not (fine == row).all(1).any():
            return False
    both = torch.cat([fine.unique(dim=0), coarse.unique(dim=0)])
    return int(both.unique(dim=0, return_counts=True)[1].eq(2).sum()) == len(coarse.unique(dim=0))


def same_levels_message(where: str, fine: str, coarse: str) -> str:
    """Why such levels are refused, for an error message."""
    return (
        f"{where}: all anchors of {coarse} also lie on {fine}, so no box can be given to one of "
        "them by its best IoU. (torchvision's AnchorGenerator returns one tensor per image, not "
        "per level: see AnchorLayout.from_detector. Its MobileNet detectors have such levels by "
        "design; patch them with factors of your choice.)"
    )


def _families(kinds: Sequence[AnchorLayout | Levels]) -> list[list[int]]:
    """Indices of anchors that one matcher can take: layouts that share their cell anchors."""
    families: dict[Any, list[int]] = {}
    for i, kind in enumerate(kinds):
        key: Any = i
        if isinstance(kind, AnchorLayout):
            levels = kind._levels
            stored = any(level.anchors is not None for level in levels)
            key = i if stored else tuple(level.cells for level in levels)
        families.setdefault(key, []).append(i)
    return list(families.values())


def _num_levels(anchors: AnchorLayout | Levels) -> int:
    return len(anchors.cell_anchors if isinstance(anchors, AnchorLayout) else anchors)
