"""Write drawn scenes as data sets for `sweep`: OUT/train.json, val.json and source.json.

    python -m benchmarks.paper.scenes OUT --side 96 --train 96 --val 60 --source 96

`source` is for pre-training: other scenes of the same kind. Images are in OUT.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from alphafpn.demo.scenes import drawn_scenes, write_scenes

_SEEDS = {"train": 11, "val": 12, "source": 13}


def write(out: Path, side: int, counts: dict[str, int]) -> None:
    """Write `counts[name]` scenes of `side` pixels for each name."""
    for name, count in counts.items():
        write_scenes(out, name, list(drawn_scenes(count, side, _SEEDS[name])))


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--side", type=int, default=96, help="of a scene, in pixels")
    for name in _SEEDS:
        parser.add_argument(f"--{name}", type=int, default=96, help="how many scenes")
    options = parser.parse_args()
    write(options.out, options.side, {name: getattr(options, name) for name in _SEEDS})


if __name__ == "__main__":
    main()
