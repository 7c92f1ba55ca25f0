"""`AlphaEstimate`: counts per level, the factors they give (Eq. 2), and how far to trust these."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Annotated, Any, overload

import msgspec
import numpy as np

from alphafpn.estimate import report, shards
from alphafpn.estimate.checks import DEFAULT_CLAMP, check_clamp, check_num_fused_levels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The size of objects is summed in whole units of this, so that sums of shards are exact.
SIZE_UNIT = 2.0**-10
# Bins of one hundredth: the last one holds IoU 1.
IOU_BINS = 101

Count = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True, repr=False)
class AlphaEstimate(Sequence[float]):
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
        iou_histogram: Boxes by best IoU in hundredths; None if levels do not follow IoU.
        reached: Boxes on each level whose best IoU is .5 or more; empty if levels do not follow
            IoU.
        size_sum: Sum of sqrt(width * height) in pixels, in units of 2**-10.
        strides: Per level, in pixels, the largest over images; empty for irregular anchors.
        anchors_per_cell: Per level; empty for irregular anchors, or if images differ.
        left_out: Boxes of the data set that were not counted, by reason.
        num_clipped: Boxes that reached beyond their image by more than a pixel, and were clipped.
        num_fit_swapped: Of these and of the boxes outside their image, how many would fit it with
            width and height swapped.
        notes: What else was noticed in the data set, with the number of boxes concerned.
        detections_per_image: The detector's cap, if known.
        num_crowded: Images with more boxes than that cap.

    Raises:
        TypeError: If `num_fused_levels` or `clamp` has the wrong type.
        ValueError: If the attributes do not fit together; the message names one.

    Examples:
        >>> import torch
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

    counts: tuple[Count, ...]
    moments: tuple[tuple[Count, ...], ...]
    level_names: tuple[str, ...]
    num_fused_levels: int
    num_images: Count
    num_boxes: Count
    num_unmatched: Count
    num_sizes: Count = 1
    clamp: tuple[float, float] | None = DEFAULT_CLAMP
    iou_histogram: tuple[Count, ...] | None = None
    reached: tuple[Count, ...] = ()
    size_sum: Count = 0
    strides: tuple[float, ...] = ()
    anchors_per_cell: tuple[Count, ...] = ()
    left_out: dict[str, Count] = field(default_factory=dict, hash=False)
    num_clipped: Count = 0
    num_fit_swapped: Count = 0
    notes: dict[str, Count] = field(default_factory=dict, hash=False)
    detections_per_image: Count | None = None
    num_crowded: Count = 0

    def __post_init__(self) -> None:
        num_levels = len(self.counts)
        expected = {
            "moments": [num_levels],
            "level_names": [num_levels],
            "iou_histogram": [IOU_BINS],
            "reached": [0, num_levels],
            "strides": [0, num_levels],
            "anchors_per_cell": [0, num_levels],
        }
        for name, lengths in expected.items():
            part = getattr(self, name)
            if part is not None and len(part) not in lengths:
                raise ValueError(f"{name}: expected {lengths[-1]} entries, found {len(part)}")
        for i, row in enumerate(self.moments):
            if len(row) != num_levels:
                raise ValueError(f"moments[{i}]: expected {num_levels} entries, found {len(row)}")
        check_num_fused_levels(self.num_fused_levels, num_levels)
        check_clamp(self.clamp)

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

    @property
    def ratios(self) -> tuple[float, ...]:
        """Returns raw Eq. 2: `N[i+1] / N[i]`; the last numerator adds the extra levels.

        0 / 0 is nan and x / 0 is inf.
        """
        return tuple(_ratio(x, y) for x, y in self._fractions())

    @property
    def alpha(self) -> tuple[float, ...]:
        """Returns the factors: ratios within `clamp`; 1 for 0 / 0.

        Raises:
            ValueError: Without a clamp, if a level has no boxes to divide by.
        """
        if self.clamp is None:
            for i, (_, denominator) in enumerate(self._fractions()):
                if denominator == 0:
                    raise ValueError(
                        f"alpha: expected boxes on {self.level_names[i]}, since the factor into it "
                        "divides by their number, found counts "
                        f"{dict(zip(self.level_names, self.counts, strict=True))}. Give a clamp."
                    )
            return self.ratios
        low, high = self.clamp
        return tuple(1.0 if math.isnan(r) else min(max(r, low), high) for r in self.ratios)

    @property
    def mean_size(self) -> float:
        """Returns the mean sqrt(width * height) in pixels of the network's input, or nan."""
        return _ratio(self.size_sum * SIZE_UNIT, self.num_boxes * self.num_sizes)

    def confidence_interval(
        self, confidence_level: float = 0.95
    ) -> tuple[tuple[float, float], ...]:
        """Computes (low, high) for each raw ratio.

        Delta method for the logarithm of a ratio of sums, with images as the independent units.
        (0, inf) if a count is 0 or there are fewer than two images.

        Raises:
            ValueError: If `confidence_level` is not between 0 and 1.
        """
        if not 0 < confidence_level < 1:
            raise ValueError(
                f"confidence_level: expected a number between 0 and 1, found {confidence_level}"
            )
        z = NormalDist().inv_cdf(0.5 + confidence_level / 2)
        moments = np.array(self.moments, np.float64)
        result = []
        for i, (x, y) in enumerate(self._fractions()):
            if x == 0 or y == 0 or self.num_images < 2:
                result.append((0.0, math.inf))
                continue
            # An image's part in the logarithm of x / y, for each of its boxes on a level.
            part = np.zeros(len(self.counts))
            part[self._upper_levels(i)] = 1 / x
            part[i] = -1 / y
            variance = float(part @ moments @ part) * self.num_images / (self.num_images - 1)
            with np.errstate(over="ignore"):  # beyond the largest float a bound tells nothing
                spread = float(np.exp(z * math.sqrt(max(variance, 0.0))))
            result.append((x / y / spread, x / y * spread))
        return tuple(result)

    def recall(self, iou: float) -> float:
        """Returns the share of boxes whose best anchor reaches `iou` (in [0, 1], resolution 0.01).

        Raises:
            ValueError: If `iou` is outside [0, 1], or levels do not follow IoU (FCOS).
        """
        if not 0 <= iou <= 1:
            raise ValueError(f"iou: expected a number from 0 to 1, found {iou}")
        if self.iou_histogram is None:
            raise ValueError(
                "recall: expected levels that follow IoU, found a detector whose levels follow "
                "regression ranges"
            )
        reached = sum(self.iou_histogram[math.ceil(iou * 100 - 1e-6) :])
        return _ratio(reached, self.num_boxes * self.num_sizes)

    def _fractions(self) -> list[tuple[int, int]]:
        """Returns numerator and denominator of each ratio (Algorithm 1, lines 12 to 17)."""
        edges = range(self.num_fused_levels - 1)
        return [(sum(self.counts[self._upper_levels(i)]), self.counts[i]) for i in edges]

    def _upper_levels(self, i: int) -> slice:
        """Returns the levels in the numerator of ratio `i`; the last one adds the extra levels."""
        return slice(i + 1, None if i == self.num_fused_levels - 2 else i + 2)

    def merge(self, other: AlphaEstimate) -> AlphaEstimate:
        """Adds two shards up as if counted together.

        Levels keep the names of the shard with the larger strides, that is, the larger images:
        levels of small images may have strides that are no powers of two.

        Raises:
            TypeError: If `other` is no AlphaEstimate.
            ValueError: If they were counted on different levels or under different settings.
        """
        if not isinstance(other, AlphaEstimate):
            raise TypeError(f"other: expected an AlphaEstimate, found {type(other).__name__}")
        for name in ("num_fused_levels", "num_sizes", "clamp", "detections_per_image"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(f"other: expected {name} {mine}, found {theirs}")
        if (self.iou_histogram is None) != (other.iou_histogram is None):
            raise ValueError("other: expected levels that follow IoU in both shards or in neither")
        # Without images, strides are unknown.
        known = [e for e in (self, other) if e.num_images] or [self]
        larger = max(known, key=lambda e: (e.strides, e.level_names))
        # Small images may change all strides but the finest.
        finest = {e.strides[:1] or e.level_names for e in known}
        if len(self.counts) != len(other.counts) or len(finest) > 1:
            raise ValueError(
                f"other: expected levels {self.level_names}, found {other.level_names}"
            )
        cells = {e.anchors_per_cell for e in known}
        merged: dict[str, Any] = {
            "level_names": larger.level_names,
            "strides": tuple(map(max, zip(*(e.strides for e in known), strict=True))),
            "anchors_per_cell": cells.pop() if len(cells) == 1 else (),
        }
        for name in (
            "counts", "moments", "iou_histogram", "reached", "num_images", "num_boxes",
            "num_unmatched", "size_sum", "left_out", "num_clipped", "num_fit_swapped", "notes",
            "num_crowded",
        ):  # fmt: skip
            merged[name] = _add(getattr(self, name), getattr(other, name))
        return replace(self, **merged)

    def all_reduce(self) -> AlphaEstimate:
        """Adds up the shards of all processes of the default `torch.distributed` group.

        Every process gets the estimate of all shards together; a shard may be empty. Without a
        process group there is one shard, this one.

        Examples:
            On each of several processes::

                estimate_alpha_for(model, items[rank::world_size]).all_reduce()

        Raises:
            RuntimeError: If `estimate_alpha` or `estimate_alpha_for` failed on another process
                instead; the message has its error. The process group should not be used further.
        """
        if not shards.is_shard():
            return self
        return functools.reduce(
            AlphaEstimate.merge, map(self.from_dict, shards.exchange(self.to_dict()))
        )

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
            raise TypeError(f"data: expected a dict, found {type(data).__name__}")
        missing = [f.name for f in fields(cls) if f.name not in data]
        if missing:
            raise ValueError(f"data: expected an entry {missing[0]!r}, found none")
        try:
            return msgspec.convert(data, type=cls)
        except msgspec.ValidationError as error:
            raise ValueError(
                f"data: expected the dict of an AlphaEstimate, found {error}"
            ) from None

    def summary(self) -> str:
        """Returns the table that a person reads: levels, factors, warnings and advice."""
        return report.summary(self)

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draws objects per level and the factors between them (needs the extra `plot`).

        Args:
            axes: Matplotlib axes to draw on; new ones by default.
        """
        return report.plot(self, axes)


def _ratio(x: float, y: float) -> float:
    if y:
        return x / y
    return math.inf if x else math.nan


def _add(x: Any, y: Any) -> Any:
    """Adds numbers, tuples element by element, and dicts by key; None stays None."""
    if isinstance(x, dict):
        return {key: x.get(key, 0) + y.get(key, 0) for key in sorted({*x, *y})}
    if isinstance(x, tuple):
        return tuple(map(_add, x, y))
    return None if x is None else x + y
