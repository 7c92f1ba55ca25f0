"""`AlphaEstimate`: fusion factors, with the counts they come from and how far to trust them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, overload

import msgspec
import torch

from alphafpn.estimate import picture, report
from alphafpn.estimate.checks import check_clamp, check_num_fused_levels
from alphafpn.estimate.level_statistics import IOU_BINS, LevelStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, repr=False)
class AlphaEstimate(LevelStatistics, Sequence[float]):
    """Fusion factors of a data set (S-alpha), with the counts they come from.

    Immutable; a sequence of the K-1 clamped factors, finest edge first: the first one weights the
    edge from the second-finest level into the finest.

    Attributes:
        counts: Boxes whose best-IoU anchor is on each level. With several input sizes a box counts
            once for each.
        moments: Sums over images of products of their counts, levels by levels.
        level_names: Finest level first.
        num_fused_levels: K.
        num_images: Images, with or without boxes.
        num_boxes: Boxes, once each.
        num_unmatched: Boxes that overlap no anchor; in no level's count.
        num_sizes: Input sizes that each image was counted at.
        clamp: (lower, upper) bound of the factors, or None.
        iou_histogram: Boxes by best IoU in hundredths; None where levels do not follow IoU.
        iou_sums: Per level, sum of best IoUs, in units of 2**-20.
        size_sum: Sum of sqrt(width * height) in pixels, in units of 2**-10.
        strides: Per level, in pixels, the largest over images; empty for irregular anchors.
        anchors_per_cell: Per level; empty for irregular anchors, or where images differ.
        left_out: Boxes of the data set that were not counted, by reason.
        num_clipped: Boxes that reached beyond their image by more than a pixel, and were clipped.
        detections_per_image: The detector's cap, where known.
        num_crowded: Images with more boxes than that cap.

    Examples:
        >>> from alphafpn import AnchorLayout, estimate_alpha
        >>> cell = torch.tensor([[-8.0, -8.0, 8.0, 8.0]])
        >>> layout = AnchorLayout([cell, 2 * cell], [8, 16], [(8, 8), (4, 4)], 2)
        >>> boxes = torch.tensor([[8.0, 8.0, 20.0, 22.0], [2, 2, 18, 16], [9, 9, 41, 40]])
        >>> estimate = estimate_alpha(layout, boxes)
        >>> estimate
        AlphaEstimate(alpha=(0.5), counts=(2, 1), num_images=1, num_boxes=3)
        >>> list(estimate), estimate.level_names, round(estimate.mean_size, 1)
        ([0.5], ('P3', 'P4'), 19.8)
    """

    def __repr__(self) -> str:
        """Shows the factors; `summary` has the rest."""
        name, values = ("ratios", self.ratios) if self.clamp is None else ("alpha", self.alpha)
        factors = ", ".join(f"{value:.4g}" for value in values)
        return (
            f"AlphaEstimate({name}=({factors}), counts={self.counts}, "
            f"num_images={self.num_images}, num_boxes={self.num_boxes})"
        )

    def __len__(self) -> int:
        return self.num_fused_levels - 1

    @overload
    def __getitem__(self, index: int) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[float, ...]: ...
    def __getitem__(self, index: int | slice) -> float | tuple[float, ...]:
        return self.alpha[index]

    def merge(self, other: AlphaEstimate) -> AlphaEstimate:
        """Adds two shards up as if counted together.

        Raises:
            TypeError: If `other` is no AlphaEstimate.
            ValueError: If they were counted on different levels or under different settings.
        """
        if not isinstance(other, AlphaEstimate):
            raise TypeError(f"an AlphaEstimate expected, found {type(other).__name__}")
        for name in (
            "level_names", "num_fused_levels", "num_sizes", "clamp", "detections_per_image",
        ):  # fmt: skip
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(f"cannot merge: {name} is {mine} here and {theirs} there")
        if (self.iou_histogram is None) != (other.iou_histogram is None):
            raise ValueError("cannot merge: levels follow IoU in one shard and not in the other")
        reasons = sorted({*self.left_out, *other.left_out})
        same_cells = self.anchors_per_cell == other.anchors_per_cell
        merged: dict[str, Any] = {
            "left_out": {r: self.left_out.get(r, 0) + other.left_out.get(r, 0) for r in reasons},
            # Empty where either is.
            "strides": tuple(max(pair) for pair in zip(self.strides, other.strides, strict=False)),
            "anchors_per_cell": self.anchors_per_cell if same_cells else (),
        }
        for name in (
            "counts", "moments", "iou_histogram", "iou_sums", "num_images", "num_boxes",
            "num_unmatched", "size_sum", "num_clipped", "num_crowded",
        ):  # fmt: skip
            merged[name] = _add(getattr(self, name), getattr(other, name))
        return replace(self, **merged)

    def all_reduce(self) -> AlphaEstimate:
        """Adds up the shards of all processes of the default `torch.distributed` group.

        Every process gets the estimate of all shards together; a shard may be empty. Without an
        initialised process group there is one shard, this one.
        """
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return self
        shards = [self] * distributed.get_world_size()
        distributed.all_gather_object(shards, self)
        return functools.reduce(AlphaEstimate.merge, shards)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as strict JSON: lists, and None for what is not finite."""
        result = asdict(self)
        result["ratios"] = self.ratios
        try:
            result["alpha"] = self.alpha
        except ValueError:
            result["alpha"] = None
        result["confidence_interval"] = self.confidence_interval()
        # msgspec writes null for what is not finite.
        return msgspec.json.decode(msgspec.json.encode(result), type=dict[str, Any])

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AlphaEstimate:
        """Reads what `to_dict` returned; derived entries are computed anew.

        Raises:
            TypeError: If `data` is no dict.
            ValueError: If an entry is missing or does not fit the others.
        """
        if not isinstance(data, dict):
            raise TypeError(f"a dict expected, found {type(data).__name__}")
        missing = [f.name for f in fields(cls) if f.name not in data]
        if missing:
            raise ValueError(f"the dict of an AlphaEstimate lacks {missing[0]!r}")
        try:
            estimate = msgspec.convert(data, type=cls)
        except msgspec.ValidationError as error:
            raise ValueError(f"the dict of an AlphaEstimate: {error}") from None
        num_levels = len(estimate.counts)
        lengths = {
            "level_names": {len(estimate.level_names)},
            "moments": {len(estimate.moments), *map(len, estimate.moments)},
            "iou_sums": {len(estimate.iou_sums)},
            "strides": {len(estimate.strides) or num_levels},
            "anchors_per_cell": {len(estimate.anchors_per_cell) or num_levels},
        }
        for name, found in lengths.items():
            if found != {num_levels}:
                raise ValueError(f"{name}: {num_levels} entries expected, found {sorted(found)}")
        if estimate.iou_histogram is not None and len(estimate.iou_histogram) != IOU_BINS:
            raise ValueError(
                f"iou_histogram: {IOU_BINS} entries expected, found {len(estimate.iou_histogram)}"
            )
        check_num_fused_levels(estimate.num_fused_levels, num_levels)
        check_clamp(estimate.clamp)
        return estimate

    def summary(self) -> str:
        """Returns the table a person reads: levels, objects, factors, and what to be wary of."""
        return report.summary(self)

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draws objects per level and the factors between them (needs the extra `plot`).

        Args:
            axes: Matplotlib axes to draw on; new ones by default.
        """
        return picture.plot(self, axes)


def _add(x: Any, y: Any) -> Any:
    """Adds numbers, or nested tuples of them element by element."""
    if isinstance(x, tuple):
        return tuple(_add(a, b) for a, b in zip(x, y, strict=True))
    return None if x is None else x + y
