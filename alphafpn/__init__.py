"""Fusion factors for torchvision's feature pyramids (Gong et al., WACV 2021)."""

__version__ = "0.1.0"
