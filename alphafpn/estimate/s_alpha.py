"""Algorithm 1 and Eq. 2: from boxes and anchors to counts per level and fusion factors."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alphafpn.estimate.alpha_estimate import AlphaEstimate
from alphafpn.estimate.anchor_layout import AnchorLayout, describe
from alphafpn.estimate.checks import check_boxes, check_clamp, check_num_fused_levels
from alphafpn.estimate.counting import block_size, count_levels, images_of
from alphafpn.estimate.distinct import check_distinct
from alphafpn.estimate.grids import recognise_grid
from alphafpn.estimate.matcher import GridMatcher
from alphafpn.estimate.search import Matcher, SearchMatcher

Levels = Sequence[Tensor]


def estimate_alpha(
    anchors: AnchorLayout | Sequence[AnchorLayout] | Levels | Sequence[Levels],
    gt_boxes: Tensor | Sequence[Tensor],
    *,
    num_fused_levels: int | None = None,
    clamp: tuple[float, float] | None = (0.2, 2.0),
) -> AlphaEstimate:
    """Reads fusion factors off boxes and anchors (Algorithm 1 and Eq. 2).

    Each box is given to the level of its best-IoU anchor, the finest one among equals, without any
    threshold; the factor into a level is the number of boxes on the next coarser level over the
    number on this one.

    Args:
        anchors: What all images share, a layout or anchors [N_l, 4] per level, finest level first;
            or a sequence of one of these per image. Plain anchors on a regular grid take the same
            fast path as a layout; others are searched exactly, in blocks.
        gt_boxes: Boxes [G, 4] of one image, or a sequence of them, one per image; xyxy in pixels of
            the image as the network sees it. An image may have none.
        num_fused_levels: K, the number of levels that the pyramid fuses, its
            `len(in_channels_list)`; by default the layout's own, else all levels but one.
        clamp: (lower, upper) bound of the factors, or None. The paper's is (0.2, 2.0).

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If a box or an anchor is not finite or inverted, if anchors and boxes are for
            different numbers of images, or if two levels cannot be told apart.

    Examples:
        >>> import torch
        >>> cell = torch.tensor([[-8.0, -8.0, 8.0, 8.0]])
        >>> layout = AnchorLayout([cell, 2 * cell], [8, 16], [(8, 8), (4, 4)], 2)
        >>> boxes = torch.tensor([[8.0, 8.0, 20.0, 22.0], [2, 2, 18, 16], [9, 9, 41, 40]])
        >>> estimate_alpha(layout, boxes).alpha
        (0.5,)
    """
    clamp = check_clamp(clamp)
    name = "gt_boxes" if isinstance(gt_boxes, Tensor) else "gt_boxes[{}]"
    images = _images(gt_boxes, name)
    kinds, kind_of_image = _kinds(anchors, len(images), num_fused_levels)
    num_levels = len(_tensors(kinds[0]))
    if num_fused_levels is None:
        num_fused_levels = getattr(kinds[0], "num_fused_levels", num_levels - 1)
    check_num_fused_levels(num_fused_levels, num_levels)
    layouts = [kind for kind in kinds if isinstance(kind, AnchorLayout)]
    description = describe(layouts if len(layouts) == len(kinds) else [], num_levels)
    device = images[0].device if images else torch.device("cpu")
    all_sizes = torch.tensor([b.shape[0] for b in images], dtype=torch.int64, device="cpu")
    estimates = []
    families = _families(kinds)
    for family in families:
        members = np.flatnonzero(np.isin(kind_of_image, family))
        chosen = images if len(families) == 1 else [images[i] for i in members]
        sizes = all_sizes[members]
        dtype = _dtype([*chosen, *(level for k in family for level in _tensors(kinds[k]))])
        matcher = _matcher([kinds[k] for k in family], dtype, device)
        layout = torch.from_numpy(np.searchsorted(family, kind_of_image[members]))
        blocks = _blocks(chosen, sizes, name, members)
        counts = count_levels(matcher, blocks, sizes, num_levels, layout)
        estimates.append(counts.estimate(num_fused_levels, clamp, int(sizes.sum()), **description))
    return functools.reduce(AlphaEstimate.merge, estimates)


def _blocks(
    images: Sequence[Tensor], sizes: Tensor, name: str, members: npt.NDArray[np.int64]
) -> Iterator[Tensor]:
    """Yields the boxes of all images in blocks of equal length, checked; `members` names images."""
    ends = sizes.cumsum(0)
    total = int(sizes.sum())
    size = block_size(images[0].device) if total else 1
    for start in range(0, total, size):
        stop = min(start + size, total)
        first, end = images_of(ends, start, stop)
        pieces = list(images[first:end])
        pieces[-1] = pieces[-1][: stop - int(ends[end - 1] - sizes[end - 1])]
        pieces[0] = pieces[0][start - int(ends[first] - sizes[first]) :]
        block = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        try:
            block = check_boxes(block, "")
        except ValueError:
            for i in range(first, end):
                check_boxes(images[i], name.format(members[i]))
            raise
        yield block


def _images(gt_boxes: Any, name: str) -> list[Tensor]:
    """Returns boxes [G, 4] per image, floating, on one device; their values are not checked."""
    if not isinstance(gt_boxes, Iterable) or isinstance(gt_boxes, str | bytes | dict):
        raise TypeError(
            "gt_boxes: a tensor [G, 4], or a sequence of one per image expected, found "
            f"{type(gt_boxes).__name__}"
        )
    images = [gt_boxes] if isinstance(gt_boxes, Tensor) else list(gt_boxes)
    for i, boxes in enumerate(images):
        # This loop runs over every image, so it leaves the values to the blocks.
        if not (
            isinstance(boxes, Tensor)
            and boxes.dim() == 2
            and boxes.shape[1] == 4
            and boxes.dtype in (torch.float32, torch.float64)
        ):
            images[i] = check_boxes(boxes, name.format(i))
    devices = {boxes.device for boxes in images}
    if len(devices) > 1:
        raise ValueError(f"gt_boxes: one device expected, found {sorted(map(str, devices))}")
    return images


def _kinds(
    anchors: Any, num_images: int, num_fused_levels: int | None
) -> tuple[list[AnchorLayout | Levels], npt.NDArray[np.int64]]:
    """Finds the different anchors in `anchors`, and which of them each image has."""
    same = np.zeros(num_images, dtype=np.int64)
    if isinstance(anchors, AnchorLayout):
        return [_checked(anchors, "anchors", num_fused_levels)], same
    if isinstance(anchors, Tensor) or not isinstance(anchors, Sequence) or len(anchors) == 0:
        raise TypeError(
            "anchors: an AnchorLayout, a sequence of tensors [N_l, 4] per level, or a sequence of "
            f"one of these per image expected, found {_describe(anchors)}"
        )
    if all(isinstance(level, Tensor) for level in anchors):
        return [_checked(anchors, "anchors", num_fused_levels)], same
    if len(anchors) != num_images:
        raise ValueError(f"anchors for {len(anchors)} images, but boxes for {num_images}")
    # The same object needs no second look. Objects stay here, so that ids stay theirs.
    seen: dict[tuple[int, ...], tuple[int, object]] = {}
    index: dict[object, int] = {}
    kinds: list[AnchorLayout | Levels] = []
    kind_of_image = []
    for i, image in enumerate(anchors):
        if not isinstance(image, AnchorLayout | Sequence) or isinstance(image, str | bytes):
            raise TypeError(
                f"anchors[{i}]: an AnchorLayout or a sequence of tensors per level expected, "
                f"found {_describe(image)}"
            )
        parts = (image,) if isinstance(image, AnchorLayout) else tuple(image)
        identity = tuple(map(id, parts))
        if identity not in seen:
            key = _key(image) or identity
            if key not in index:
                kind = _checked(image, f"anchors[{i}]", num_fused_levels)
                if kinds and len(_tensors(kind)) != len(_tensors(kinds[0])):
                    raise ValueError(
                        f"anchors[{i}]: {len(_tensors(kinds[0]))} levels expected, as on the first "
                        f"image, found {len(_tensors(kind))}"
                    )
                index[key] = len(kinds)
                kinds.append(kind)
            seen[identity] = index[key], parts
        kind_of_image.append(seen[identity][0])
    return kinds, np.array(kind_of_image, dtype=np.int64)


def _describe(value: Any) -> str:
    return (
        f"an empty {type(value).__name__}" if value == [] or value == () else type(value).__name__
    )


def _checked(
    anchors: AnchorLayout | Levels, where: str, num_fused_levels: int | None
) -> AnchorLayout | Levels:
    """Returns the layout, also of plain tensors that have one; its levels can be told apart."""
    if isinstance(anchors, AnchorLayout):
        check_distinct(anchors, where)
        return anchors
    levels = [check_boxes(level, f"{where}[{i}]") for i, level in enumerate(anchors)]
    for i, level in enumerate(levels):
        if len(level) == 0:
            raise ValueError(f"{where}[{i}]: at least one anchor expected, found none")
    grids = [grid for level in levels if (grid := recognise_grid(level)) is not None]
    checked: AnchorLayout | Levels = levels
    if len(grids) == len(levels):
        checked = AnchorLayout._from_grids(grids, levels, num_fused_levels)
    check_distinct(checked, where)
    return checked


def _families(kinds: Sequence[AnchorLayout | Levels]) -> list[list[int]]:
    """Groups the indices of layouts that share their cell anchors, which one matcher can take."""
    families: dict[object, list[int]] = {}
    for i, kind in enumerate(kinds):
        key: object = i
        if isinstance(kind, AnchorLayout) and _key(kind) is not None:
            key = tuple((level.cells, level.dtype) for level in kind._levels)
        families.setdefault(key, []).append(i)
    return list(families.values())


def _key(anchors: object) -> object:
    """Returns what equal layouts share; None for stored anchors, which are not compared."""
    if not isinstance(anchors, AnchorLayout):
        return None
    levels = anchors._levels
    return levels if all(level.anchors is None for level in levels) else None


def _matcher(
    family: Sequence[AnchorLayout | Levels], dtype: torch.dtype, device: torch.device
) -> Matcher:
    layouts = [kind._levels for kind in family if isinstance(kind, AnchorLayout)]
    if layouts:
        return GridMatcher(layouts, dtype, device)
    return SearchMatcher(_tensors(family[0]), dtype, device)


def _tensors(anchors: AnchorLayout | Levels) -> Sequence[Tensor]:
    """Returns one tensor per level: cell anchors or anchors."""
    return anchors.cell_anchors if isinstance(anchors, AnchorLayout) else anchors


def _dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Returns the widest, in which the brute force would compute."""
    wide = any(dtype == torch.float64 for dtype in {tensor.dtype for tensor in tensors})
    return torch.float64 if wide else torch.float32
