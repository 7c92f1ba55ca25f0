"""`estimate_alpha_for`: from a detector and its data set to fusion factors, in one call."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alphafpn.estimate.alpha_estimate import AlphaEstimate
from alphafpn.estimate.anchor_layout import AnchorLayout, describe, largest
from alphafpn.estimate.checks import check_clamp
from alphafpn.estimate.columns import Annotations
from alphafpn.estimate.counting import LevelCounts, count_levels
from alphafpn.estimate.distinct import check_distinct
from alphafpn.estimate.fcos import RangeMatcher
from alphafpn.estimate.matcher import GridMatcher
from alphafpn.estimate.probe import DetectorProbe
from alphafpn.estimate.read import read_annotations
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
    view = DetectorProbe(model)
    annotations = read_annotations(dataset, category_ids=category_ids, progress=progress)
    return estimate_probe(view, annotations, clamp)


def estimate_probe(
    view: DetectorProbe,
    annotations: Annotations,
    clamp: tuple[float, float] | None,
    enlarge: int = 1,
) -> AlphaEstimate:
    """Counts annotations that have been read, of images that come `enlarge` times as large."""
    counts: LevelCounts | None = None
    every: list[AnchorLayout] = []
    for min_size in view.resize.min_sizes:
        layouts, layout, scale = _layouts(view, annotations, min_size, enlarge)
        every += layouts
        boxes = _resized(annotations, scale)
        matcher: Matcher
        if view.is_fcos:
            sizes = [float(cells[0, 2] - cells[0, 0]) for cells in layouts[0].cell_anchors]
            matcher = RangeMatcher(sizes, boxes.device)
        else:
            check_distinct(largest(layouts), "the detector")
            grids = [lay._levels for lay in layouts]
            matcher = GridMatcher(grids, boxes.dtype, boxes.device)
        found = count_levels(
            matcher,
            boxes,
            torch.from_numpy(annotations.counts),
            len(layouts[0].cell_anchors),
            layout,
        )
        counts = found if counts is None else counts + found
    assert counts is not None
    limit = view.detections_per_image
    return counts.estimate(
        view.num_fused_levels,
        clamp,
        len(annotations.boxes),
        follows_iou=not view.is_fcos,
        **describe(every, len(every[0].cell_anchors)),
        left_out=dict(annotations.left_out),
        num_clipped=annotations.num_clipped,
        detections_per_image=limit,
        num_crowded=0 if limit is None else int((annotations.counts > limit).sum()),
    )


def _layouts(
    view: DetectorProbe, annotations: Annotations, min_size: int | None, enlarge: int
) -> tuple[list[AnchorLayout], Tensor, np.ndarray[Any, np.dtype[np.float32]]]:
    """Returns the layouts, which of them each image has, and each image's scale (y, x)."""
    # Sizes repeat: work is per different size, and per different padded shape.
    key = annotations.sizes[:, 0] << 32 | annotations.sizes[:, 1]
    unique, first, size_of_image = np.unique(key, return_index=True, return_inverse=True)
    index: dict[Size, int] = {}
    layouts: list[AnchorLayout] = []
    layout_of_size = np.empty(len(unique), dtype=np.int64)
    scale = np.empty((len(unique), 2), dtype=np.float32)
    for i, both in enumerate(unique.tolist()):
        size = (both >> 32, both & 0xFFFFFFFF)
        try:
            resized, padded = view.resize.frame((size[0] * enlarge, size[1] * enlarge), min_size)
        except ValueError as error:
            raise ValueError(f"{annotations.place(first[i])}: {error}") from None
        if padded not in index:
            index[padded] = len(layouts)
            layouts.append(AnchorLayout(*view.anchor_grids(padded)))
        layout_of_size[i] = index[padded]
        # `resize_boxes` divides in float32.
        scale[i] = np.asarray(resized, np.float32) / np.asarray(size, np.float32)
    return layouts, torch.from_numpy(layout_of_size[size_of_image]), scale[size_of_image]


def _resized(annotations: Annotations, scale: np.ndarray[Any, np.dtype[np.float32]]) -> Tensor:
    """Returns boxes [G, 4] in pixels of the resized images."""
    factors = torch.from_numpy(np.ascontiguousarray(scale[:, ::-1]).repeat(2, axis=0))
    # One row (x, y, x, y) per image, then one per box.
    rows = factors.view(-1, 4).repeat_interleave(torch.from_numpy(annotations.counts), 0)
    return rows.mul_(torch.from_numpy(annotations.boxes))
