"""The main job from end to end on a small scale (extra `demo`)."""

from alphafpn.demo.run import run_demo
from alphafpn.demo.training import BASELINE, ESTIMATED, MEASURE, Settings

__all__ = ["BASELINE", "ESTIMATED", "MEASURE", "Settings", "run_demo"]
