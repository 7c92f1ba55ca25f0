"""`read_annotations`: what a user has, a file, a data set or an iterable, as columns.

Knows no model. Boxes come out in the pixels of the original images, after the filters that
torchvision's references apply before training. Every step is float32, in their order of operations,
so that the boxes are those a detector would be trained on, to the last bit.
"""

from __future__ import annotations

import os
from collections.abc import Collection

from alphafpn.estimate.annotations.coco import coco_selection, convert, decode, read_coco
from alphafpn.estimate.annotations.columns import Annotations, category_set
from alphafpn.estimate.annotations.items import read_items


def read_annotations(
    dataset: object, *, category_ids: Collection[int] | None = None, progress: bool = False
) -> Annotations:
    """Read image sizes and boxes, opening no image where the annotations hold the sizes.

    Args:
        dataset: One of

            - a path to a COCO-format JSON file. Crowd and `ignore` boxes are left out. Keys other
              than `images` (`id`, `width`, `height`), `annotations` (`image_id`, `category_id`,
              `bbox`, `iscrowd`, `ignore`) and `categories` (`id`) are skipped unchecked; ids of
              annotations appear in messages only and may repeat;
            - a `torchvision.datasets.CocoDetection`, also wrapped for `transforms.v2` or behind
              `Subset`s: read through its annotations as a file would be, for its `ids` only, as
              they are before any transform;
            - an iterable of `((height, width), boxes)`, boxes `[n, 4]` `xyxy` in original pixels as
              tensor, array or list;
            - an iterable or a map-style dataset of `(image, target)` with `target["boxes"]` as
              before or as `BoundingBoxes` of any unrotated format, in pixels of that image. Items
              are loaded; sizes come from the image or the boxes' `canvas_size`.
        category_ids: Take only boxes of these categories: COCO ids, or `target["labels"]`.
        progress: Show a progress bar on stderr while items are loaded.

    Returns:
        The columns. Images without boxes stay in. Boxes are clipped to their images; those of zero
        size and those wholly outside are left out and counted.

    Raises:
        TypeError: If `dataset` is none of these, or an item has the wrong types.
        ValueError: If the content is malformed (the message names the place in it, what was found
            and what was expected), a category is unknown, or no boxes are left.
        OSError: If the file cannot be read.
    """
    wanted = None if category_ids is None else category_set(category_ids)
    if isinstance(dataset, (str, os.PathLike)):
        name = os.fsdecode(dataset)
        annotations = read_coco(decode(dataset, name), None, name, wanted)
    elif (selected := coco_selection(dataset)) is not None:
        name = type(dataset).__name__
        annotations = read_coco(convert(selected[0], name), selected[1], name, wanted)
    else:
        name = "dataset"
        annotations = read_items(dataset, wanted, progress)
    if len(annotations.boxes) == 0:
        left_out = ", ".join(f"{n} {reason}" for reason, n in annotations.left_out.items())
        raise ValueError(
            f"{name}: expected boxes to count, found none in {len(annotations.sizes)} images"
            f" (left out: {left_out or 'none'})"
        )
    return annotations
