"""The paper's other detectors, with the manner of `alphafpn.tiny.tiny_retinanet`."""

from benchmarks.paper.detectors.fcos import tiny_fcos
from benchmarks.paper.detectors.free_anchor import free_anchor
from benchmarks.paper.detectors.grid_rcnn import grid_rcnn
from benchmarks.paper.detectors.libra_rcnn import libra_rcnn

__all__ = ["free_anchor", "grid_rcnn", "libra_rcnn", "tiny_fcos"]
