"""Boxes and anchors -> fusion factors. Nothing here knows a pyramid or changes a model."""

from alphafpn.estimate.anchors.layout import AnchorLayout
from alphafpn.estimate.compare import compare_anchors
from alphafpn.estimate.for_anchors import estimate_alpha
from alphafpn.estimate.for_detector import estimate_alpha_for
from alphafpn.estimate.result.alpha_estimate import AlphaEstimate

__all__ = [
    "AlphaEstimate",
    "AnchorLayout",
    "compare_anchors",
    "estimate_alpha",
    "estimate_alpha_for",
]
