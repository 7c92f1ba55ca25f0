"""Boxes and anchors -> fusion factors. Nothing here knows a pyramid or changes a model."""

from alphafpn.estimate.alpha_estimate import AlphaEstimate
from alphafpn.estimate.anchor_layout import AnchorLayout
from alphafpn.estimate.s_alpha import estimate_alpha, estimate_alpha_for

__all__ = [
    "AlphaEstimate",
    "AnchorLayout",
    "estimate_alpha",
    "estimate_alpha_for",
]
