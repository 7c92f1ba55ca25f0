"""Eq. 2: what was counted on the levels, and the ratios, factors and intervals that follow."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Annotated

import msgspec
import numpy as np

# IoU and object size are summed in whole units of these, so that sums of shards are exact.
IOU_UNIT = 2.0**-20
SIZE_UNIT = 2.0**-10
# Bins of one hundredth: the last one holds IoU 1.
IOU_BINS = 101

Count = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True)
class LevelStatistics:
    """What was counted on the levels of a pyramid, and Eq. 2; the base of `AlphaEstimate`.

    The docstring of `AlphaEstimate` explains the attributes.
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
        """Returns raw Eq. 2: `N[i+1] / N[i]`; the last numerator adds the extra levels.

        0 / 0 is nan and x / 0 is inf.
        """
        return tuple(_ratio(x, y) for x, y in self._fractions())

    @property
    def alpha(self) -> tuple[float, ...]:
        """Returns the factors: ratios within `clamp`; 1 where nothing was counted on either side.

        Raises:
            ValueError: Without a clamp, where a level has no boxes to divide by.
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

    @property
    def mean_size(self) -> float:
        """Returns the mean sqrt(width * height) in pixels of the network's input, or nan."""
        return _ratio(self.size_sum * SIZE_UNIT, self.num_boxes * self.num_sizes)

    @property
    def mean_iou(self) -> tuple[float, ...]:
        """Returns the mean best IoU of the boxes on each level; nan where there are none."""
        return tuple(
            _ratio(s * IOU_UNIT, n) for s, n in zip(self.iou_sums, self.counts, strict=True)
        )

    def confidence_interval(
        self, confidence_level: float = 0.95
    ) -> tuple[tuple[float, float], ...]:
        """Computes (low, high) for each raw ratio.

        Delta method for the logarithm of a ratio of sums, with images as the independent units.
        (0, inf) where a count is 0 or there are fewer than two images.

        Raises:
            ValueError: If `confidence_level` is not between 0 and 1.
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
            with np.errstate(over="ignore"):  # beyond the largest float a bound tells nothing
                spread = float(np.exp(half))
            result.append((ratio / spread, ratio * spread))
        return tuple(result)

    def recall(self, iou: float) -> float:
        """Returns the share of boxes whose best anchor reaches `iou` (in [0, 1], resolution 0.01).

        Raises:
            ValueError: If `iou` is outside [0, 1], or levels do not follow IoU (FCOS).
        """
        if not 0 <= iou <= 1:
            raise ValueError(f"iou: in [0, 1] expected, found {iou}")
        if self.iou_histogram is None:
            raise ValueError("levels of this detector follow regression ranges, not IoU")
        reached = sum(self.iou_histogram[math.ceil(iou * 100 - 1e-6) :])
        return _ratio(reached, self.num_boxes * self.num_sizes)

    def _fractions(self) -> list[tuple[int, int]]:
        """Returns numerator and denominator of each ratio (Algorithm 1, lines 12 to 17)."""
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
