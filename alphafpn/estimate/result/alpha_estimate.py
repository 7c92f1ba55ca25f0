"""`AlphaEstimate`: fusion factors, with the counts they come from and how far to trust them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import NormalDist
from typing import TYPE_CHECKING, Annotated, Any, overload

import msgspec
import torch

from alphafpn.estimate.anchors.layout import check_num_fused_levels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# IoU and object size are summed in whole units of these, so that sums of shards are exact.
IOU_UNIT = 2.0**-20
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
        counts: boxes whose best-IoU anchor is on each level. With several input sizes a box counts
            once for each.
        moments: sums over images of products of their counts, levels by levels.
        level_names: finest level first.
        num_fused_levels: K.
        num_images: images, with or without boxes.
        num_boxes: boxes, once each.
        num_unmatched: boxes that overlap no anchor; in no level's count.
        num_sizes: input sizes that each image was counted at.
        clamp: (lower, upper) bound of the factors, or None.
        iou_histogram: boxes by best IoU in hundredths; None where levels do not follow IoU.
        iou_sums: per level, sum of best IoUs, in units of 2**-20.
        size_sum: sum of sqrt(width * height) in pixels, in units of 2**-10.
        strides: per level, in pixels, the largest over images; empty for irregular anchors.
        anchors_per_cell: per level; empty for irregular anchors, or where images differ.
        left_out: boxes of the data set that were not counted, by reason.
        num_clipped: boxes that reached beyond their image by more than a pixel, and were clipped.
        detections_per_image: the detector's cap, where known.
        num_crowded: images with more boxes than that cap.
    """

    counts: tuple[Count, ...]
    moments: tuple[tuple[Count, ...], ...]
    level_names: tuple[str, ...]
    num_fused_levels: int
    num_images: Count
    num_boxes: Count
    num_unmatched: Count
    num_sizes: Count = 1
    clamp: tuple[float, float] | None = (0.2, 2.0)
    iou_histogram: tuple[Count, ...] | None = None
    iou_sums: tuple[Count, ...] = ()
    size_sum: Count = 0
    strides: tuple[float, ...] = ()
    anchors_per_cell: tuple[Count, ...] = ()
    left_out: dict[str, Count] = field(default_factory=dict, hash=False)
    num_clipped: Count = 0
    detections_per_image: Count | None = None
    num_crowded: Count = 0

    @property
    def ratios(self) -> tuple[float, ...]:
        """Raw Eq. 2: ``N[i+1] / N[i]``; the last numerator adds the extra levels.

        0 / 0 is nan and x / 0 is inf.
        """
        return tuple(_ratio(x, y) for x, y in self._fractions())

    @property
    def alpha(self) -> tuple[float, ...]:
        """The factors: ratios within `clamp`; 1 where nothing was counted on either side.

        Raises:
            ValueError: without a clamp, where a level has no boxes to divide by.
        """
        if self.clamp is None:
            for i, (_, denominator) in enumerate(self._fractions()):
                if denominator == 0:
                    raise ValueError(
                        f"no boxes on {self.level_names[i]}, so the factor into it is not "
                        f"finite; counts {dict(zip(self.level_names, self.counts, strict=True))}. "
                        "Give a clamp."
                    )
            return self.ratios
        low, high = self.clamp
        return tuple(1.0 if math.isnan(r) else min(max(r, low), high) for r in self.ratios)

    def __repr__(self) -> str:
        """Short; `summary` has the rest."""
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
    def mean_size(self) -> float:
        """Mean of sqrt(width * height) at the network's input, in pixels; nan without boxes."""
        return _ratio(self.size_sum * SIZE_UNIT, self.num_boxes * self.num_sizes)

    @property
    def mean_iou(self) -> tuple[float, ...]:
        """Mean best IoU of the boxes on each level; nan where there are none."""
        return tuple(
            _ratio(s * IOU_UNIT, n) for s, n in zip(self.iou_sums, self.counts, strict=True)
        )

    def confidence_interval(
        self, confidence_level: float = 0.95
    ) -> tuple[tuple[float, float], ...]:
        """(low, high) for each raw ratio.

        Delta method for the logarithm of a ratio of sums, with images as the independent units.
        (0, inf) where a count is 0 or there are fewer than two images.

        Raises:
            ValueError: if `confidence_level` is not between 0 and 1.
        """
        if not 0 < confidence_level < 1:
            raise ValueError(f"confidence_level: in (0, 1) expected, found {confidence_level}")
        z = NormalDist().inv_cdf(0.5 + confidence_level / 2)
        result = []
        for i, (x, y) in enumerate(self._fractions()):
            if x == 0 or y == 0 or self.num_images < 2:
                result.append((0.0, math.inf))
                continue
            upper = range(i + 1, self._numerator_end(i))
            xx = sum(self.moments[a][b] for a in upper for b in upper)
            xy = sum(self.moments[a][i] for a in upper)
            yy = self.moments[i][i]
            variance = xx / x**2 - 2 * xy / (x * y) + yy / y**2
            variance *= self.num_images / (self.num_images - 1)
            half = z * math.sqrt(max(variance, 0.0))
            ratio = x / y
            # Beyond the largest float a bound tells nothing.
            spread = math.exp(half) if half < 700 else math.inf
            result.append((ratio / spread, ratio * spread))
        return tuple(result)

    def recall(self, iou: float) -> float:
        """Share of boxes whose best anchor reaches `iou` (in [0, 1], resolution 0.01).

        Raises:
            ValueError: if `iou` is outside [0, 1], or levels do not follow IoU (FCOS).
        """
        if not 0 <= iou <= 1:
            raise ValueError(f"iou: in [0, 1] expected, found {iou}")
        if self.iou_histogram is None:
            raise ValueError("levels of this detector follow regression ranges, not IoU")
        reached = sum(self.iou_histogram[math.ceil(iou * 100 - 1e-6) :])
        return _ratio(reached, self.num_boxes * self.num_sizes)

    def merge(self, other: AlphaEstimate) -> AlphaEstimate:
        """Both shards as if counted together.

        Raises:
            TypeError: if `other` is no AlphaEstimate.
            ValueError: if they were counted on different levels or under different settings.
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
        rest: dict[str, Any] = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in merged
        }
        return AlphaEstimate(**rest, **merged)

    def all_reduce(self) -> AlphaEstimate:
        """The same over all processes of the default `torch.distributed` group.

        Every process gets the estimate of all shards together; a shard may be empty. Without an
        initialised process group there is one shard, this one.
        """
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return self
        shards: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(shards, self.to_dict())
        result = AlphaEstimate.from_dict(shards[0])
        for shard in shards[1:]:
            result = result.merge(AlphaEstimate.from_dict(shard))
        return result

    def to_dict(self) -> dict[str, Any]:
        """Everything as strict JSON: lists, and None for what is not finite."""
        result = {name: _jsonable(value) for name, value in asdict(self).items()}
        result["ratios"] = _jsonable(self.ratios)
        try:
            result["alpha"] = list(self.alpha)
        except ValueError:
            result["alpha"] = None
        result["confidence_interval"] = _jsonable(self.confidence_interval())
        return result

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AlphaEstimate:
        """The inverse of `to_dict`; derived entries are computed anew.

        Raises:
            TypeError: if `data` is no dict.
            ValueError: if an entry is missing or does not fit the others.
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
        """The table a person reads: levels, objects, factors, and what to be wary of."""
        from alphafpn.estimate.result.report import summary

        return summary(self)

    def plot(self, axes: Axes | None = None) -> Axes:
        """Objects per level and the factors between them (needs the extra ``plot``).

        Args:
            axes: matplotlib axes to draw on; new ones by default.
        """
        from alphafpn.estimate.result.picture import plot_estimate

        return plot_estimate(self, axes)

    def _fractions(self) -> list[tuple[int, int]]:
        """Numerator and denominator of each ratio (Algorithm 1, lines 12 to 17)."""
        return [
            (sum(self.counts[i + 1 : self._numerator_end(i)]), self.counts[i])
            for i in range(self.num_fused_levels - 1)
        ]

    def _numerator_end(self, i: int) -> int:
        last = i == self.num_fused_levels - 2
        return len(self.counts) if last else i + 2


def _ratio(x: float, y: float) -> float:
    if y:
        return x / y
    return math.inf if x else math.nan


def _add(x: Any, y: Any) -> Any:
    """Sum of numbers, or of nested tuples of them element by element."""
    if isinstance(x, tuple):
        return tuple(_add(a, b) for a, b in zip(x, y, strict=True))
    return None if x is None else x + y


def _jsonable(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def check_clamp(clamp: Any) -> tuple[float, float] | None:
    """`clamp` as two floats.

    Raises:
        TypeError: if it is not None or a pair of numbers.
        ValueError: unless 0 <= lower <= upper < inf.
    """
    if clamp is None:
        return None
    try:
        low, high = (float(bound) for bound in clamp)
    except (TypeError, ValueError):
        raise TypeError(f"clamp: None or (lower, upper) expected, found {clamp!r}") from None
    if not 0 <= low <= high < math.inf:
        raise ValueError(f"clamp: 0 <= lower <= upper < inf expected, found {clamp!r}")
    return low, high
