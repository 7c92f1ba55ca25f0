"""Tiny objects: the paper's detectors, evaluation, tiling and Scale Match (extra `tiny`)."""

from alphafpn.tiny.detectors import tiny_faster_rcnn, tiny_retinanet
from alphafpn.tiny.erasing import EraseIgnored
from alphafpn.tiny.evaluation import evaluate_tiny, format_tiny
from alphafpn.tiny.scale_match import MonotoneScaleMatch, ScaleMatch, box_sizes
from alphafpn.tiny.tiling import cut_dataset, merge_detections, read_tile

__all__ = [
    "EraseIgnored",
    "MonotoneScaleMatch",
    "ScaleMatch",
    "box_sizes",
    "cut_dataset",
    "evaluate_tiny",
    "format_tiny",
    "merge_detections",
    "read_tile",
    "tiny_faster_rcnn",
    "tiny_retinanet",
]
