"""What `import alphafpn` leaves for later; import-linter holds which module may import which."""

from __future__ import annotations

import subprocess
import sys

LATE = ("matplotlib", "faster_coco_eval", "alphafpn.tiny", "alphafpn.demo")


def test_extras_are_imported_at_first_use():
    program = f"import sys, alphafpn.cli; print([n for n in {LATE} if n in sys.modules])"
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
