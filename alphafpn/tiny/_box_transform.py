"""The base class of transforms that drop boxes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F  # noqa: N812

# Keys of a target that hold one entry per box in torchvision, COCO, Pascal VOC and TinyPerson. A
# length tells nothing: with two boxes, an image's (height, width) is as long as its labels.
PER_BOX = frozenset(
    {
        *("boxes", "labels", "scores", "masks", "keypoints", "area", "iscrowd"),
        *("bbox", "category_id", "id", "segmentation", "num_keypoints", "track_id", "track_ids"),
        *("difficult", "truncated", "occluded", "pose"),
        *("ignore", "uncertain", "logo", "in_dense_image"),
    }
)

_IMAGES = (PIL.Image.Image, tv_tensors.Image, tv_tensors.Video)


class BoxTransform(v2.Transform):  # type: ignore[misc]
    """A v2 transform that drops boxes, together with everything that belongs to them.

    Modifications of `v2.Transform`: `make_params` is given the image, the boxes (or None) and the
    target, the dict that holds the boxes (or an empty one). It returns, among others, `kept`, a
    bool tensor `[N]` on the CPU; `transform` is given only what is kept. `per_box` names keys of
    the target with one entry per box, in addition to `PER_BOX`.
    """

    def __init__(self, per_box: Sequence[str]) -> None:
        super().__init__()
        self.per_box = (per_box,) if isinstance(per_box, str) else tuple(per_box)

    def forward(self, *inputs: Any) -> Any:
        """Transforms a sample of any structure."""
        sample = inputs if len(inputs) > 1 else inputs[0]
        image = _image(sample)
        target = _target(sample) or {}
        boxes = next((e for e in target.values() if isinstance(e, tv_tensors.BoundingBoxes)), None)
        params = self.make_params([image, boxes, target])

        rest = copy.copy(target)
        for key, entry in target.items():
            if entry is boxes or key in PER_BOX or key in self.per_box:
                rest[key] = _select(entry, params["kept"])
        sample = tree_map(
            lambda node: rest if node is target else node,
            sample,
            is_leaf=lambda node: node is target,
        )

        def apply(leaf: Any) -> Any:
            if leaf is image or isinstance(leaf, (*_IMAGES, tv_tensors.TVTensor)):
                return self.transform(leaf, params)
            return leaf

        return tree_map(apply, sample)


def to_xywh(boxes: tv_tensors.BoundingBoxes | None) -> Tensor:
    """Converts boxes of any format to `xywh`, `[N, 4]` in float64 on the CPU."""
    if boxes is None:
        return torch.empty(0, 4, dtype=torch.float64)
    converted = F.convert_bounding_box_format(boxes, new_format=tv_tensors.BoundingBoxFormat.XYWH)
    plain: Tensor = converted.as_subclass(Tensor).double().cpu()
    good = plain.isfinite().all(1) & (plain[:, 2:] >= 0).all(1)
    if not good.all():
        index = int(good.int().argmin())
        raise ValueError(
            f"boxes[{index}]: expected finite numbers and no negative size, found "
            f"{boxes[index].tolist()} ({boxes.format.value})"
        )
    return plain


def _image(sample: Any) -> Any:
    """Finds the image as torchvision does: by type, else the first plain tensor."""
    leaves, _ = tree_flatten(sample)
    images = [leaf for leaf in leaves if isinstance(leaf, _IMAGES)] + [
        leaf
        for leaf in leaves
        if isinstance(leaf, Tensor) and not isinstance(leaf, tv_tensors.TVTensor)
    ]
    if not images:
        found = [type(leaf).__name__ for leaf in leaves]
        raise TypeError(f"sample: expected an image, found {found}")
    return images[0]


def _target(node: Any) -> dict[str, Any] | None:
    """Finds the dict that holds the sample's boxes."""
    children = node.values() if isinstance(node, Mapping) else node
    if not isinstance(node, Mapping | list | tuple):
        return None
    for child in children:
        if isinstance(child, tv_tensors.BoundingBoxes):
            if not isinstance(node, dict):
                raise TypeError(f"boxes: expected them in a dict, found a {type(node).__name__}")
            return node
    if isinstance(node, Mapping) and "boxes" in node:
        found = type(node["boxes"]).__name__
        raise TypeError(f"boxes: expected torchvision.tv_tensors.BoundingBoxes, found {found}")
    return next((found for found in map(_target, children) if found is not None), None)


def _select(entry: Any, kept: Tensor) -> Any:
    """Returns the parts whose boxes are kept, or the whole entry if it has not one part per box."""
    if isinstance(entry, Tensor):
        dimensions = 3 if isinstance(entry, tv_tensors.Mask) else 1  # a mask [H, W] is a single one
        if entry.ndim < dimensions or len(entry) != len(kept):
            return entry
        part = entry[kept.to(entry.device)]
        return tv_tensors.wrap(part, like=entry) if isinstance(entry, tv_tensors.TVTensor) else part
    if isinstance(entry, np.ndarray) and entry.shape[:1] == kept.shape:
        return entry[kept.numpy()]
    if isinstance(entry, list | tuple) and len(entry) == len(kept):
        return type(entry)(part for part, keep in zip(entry, kept.tolist(), strict=True) if keep)
    return entry
