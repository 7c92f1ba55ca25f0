"""Scale Match as transforms for `torchvision.transforms.v2`.

Scale Match resizes the images of a pre-training dataset so that its objects become as small as
those of the dataset to train on later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as F  # noqa: N812

from alphafpn.tiny import _coco
from alphafpn.tiny._box_transform import BoxTransform, to_xywh

_Floats: TypeAlias = NDArray[np.float64]

_BINS = 100
_TAIL = 0.01  # share of the sizes in the first and in the last bin
_DRAWS = 5
_SLACK = 1e-6


def box_sizes(dataset: _coco.Source | Mapping[str, Any]) -> Tensor:
    """Lists the sizes that Scale Match compares: square roots of box areas in a dataset.

    Args:
        dataset: COCO dict with `images` and `annotations`, or the path to one as JSON.

    Returns:
        `sqrt(w * h)` in pixels, `[N]` in float64. Boxes marked `iscrowd` or `ignore` and boxes
        without area are left out; so are broken annotations, with a warning.

    Raises:
        ValueError: If the data is no COCO data set.

    Examples:
        >>> person = {"image_id": 1, "bbox": [5, 5, 4, 9]}
        >>> crowd = {"image_id": 1, "bbox": [0, 0, 8, 8], "ignore": True}
        >>> box_sizes({"images": [{"id": 1}], "annotations": [person, crowd]})
        tensor([6.], dtype=torch.float64)
    """
    _, columns, _ = _coco.read(dataset, "dataset", need_sizes=False)
    boxes = columns.boxes[columns.reasons == 0]
    sizes = np.sqrt(boxes[:, 2] * boxes[:, 3])
    return torch.from_numpy(sizes[sizes > 0])


class ScaleMatch(BoxTransform):
    """Resizes each image so that the mean size of its objects is drawn from the target's sizes.

    The mean is the geometric mean of sqrt(w * h) over the image's boxes. Sizes are drawn from the
    rectified histogram of the target: one bin for the smallest 1 %, one for the largest 1 %, and 98
    bins of equal width for the rest; within a bin sizes are uniform. While the resulting scale is
    outside `scale_range`, the size is drawn again, up to five times in all.

    Boxes that end up with a side below 2 pixels are dropped. Sides are counted inclusively, as in
    the paper's code: one of w pixels becomes (w - 1) * scale + 1. If no box is left, or there was
    none, the image is resized by `default_scale` instead and keeps all of its boxes.

    Dropped boxes take their entries with them: those of tensors, arrays, lists and tuples under
    `labels`, `scores`, `masks`, `keypoints`, `area`, `iscrowd`, `ignore`, `uncertain`, `logo`,
    `difficult`, `truncated`, `occluded`, the fields of COCO annotations, and the keys in `per_box`.
    Nothing else is cut, even if it has as many entries as there are boxes.

    Use it in place of a resize. Samples are as for all v2 transforms; boxes are
    `tv_tensors.BoundingBoxes` in a dict, the target. As in `v2.Resize`, tv_tensors are resized and
    plain tensors, such as an `area`, are not; images are interpolated bilinearly, with
    antialiasing. Random numbers come from torch.

    Args:
        target_sizes: sqrt(w * h) of the target dataset's boxes in pixels, `[N]`; `box_sizes` reads
            them from annotations.
        scale_range: Bounds of the scale; the default is the paper's for pre-training on COCO.
        default_scale: Scale of images without a usable box.
        out_of_range: What to do if all draws are outside the range: `"clip"` the last scale to it,
            or use the `"default"` scale.
        per_box: Further keys of the target with one entry per box.

    Raises:
        TypeError: If a sample has no image, or its boxes are not `BoundingBoxes`.
        ValueError: If an argument is out of range, or if boxes are rotated, inverted or not finite.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> from torchvision.tv_tensors import BoundingBoxes
        >>> boxes = BoundingBoxes([[0, 0, 160, 90]], format="XYXY", canvas_size=(100, 200))
        >>> image, target = ScaleMatch([30.0] * 50)(torch.zeros(3, 100, 200), {"boxes": boxes})
        >>> image.shape, target["boxes"].tolist()
        (torch.Size([3, 25, 50]), [[0, 0, 40, 22]])
    """

    def __init__(
        self,
        target_sizes: ArrayLike | Tensor,
        *,
        scale_range: tuple[float, float] = (0.1, 1.0),
        default_scale: float = 0.25,
        out_of_range: Literal["clip", "default"] = "clip",
        per_box: Sequence[str] = (),
    ) -> None:
        super().__init__(per_box)
        low, high = scale_range
        if not 0 <= low < high < math.inf:
            raise ValueError(f"scale_range: expected 0 <= low < high < inf, found {scale_range}")
        if not 0 < default_scale < math.inf:
            raise ValueError(f"default_scale: expected a positive number, found {default_scale}")
        if out_of_range not in ("clip", "default"):
            raise ValueError(f"out_of_range: expected 'clip' or 'default', found {out_of_range!r}")
        self.scale_range = scale_range
        self.default_scale = default_scale
        self.out_of_range = out_of_range
        self._edges, self._cumulative = _rectified_histogram(_sizes("target_sizes", target_sizes))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Chooses `scale`, the new (height, width) as `size`, and which boxes are `kept`, `[N]`."""
        image, boxes, _ = flat_inputs
        height, width = F.get_size(image)
        sides = to_xywh(boxes)[:, 2:]
        sizes = sides.prod(1).sqrt()
        sizes = sizes[sizes > 0]
        if len(sizes):
            scale = self._scale(sizes.log().mean().exp().item())
            size = _resized(height, width, scale)
            # (w - 1) * scale + 1 >= 2, with the scales after rounding to whole pixels.
            kept = ((sides - 1) * sides.new_tensor([size[1] / width, size[0] / height]) >= 1).all(1)
            if kept.any():
                return {"scale": scale, "size": size, "kept": kept}
        size = _resized(height, width, self.default_scale)
        kept = torch.ones(len(sides), dtype=torch.bool)
        return {"scale": self.default_scale, "size": size, "kept": kept}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resizes an image, boxes or masks."""
        return F.resize(inpt, params["size"])

    def _scale(self, mean_size: float) -> float:
        low, high = self.scale_range
        for _ in range(_DRAWS):
            scale = self._target_size() / mean_size
            if low < scale < high:
                break
        return self._bounded(scale)

    def _bounded(self, scale: float) -> float:
        low, high = self.scale_range
        if low < scale < high:
            return scale
        return min(max(scale, low), high) if self.out_of_range == "clip" else self.default_scale

    def _target_size(self) -> float:
        chosen, inside = torch.rand(2, dtype=torch.float64).tolist()
        index = int(np.searchsorted(self._cumulative + _SLACK, chosen))
        low, high = self._edges[index : index + 2].tolist()
        return float(low + inside * (high - low))


class MonotoneScaleMatch(ScaleMatch):
    """Resizes as `ScaleMatch` does, but without chance: larger objects stay larger.

    The mean size of an image's objects is a quantile of the source's sizes, and becomes the same
    quantile of the target's sizes, linearly within each bin of the target's histogram. The scale is
    then clipped to `scale_range`. Everything else is as in `ScaleMatch`.

    Our choice, since neither paper nor code says it: means outside the source's sizes are mapped as
    its smallest or largest size; if more of the source than one bin holds has the smallest size,
    this size is mapped to the target's smallest.

    Args:
        source_sizes: sqrt(w * h) of the boxes of the dataset to transform, in pixels, `[N]`.
        target_sizes: The same of the target dataset.
        scale_range: As in `ScaleMatch`.
        default_scale: As in `ScaleMatch`.
        out_of_range: As in `ScaleMatch`; the `"default"` scale is not monotone.
        per_box: As in `ScaleMatch`.

    Raises:
        TypeError: As in `ScaleMatch`.
        ValueError: As in `ScaleMatch`.

    Examples:
        >>> from torchvision.tv_tensors import BoundingBoxes
        >>> shrink = MonotoneScaleMatch([240.0] * 50, [30.0] * 50)
        >>> boxes = BoundingBoxes([[0, 0, 240, 240]], format="XYXY", canvas_size=(240, 400))
        >>> image, target = shrink(torch.zeros(3, 240, 400), {"boxes": boxes})
        >>> tuple(image.shape), target["boxes"].tolist()
        ((3, 30, 50), [[0, 0, 30, 30]])
    """

    def __init__(
        self,
        source_sizes: ArrayLike | Tensor,
        target_sizes: ArrayLike | Tensor,
        *,
        scale_range: tuple[float, float] = (0.1, 1.0),
        default_scale: float = 0.25,
        out_of_range: Literal["clip", "default"] = "clip",
        per_box: Sequence[str] = (),
    ) -> None:
        super().__init__(
            target_sizes,
            scale_range=scale_range,
            default_scale=default_scale,
            out_of_range=out_of_range,
            per_box=per_box,
        )
        ordered = np.sort(_sizes("source_sizes", source_sizes))
        ranks = (self._cumulative * len(ordered)).astype(np.int64)
        quantiles = ordered[np.minimum(ranks, len(ordered) - 1)]
        self._source_edges = np.concatenate([ordered[:1], quantiles])

    def _scale(self, mean_size: float) -> float:
        edges = self._source_edges
        size = min(max(mean_size, edges[0]), edges[-1])
        index = int(np.searchsorted(edges[1:] + _SLACK, size))
        width = edges[index + 1] - edges[index]
        part = min((size - edges[index]) / width, 1.0) if width > 0 else 0.0
        low, high = self._edges[index : index + 2].tolist()
        return self._bounded(float(low + part * (high - low)) / mean_size)


def _rectified_histogram(sizes: _Floats) -> tuple[_Floats, _Floats]:
    """Returns the edges of the bins, `[K + 1]`, and cumulative shares of the sizes, `[K]`."""
    ordered, total = np.sort(sizes), len(sizes)
    low, high = int(total * _TAIL), int(total * (1 - _TAIL))
    # Unlike a number of bins, edges also work for equal sizes: the bins have no width.
    inner = np.linspace(ordered[low], ordered[max(high - 1, low)], _BINS - 1)
    counts, _ = np.histogram(ordered[low:high], inner)
    edges = np.concatenate([ordered[:1], inner, ordered[-1:]])
    return edges, np.cumsum(np.concatenate([[low], counts, [total - high]]) / total)


def _sizes(name: str, sizes: ArrayLike | Tensor) -> _Floats:
    array = np.asarray(torch.as_tensor(sizes, dtype=torch.float64, device="cpu"))
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name}: expected shape [N] with N > 0, found {list(array.shape)}")
    good = np.isfinite(array) & (array > 0)
    if not good.all():
        index = int(np.argmin(good))
        raise ValueError(f"{name}[{index}]: expected a positive number, found {array[index]}")
    return array


def _resized(height: int, width: int, scale: float) -> list[int]:
    return [max(1, round(scale * height)), max(1, round(scale * width))]
