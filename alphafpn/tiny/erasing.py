"""Painting over ignored regions as a transform for `torchvision.transforms.v2`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torchvision import tv_tensors

from alphafpn.tiny._box_transform import BoxTransform, to_xywh


class EraseIgnored(BoxTransform):
    """Paints over regions whose objects are not annotated one by one, and drops their boxes.

    Each region gets its own mean colour, by channel. Our choice, since neither paper nor code says
    it: a region covers every pixel of the image that its box touches; colours are those of the
    image before anything is painted; objects that overlap a region are painted over and keep their
    boxes.

    The image may be PIL's or a tensor of any dtype. The sample is as for `ScaleMatch`.

    Args:
        keys: Keys of the target with one flag per box; a box with any flag set is a region. A
            target needs at least one of the keys.
        per_box: Further keys of the target with one entry per box, as in `ScaleMatch`.

    Raises:
        TypeError: If a sample has no image, if its boxes are not `BoundingBoxes`, or if the image
            has a palette, whose colours have no mean.
        ValueError: If the target has none of the keys, or not one flag per box; if boxes are
            rotated, inverted or not finite.

    Examples:
        >>> boxes = [[0, 0, 2, 1], [2, 0, 4, 1]]
        >>> boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(1, 4))
        >>> target = {"boxes": boxes, "ignore": [True, False]}
        >>> image, target = EraseIgnored()(torch.tensor([[[0.0, 1.0, 2.0, 3.0]]]), target)
        >>> image.tolist(), target["boxes"].tolist(), target["ignore"]
        ([[[0.5, 0.5, 2.0, 3.0]]], [[2, 0, 4, 1]], [False])
    """

    def __init__(
        self,
        keys: Sequence[str] = ("ignore", "uncertain", "logo"),
        *,
        per_box: Sequence[str] = (),
    ) -> None:
        self.keys = (keys,) if isinstance(keys, str) else tuple(keys)
        super().__init__((*self.keys, *([per_box] if isinstance(per_box, str) else per_box)))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Chooses the `regions` to paint, `[R, 4]` as `xywh`, and which boxes are `kept`, `[N]`."""
        _, boxes, target = flat_inputs
        found = to_xywh(boxes)
        kept = torch.ones(len(found), dtype=torch.bool)
        keys = [key for key in self.keys if key in target]
        if len(found) and not keys:
            raise ValueError(f"target: expected one of {list(self.keys)}, found {list(target)}")
        for key in keys:
            flags = torch.as_tensor(target[key], dtype=torch.bool, device="cpu")
            if flags.shape != kept.shape:
                raise ValueError(
                    f"target[{key!r}]: expected one flag for each of {len(kept)} boxes, "
                    f"found shape {list(flags.shape)}"
                )
            kept &= ~flags
        return {"regions": found[~kept], "kept": kept}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Paints an image; masks and boxes stay."""
        if isinstance(inpt, PIL.Image.Image):
            return _paint_pil(inpt, params["regions"])
        if isinstance(inpt, tv_tensors.Image | tv_tensors.Video):
            painted = _paint(inpt.as_subclass(Tensor), params["regions"])
            return tv_tensors.wrap(painted, like=inpt)
        return inpt if isinstance(inpt, tv_tensors.TVTensor) else _paint(inpt, params["regions"])


def _paint(pixels: Tensor, regions: Tensor) -> Tensor:
    painted = pixels.clone()
    height, width = pixels.shape[-2:]
    for left, top, right, bottom in _windows(regions, height, width):
        region = pixels[..., top:bottom, left:right]
        colour = region.double().mean((-2, -1), keepdim=True)
        colour = colour if pixels.is_floating_point() else colour.round()
        painted[..., top:bottom, left:right] = colour.to(pixels.dtype)
    return painted


def _paint_pil(image: PIL.Image.Image, regions: Tensor) -> PIL.Image.Image:
    if image.mode == "P":
        raise TypeError("image: expected one without a palette, such as RGB, found mode P")
    painted = image.copy()
    for window in _windows(regions, image.height, image.width):
        region = image.crop(window)
        mean = np.asarray(region, np.float64).mean((0, 1))
        mean = mean if image.mode == "F" else mean.round().astype(int)
        colour = tuple(mean.tolist()) if mean.ndim else mean.item()
        # Pillow fills 16-bit images with a wrong colour if they are filled directly.
        painted.paste(PIL.Image.new(image.mode, region.size, colour), window)
    return painted


def _windows(regions: Tensor, height: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields the pixels that each region touches, as `xyxy`; skips regions outside the image."""
    for x, y, w, h in regions.tolist():
        left, right = max(0, math.floor(x)), min(width, math.ceil(x + w))
        top, bottom = max(0, math.floor(y)), min(height, math.ceil(y + h))
        if left < right and top < bottom:
            yield left, top, right, bottom
