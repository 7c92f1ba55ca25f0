"""`estimate_alpha_for`: from a detector and its data set to fusion factors, in one call."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alphafpn.estimate.alpha_estimate import AlphaEstimate
from alphafpn.estimate.anchor_layout import AnchorLayout, describe, largest
from alphafpn.estimate.annotations import Annotations, read_annotations
from alphafpn.estimate.checks import check_clamp
from alphafpn.estimate.counting import LevelCounts, count_levels
from alphafpn.estimate.distinct import check_distinct
from alphafpn.estimate.fcos import RangeMatcher
from alphafpn.estimate.matcher import GridMatcher
from alphafpn.estimate.probe import DetectorProbe
from alphafpn.estimate.resize import Size
from alphafpn.estimate.search import Matcher


def estimate_alpha_for(
    model: nn.Module,
    dataset: Any,
    *,
    category_ids: Collection[int] | None = None,
    clamp: tuple[float, float] | None = (0.2, 2.0),
    progress: bool = False,
) -> AlphaEstimate:
    """Reads factors off a data set for a detector, in the coordinates that its network sees.

    Levels, anchors, resize, padding and K are the detector's own. Each image is resized and padded
    as if alone in its batch; where training chooses among several `min_size`, each counts with
    equal weight. No image is opened where the annotations hold the sizes. The model stays as it is.

    FCOS matches no anchors: its levels follow its regression ranges.

    Args:
        model: A torchvision detector with a feature pyramid.
        dataset: A path to a COCO-format JSON file, or a sequence of paths, which count as one file
            (ids are each file's own); an iterable of `((height, width), boxes)` with
            boxes [n, 4] xyxy in original pixels; or a torchvision-style data set whose targets hold
            `boxes`.
        category_ids: Count only boxes of these categories.
        clamp: (lower, upper) bound of the factors, or None.
        progress: Show a progress bar on stderr while a data set is read item by item.

    Raises:
        TypeError: If `model` or `dataset` is of another kind.
        ValueError: If an annotation is broken, no boxes are left, or two levels of the detector
            cannot be told apart (torchvision's MobileNet detectors).

    Examples:
        >>> from torchvision.models import get_model
        >>> model = get_model("fasterrcnn_resnet50_fpn", weights=None, weights_backbone=None)
        >>> boxes = torch.tensor([[10.0, 10.0, 40.0, 50.0], [200, 90, 300, 150]])
        >>> estimate_alpha_for(model, [((480, 640), boxes)]).counts
        (0, 1, 1, 0, 0)
    """
    clamp = check_clamp(clamp)
    probe = DetectorProbe(model)
    annotations = read_annotations(dataset, category_ids=category_ids, progress=progress)
    return estimate_probe(probe, annotations, clamp)


def estimate_probe(
    probe: DetectorProbe, annotations: Annotations, clamp: tuple[float, float] | None
) -> AlphaEstimate:
    """Counts annotations that have been read."""
    counts: LevelCounts | None = None
    every: list[AnchorLayout] = []
    for min_size in probe.resize.min_sizes:
        seen = input_boxes(probe, annotations, min_size)
        every += seen.layouts
        matcher: Matcher
        if probe.is_fcos:
            sizes = [float(cells[0, 2] - cells[0, 0]) for cells in seen.layouts[0].cell_anchors]
            matcher = RangeMatcher(sizes, seen.boxes.device)
        else:
            check_distinct(largest(seen.layouts), "the detector")
            grids = [layout._levels for layout in seen.layouts]
            matcher = GridMatcher(grids, seen.boxes.dtype, seen.boxes.device)
        found = count_levels(
            matcher,
            seen.boxes,
            seen.boxes_per_image,
            len(seen.layouts[0].cell_anchors),
            seen.layout_index,
        )
        counts = found if counts is None else counts + found
    assert counts is not None
    limit = probe.detections_per_image
    return counts.estimate(
        probe.num_fused_levels,
        clamp,
        len(annotations.boxes),
        follows_iou=not probe.is_fcos,
        **describe(every, len(every[0].cell_anchors)),
        left_out=dict(annotations.left_out),
        num_clipped=annotations.num_clipped,
        detections_per_image=limit,
        num_crowded=0 if limit is None else int((annotations.boxes_per_image > limit).sum()),
    )


@dataclass(frozen=True, eq=False)
class InputBoxes:
    """Boxes as the network sees them, at one of the sizes that training chooses from.

    Attributes:
        boxes: [G, 4] xyxy, float32, in pixels of the resized images, ordered by image.
        boxes_per_image: int64 [M].
        layouts: The layouts of anchors that images have.
        layout_index: The layout of each image, int64 [M].
    """

    boxes: Tensor
    boxes_per_image: Tensor
    layouts: list[AnchorLayout]
    layout_index: Tensor


def input_boxes(probe: DetectorProbe, annotations: Annotations, min_size: int | None) -> InputBoxes:
    """Resizes the boxes as the detector does, and finds the layout of each image.

    Raises:
        ValueError: If a resized image has no pixels; the message names it.
    """
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
