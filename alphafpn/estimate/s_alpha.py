"""Algorithm 1 and Eq. 2: from boxes and anchors to counts per level and fusion factors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alphafpn.estimate.alpha_estimate import IOU_BINS, SIZE_UNIT, AlphaEstimate
from alphafpn.estimate.anchor_layout import (
    AnchorLayout,
    check_anchors,
    check_distinct,
    describe_levels,
    distinct_by_size,
    largest,
)
from alphafpn.estimate.annotations import Annotations, describe, read_annotations
from alphafpn.estimate.checks import (
    DEFAULT_CLAMP,
    as_boxes,
    check_clamp,
    check_num_fused_levels,
    check_values,
)
from alphafpn.estimate.coco import Id
from alphafpn.estimate.fcos import RangeMatcher
from alphafpn.estimate.irregular import Matcher, SearchMatcher
from alphafpn.estimate.matcher import GridMatcher
from alphafpn.estimate.probe import DetectorProbe
from alphafpn.estimate.resize import Size
from alphafpn.estimate.shards import failures_are_shared, is_shard

# Boxes that are matched and counted at once. This bounds temporary memory.
BLOCK = 524_288

Levels = Sequence[Tensor]


@failures_are_shared()
def estimate_alpha(
    anchors: AnchorLayout | Sequence[AnchorLayout] | Levels | Sequence[Levels],
    gt_boxes: Tensor | Sequence[Tensor],
    *,
    num_fused_levels: int | None = None,
    clamp: tuple[float, float] | None = DEFAULT_CLAMP,
) -> AlphaEstimate:
    """Reads fusion factors off boxes and anchors (Algorithm 1 and Eq. 2).

    Each box is given to the level of its best-IoU anchor, the finest one among equals, without any
    threshold; the factor into a level is the number of boxes on the next coarser level over the
    number on this one.

    Args:
        anchors: What all images share, a layout or anchors [N_l, 4] per level, finest level first;
            or a sequence of one of these per image. Plain anchors on a regular grid take the same
            fast path as a layout; others are searched exactly, in blocks. Pass the same object for
            images that share their anchors: each object is prepared once.
        gt_boxes: Boxes [G, 4] of one image, or a sequence of them, one per image; xyxy in pixels of
            the image as the network sees it. `BoundingBoxes` may have any unrotated format. An
            image may have no boxes.
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
    boxes, boxes_per_image = _joined(gt_boxes)
    families = _families(anchors, len(boxes_per_image))
    all_anchors = [one for family in families for one in family.anchors]
    num_levels = len(_levels(all_anchors[0]))
    if num_fused_levels is None:
        first = anchors if isinstance(anchors, AnchorLayout) else anchors[0]
        num_fused_levels = getattr(first, "num_fused_levels", num_levels - 1)
    num_fused_levels = check_num_fused_levels(num_fused_levels, num_levels)
    layouts = [one for one in all_anchors if isinstance(one, AnchorLayout)]
    description = describe_levels(layouts if len(layouts) == len(all_anchors) else [], num_levels)
    chosen = [(boxes, boxes_per_image)]
    if len(families) > 1:
        each = boxes.split(boxes_per_image.tolist())
        chosen = [
            (torch.cat([each[image] for image in family.images]), boxes_per_image[family.images])
            for family in families
        ]
    estimates = []
    for family, (some, lengths) in zip(families, chosen, strict=True):
        index = torch.tensor(family.layout_index, dtype=torch.int64, device="cpu")
        counts = count_levels(family.matcher(boxes), some, lengths, num_levels, index)
        estimates.append(_estimate([counts], num_fused_levels, clamp, **description))
    return functools.reduce(AlphaEstimate.merge, estimates)


@failures_are_shared()
def estimate_alpha_for(
    model: nn.Module,
    dataset: Any,
    *,
    category_ids: Collection[Id] | None = None,
    clamp: tuple[float, float] | None = DEFAULT_CLAMP,
    progress: bool = False,
) -> AlphaEstimate:
    """Reads factors off a data set for a detector, in the coordinates that its network sees.

    Levels, anchors, resize, padding and K are the detector's own. Each image is resized and padded
    as if alone in its batch; if training chooses among several `min_size`, each counts with equal
    weight. No image is opened if the annotations hold the sizes. The model stays as it is.

    FCOS matches no anchors: its levels follow its regression ranges.

    Args:
        model: A torchvision detector with a feature pyramid, or a module that holds exactly one.
        dataset: A path to a COCO JSON file, or a sequence of paths, which count as one file (ids
            are each file's own), or such a file as a dictionary in memory; an iterable of
            `((height, width), boxes)` with boxes [n, 4] xyxy in original pixels; or a
            torchvision-style data set: `(image, target, ...)` with `boxes` in the target, or
            dictionaries with `image` and `boxes` or `bbox_xyxy`.
        category_ids: Count only boxes of these categories: COCO ids, or the items' labels.
        clamp: (lower, upper) bound of the factors, or None.
        progress: Show a progress bar on stderr while a data set is read item by item.

    Raises:
        TypeError: If `model` or `dataset` is of another kind.
        ValueError: If the data set is broken, no boxes are left, or two levels of the detector
            cannot be told apart (torchvision's MobileNet detectors). One of several processes of a
            `torch.distributed` group may have no boxes: its estimate is a shard for `all_reduce`.

    Examples:
        >>> from torchvision.models import get_model
        >>> model = get_model("fasterrcnn_resnet50_fpn", weights=None, weights_backbone=None)
        >>> boxes = torch.tensor([[10.0, 10.0, 40.0, 50.0], [200, 90, 300, 150]])
        >>> estimate_alpha_for(model, [((480, 640), boxes)]).counts
        (0, 1, 1, 0, 0)
    """
    clamp = check_clamp(clamp)
    probe = DetectorProbe(model)
    annotations = read_annotations(
        dataset, category_ids=category_ids, progress=progress, allow_empty=is_shard()
    )
    return estimate_probe(probe, annotations, clamp)


def estimate_probe(
    probe: DetectorProbe, annotations: Annotations, clamp: tuple[float, float] | None
) -> AlphaEstimate:
    """Counts annotations that have been read, as `estimate_alpha_for` does."""
    num_levels = len(probe.generator.cell_anchors)
    parts = [input_boxes(probe, annotations, size) for size in probe.resize.min_sizes]
    layouts = [layout for part in parts for layout in part.layouts]
    if layouts and not probe.is_fcos:
        check_distinct(largest(layouts), "the detector")
    counts = [
        count_levels(
            part.matcher(probe.is_fcos) if layouts else None,
            part.boxes,
            part.boxes_per_image,
            num_levels,
            part.layout_index,
        )
        for part in parts
    ]
    limit = probe.detections_per_image
    return _estimate(
        counts,
        probe.num_fused_levels,
        clamp,
        follows_iou=not probe.is_fcos,
        **describe_levels(layouts, num_levels),
        left_out=dict(annotations.left_out),
        num_clipped=annotations.num_clipped,
        num_fit_swapped=annotations.num_fit_swapped,
        notes=dict(annotations.notes),
        detections_per_image=limit,
        num_crowded=0 if limit is None else int((annotations.boxes_per_image > limit).sum()),
    )


@dataclass(frozen=True, eq=False)
class InputBoxes:
    """Boxes as the network sees them, at one of the sizes that training chooses from.

    `boxes` [G, 4] are xyxy, float32, ordered by image; `boxes_per_image` [M] and `layout_index` [M]
    are int64, and the latter tells which of the `layouts` each image has.
    """

    boxes: Tensor
    boxes_per_image: Tensor
    layouts: list[AnchorLayout]
    layout_index: Tensor

    def matcher(self, is_fcos: bool, cell_anchors: Sequence[Tensor] | None = None) -> Matcher:
        """Makes a matcher for these images, by default with the layouts' own cell anchors."""
        cells = self.layouts[0].cell_anchors if cell_anchors is None else cell_anchors
        if is_fcos:
            sizes = [float(level[0, 2] - level[0, 0]) for level in cells]
            return RangeMatcher(sizes, self.boxes.device)
        return GridMatcher(cells, self.layouts, self.boxes.dtype, self.boxes.device)


def input_boxes(probe: DetectorProbe, annotations: Annotations, min_size: int | None) -> InputBoxes:
    """Resizes the boxes as the detector does, and finds the layout of each image."""
    # Sizes repeat: work is per different size, and per different padded shape.
    key = annotations.image_sizes[:, 0] << 32 | annotations.image_sizes[:, 1]
    unique, first, size_of_image = np.unique(key, return_index=True, return_inverse=True)
    index: dict[Size, int] = {}
    layouts: list[AnchorLayout] = []
    layout_of_size = np.empty(len(unique), dtype=np.int64)
    scale = np.empty((len(unique), 2), dtype=np.float32)
    for i, both in enumerate(unique.tolist()):
        size = (both >> 32, both & 0xFFFFFFFF)
        try:
            resized, padded = probe.resize.frame(size, min_size)
        except ValueError as error:
            raise ValueError(f"{annotations.place(first[i])}: {error}") from None
        if padded not in index:
            index[padded] = len(layouts)
            layouts.append(AnchorLayout(*probe.anchor_grids(padded)))
        layout_of_size[i] = index[padded]
        # `resize_boxes` divides in float32.
        scale[i] = np.asarray(resized, np.float32) / np.asarray(size, np.float32)
    boxes_per_image = torch.from_numpy(annotations.boxes_per_image)
    # One row (x, y, x, y) per image, then one per box.
    factors = torch.from_numpy(scale[size_of_image][:, ::-1].repeat(2, axis=0).copy())
    boxes = factors.view(-1, 4).repeat_interleave(boxes_per_image, 0)
    boxes.mul_(torch.from_numpy(annotations.boxes))
    return InputBoxes(
        boxes, boxes_per_image, layouts, torch.from_numpy(layout_of_size[size_of_image])
    )


# Boxes per image and level, int64 [M, L + 1], and last those without any anchor; boxes per level
# and hundredth of best IoU, int64 [L + 1, 101]; sum of sqrt(width * height) in `SIZE_UNIT`.
Counts = tuple[Tensor, Tensor, Tensor]


def count_levels(
    matcher: Matcher | None,
    boxes: Tensor,
    boxes_per_image: Tensor,
    num_levels: int,
    layout_index: Tensor,
) -> Counts:
    """Matches boxes [G, 4] and counts them, block by block.

    `boxes_per_image` and `layout_index` are int64 [M], on the CPU. There may be no matcher if there
    are no boxes.
    """
    device = boxes.device
    layout_index, ends = layout_index.to(device), boxes_per_image.cumsum(0).to(device)
    per_image = torch.zeros(len(ends), num_levels + 1, dtype=torch.int64, device=device)
    histogram = torch.zeros(num_levels + 1, IOU_BINS, dtype=torch.int64, device=device)
    size_sum = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, len(boxes), BLOCK):
        assert matcher is not None
        block = boxes[start : start + BLOCK]
        box_index = torch.arange(start, start + len(block), device=device)
        image = torch.searchsorted(ends, box_index, right=True)
        level, iou = matcher.match(block, layout_index[image])
        rows = per_image[int(image[0]) : int(image[-1]) + 1]
        key = (image - image[0]) * (num_levels + 1) + level
        rows += torch.bincount(key, minlength=rows.numel()).view_as(rows)
        # The small number makes up for the rounding of an IoU that is a whole hundredth.
        bins = (iou * (IOU_BINS - 1) + 1e-4).long()
        found = torch.bincount(level * IOU_BINS + bins, minlength=histogram.numel())
        histogram += found.view_as(histogram)
        area = (block[:, 2] - block[:, 0]) * (block[:, 3] - block[:, 1])
        size_sum += (area.sqrt_() / SIZE_UNIT).round_().sum(dtype=torch.float64)
    return per_image, histogram, size_sum


def _estimate(
    counts: Sequence[Counts],
    num_fused_levels: int,
    clamp: tuple[float, float] | None,
    *,
    follows_iou: bool = True,
    **description: Any,
) -> AlphaEstimate:
    """Adds up the counts of the same images at several sizes; `description` is all else."""
    per_image, histogram, size_sum = (sum(part[1:], part[0]) for part in zip(*counts, strict=True))
    *level_counts, num_unmatched = per_image.sum(0).tolist()
    # Products of counts in float64 are exact far beyond any data set.
    table = per_image[:, :-1].double()
    moments = (table.t() @ table).round().long().tolist()
    reached = histogram[:-1, (IOU_BINS - 1) // 2 :].sum(1).tolist()
    return AlphaEstimate(
        counts=tuple(level_counts),
        moments=tuple(tuple(row) for row in moments),
        num_fused_levels=num_fused_levels,
        num_images=len(per_image),
        num_boxes=(sum(level_counts) + num_unmatched) // len(counts),
        num_unmatched=num_unmatched,
        num_sizes=len(counts),
        clamp=clamp,
        iou_histogram=tuple(histogram.sum(0).tolist()) if follows_iou else None,
        reached=tuple(reached) if follows_iou else (),
        size_sum=int(size_sum),
        **description,
    )


def _joined(gt_boxes: Any) -> tuple[Tensor, Tensor]:
    """Returns the boxes of all images, floating [G, 4], checked; and how many each image has."""
    if not isinstance(gt_boxes, Iterable) or isinstance(gt_boxes, str | bytes | dict):
        raise TypeError(
            "gt_boxes: expected a tensor [G, 4], or a sequence of one per image, found "
            f"{type(gt_boxes).__name__}; a data set needs a detector: see estimate_alpha_for"
        )
    single = isinstance(gt_boxes, Tensor)
    name = "gt_boxes" if single else "gt_boxes[{}]"
    images: list[Any] = [gt_boxes] if single else list(gt_boxes)
    for i, boxes in enumerate(images):
        # Nearly all pass here: there may be many images of a few boxes.
        if not (
            type(boxes) is Tensor
            and boxes.dim() == 2
            and boxes.shape[1] == 4
            and boxes.dtype in (torch.float32, torch.float64)
        ):
            images[i] = as_boxes(boxes, name.format(i))
    devices = {boxes.device for boxes in images}
    if len(devices) > 1:
        raise ValueError(f"gt_boxes: expected one device, found {sorted(map(str, devices))}")
    joined = images[0] if single else torch.cat(images or [torch.zeros(0, 4, device="cpu")])
    joined = joined.detach()
    if joined.device.type == "mps":  # it has no float64, which sums are exact in
        joined = joined.cpu()
    try:
        for block in joined.split(BLOCK):
            check_values(block, name)
    except ValueError:
        for i, boxes in enumerate(images):
            check_values(boxes, name.format(i))
        raise
    lengths = [boxes.shape[0] for boxes in images]
    return joined, torch.tensor(lengths, dtype=torch.int64, device="cpu")


@dataclass(eq=False)
class _Family:
    """Images for one matcher: of layouts with the same cell anchors, or of the same plain anchors.

    `layout_index` tells which of the `anchors` each of the `images` has.
    """

    anchors: list[Any] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    layout_index: list[int] = field(default_factory=list)

    @functools.cached_property
    def distinct(self) -> bool:
        """Whether sizes tell the levels apart: of all layouts, since their cells are equal."""
        first = self.anchors[0]
        return isinstance(first, AnchorLayout) and distinct_by_size(first)

    def append(self, anchors: AnchorLayout | Levels, where: str) -> None:
        """Adds anchors, or raises ValueError if two of their levels cannot be told apart."""
        self.anchors.append(anchors)
        if not self.distinct:
            check_distinct(anchors, where)

    def matcher(self, boxes: Tensor) -> Matcher:
        """Makes a matcher for boxes on their device, in float64 if boxes or anchors are."""
        levels = _levels(self.anchors[0])
        wide = any(tensor.dtype == torch.float64 for tensor in (boxes, *levels))
        dtype = torch.float64 if wide else torch.float32
        if isinstance(self.anchors[0], AnchorLayout):
            return GridMatcher(levels, self.anchors, dtype, boxes.device)
        return SearchMatcher(levels, dtype, boxes.device)


def _families(anchors: Any, num_images: int) -> list[_Family]:
    """Groups the images by their anchors, checked; each different object is looked at once."""
    if isinstance(anchors, nn.Module):
        raise TypeError(
            f"anchors: expected an AnchorLayout or tensors, found {type(anchors).__name__}; "
            "estimate_alpha_for takes a detector"
        )
    shared = isinstance(anchors, AnchorLayout)
    if not shared:
        if isinstance(anchors, Tensor | str) or not (isinstance(anchors, Sequence) and anchors):
            raise TypeError(
                "anchors: expected an AnchorLayout, a sequence of tensors [N_l, 4] per level, or a "
                f"sequence of one of these per image, found {describe(anchors)}"
            )
        shared = all(isinstance(level, Tensor) for level in anchors)
    if shared:
        family = _Family(layout_index=[0] * num_images)
        family.append(_checked(anchors, "anchors"), "anchors")
        return [family]
    if len(anchors) != num_images:
        raise ValueError(f"anchors: expected {num_images}, one per image, found {len(anchors)}")
    families: dict[object, _Family] = {}
    # By identity; the parts are kept, so that an id stays theirs.
    known: dict[tuple[int, ...], tuple[Any, _Family, int]] = {}
    for i, image in enumerate(anchors):
        if not isinstance(image, AnchorLayout | Sequence) or isinstance(image, str | bytes):
            raise TypeError(
                f"anchors[{i}]: expected an AnchorLayout or a sequence of tensors per level, "
                f"found {describe(image)}"
            )
        parts = (image,) if isinstance(image, AnchorLayout) else tuple(image)
        identity = tuple(map(id, parts))
        if identity not in known:
            checked = _checked(image if isinstance(image, AnchorLayout) else parts, f"anchors[{i}]")
            key: object = identity
            if isinstance(checked, AnchorLayout):
                cells = checked.cell_anchors
                key = tuple((c.dtype, c.cpu().numpy().tobytes()) for c in cells)
            family = families.setdefault(key, _Family())
            family.append(checked, f"anchors[{i}]")
            known[identity] = parts, family, len(family.anchors) - 1
            first = len(_levels(next(iter(families.values())).anchors[0]))
            if len(_levels(checked)) != first:
                raise ValueError(
                    f"anchors[{i}]: expected {first} levels, as on the first image, found "
                    f"{len(_levels(checked))}"
                )
        _, family, index = known[identity]
        family.images.append(i)
        family.layout_index.append(index)
    return list(families.values())


def _checked(anchors: AnchorLayout | Levels, where: str) -> AnchorLayout | Levels:
    """Returns the layout, also of plain tensors that have one."""
    if not isinstance(anchors, AnchorLayout):
        anchors = [check_anchors(level, f"{where}[{i}]") for i, level in enumerate(anchors)]
        with contextlib.suppress(ValueError):  # if they are on no grid
            anchors = AnchorLayout.from_tensors(anchors, len(anchors))
    return anchors


def _levels(anchors: AnchorLayout | Levels) -> Levels:
    """Returns one tensor per level: cell anchors or anchors."""
    return anchors.cell_anchors if isinstance(anchors, AnchorLayout) else anchors
