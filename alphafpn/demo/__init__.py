"""What adapting and fusion factors give, shown in a few minutes (extra `demo`)."""

from alphafpn.demo.run import run_demo
from alphafpn.demo.training import MEASURE, Settings

__all__ = ["MEASURE", "Settings", "run_demo"]
