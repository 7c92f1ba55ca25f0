"""Fusion factors for torchvision's feature pyramids (Gong et al., WACV 2021)."""

from alphafpn.adapt import AnchorFit, adapt_detector
from alphafpn.comparison import AnchorComparison, compare_anchors
from alphafpn.estimate import AlphaEstimate, AnchorLayout, estimate_alpha, estimate_alpha_for
from alphafpn.gradients import gradient_shares
from alphafpn.pyramid import (
    AlphaFeaturePyramidNetwork,
    AttentionAlpha,
    LearnableAlpha,
    alpha_parameters,
)
from alphafpn.surgery import fold_alpha, patch_detector, unpatch_detector

__all__ = [
    "AlphaEstimate",
    "AlphaFeaturePyramidNetwork",
    "AnchorComparison",
    "AnchorFit",
    "AnchorLayout",
    "AttentionAlpha",
    "LearnableAlpha",
    "adapt_detector",
    "alpha_parameters",
    "compare_anchors",
    "estimate_alpha",
    "estimate_alpha_for",
    "fold_alpha",
    "gradient_shares",
    "patch_detector",
    "unpatch_detector",
]

__version__ = "0.2.0"
