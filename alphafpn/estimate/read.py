"""`read_annotations`: what a user has, a file, a data set or an iterable, as columns.

Knows no model. Boxes come out in the pixels of the original images, after the filters that
torchvision's references apply before training. Every step is float32, in their order of operations,
so that the boxes are those a detector would be trained on, to the last bit.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

from alphafpn.estimate.coco import (
    categories,
    coco_selection,
    convert,
    decode,
    read_coco,
)
from alphafpn.estimate.columns import (
    Annotations,
    check_categories,
    concatenate,
    describe,
)
from alphafpn.estimate.items import read_items


def read_annotations(
    dataset: object, *, category_ids: Collection[int] | None = None, progress: bool = False
) -> Annotations:
    """Reads image sizes and boxes, opening no image where the annotations hold the sizes.

    Args:
        dataset: One of

            - a path to a COCO-format JSON file. Crowd and `ignore` boxes are left out. Keys other
              than `images` (`id`, `width`, `height`), `annotations` (`image_id`, `category_id`,
              `bbox`, `iscrowd`, `ignore`) and `categories` (`id`) are skipped unchecked; ids of
              annotations appear in messages only and may repeat;
            - a sequence of such paths: the shards of one data set, in which the ids of images count
              for their own file alone;
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
    try:
        wanted = None if category_ids is None else set(map(operator.index, category_ids))
    except TypeError:
        raise TypeError(
            f"category_ids: expected a collection of ints, found {describe(category_ids)}"
        ) from None
    known: set[int] = set()
    if paths := _paths(dataset):
        name = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
        # One after the other: another process takes longer to start than a file to read.
        parts = [_columns(decode(path, path), None, path, wanted, known) for path in paths]
        files = tuple((path, len(part.sizes)) for path, part in zip(paths, parts, strict=True))
        annotations = replace(concatenate(parts), files=files)
        check_categories(wanted or set(), known, name)
    elif (selected := coco_selection(dataset)) is not None:
        name = type(dataset).__name__
        annotations = _columns(convert(selected[0], name), selected[1], name, wanted, known)
        check_categories(wanted or set(), known, name)
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


def _paths(dataset: object) -> list[str]:
    """Returns the paths that `dataset` is or holds; none where it is something else."""
    if isinstance(dataset, (str, os.PathLike)):
        return [os.fsdecode(dataset)]
    if not (isinstance(dataset, Sequence) and dataset and _is_path(dataset[0])):
        return []
    for index, path in enumerate(dataset):
        if not _is_path(path):
            raise TypeError(
                f"dataset[{index}]: expected a path like dataset[0], found {describe(path)}"
            )
    return [os.fsdecode(path) for path in dataset]


def _is_path(value: object) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(value, (str, os.PathLike))


def _columns(
    coco: Any, image_ids: list[int] | None, name: str, wanted: set[int] | None, known: set[int]
) -> Annotations:
    """Turns decoded annotations into columns, and add the categories that they have to `known`."""
    if wanted is not None:
        known |= categories(coco)
    return read_coco(coco, image_ids, name, wanted)
