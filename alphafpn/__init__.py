"""Fusion factors for torchvision's feature pyramids (Gong et al., WACV 2021)."""

from alphafpn.anchors import AnchorLayout
from alphafpn.estimate import AlphaEstimate
from alphafpn.pipeline import estimate_alpha_for
from alphafpn.statistics import estimate_alpha

__all__ = [
    "AlphaEstimate",
    "AnchorLayout",
    "estimate_alpha",
    "estimate_alpha_for",
]

__version__ = "0.1.0"
