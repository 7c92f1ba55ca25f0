"""The main job from end to end on a small scale (extra ``demo``)."""

from alphafpn.demo.run import BASELINE, ESTIMATED, MEASURE, Settings, run_demo

__all__ = ["BASELINE", "ESTIMATED", "MEASURE", "Settings", "run_demo"]
