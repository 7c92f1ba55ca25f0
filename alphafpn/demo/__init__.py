"""The main job from end to end on a small scale (extra ``demo``)."""

from alphafpn.demo.run import BASELINE, ESTIMATED, run_demo
from alphafpn.demo.training import MEASURE, Settings

__all__ = ["BASELINE", "ESTIMATED", "MEASURE", "Settings", "run_demo"]
