"""Write drawn scenes as data sets for `sweep`: OUT/train.json, val.json and source.json.

    python -m benchmarks.paper.scenes OUT --side 96 --train 96 --val 60 --source 96

`source` is for pre-training: other scenes of the same kind. Images are in OUT.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image

from benchmarks.clutter import coco, drawn_scenes

_SEEDS = {"train": 11, "val": 12, "source": 13}


def write(out: Path, side: int, counts: dict[str, int]) -> None:
    """Write `counts[name]` scenes of `side` pixels for each name."""
    for name, count in counts.items():
        scenes = list(drawn_scenes(count, side, _SEEDS[name]))
        truth = coco(name, scenes)
        (out / name).mkdir(parents=True, exist_ok=True)
        for entry, (pixels, _) in zip(truth["images"], scenes, strict=True):
            Image.fromarray(pixels).save(out / entry["file_name"])
        (out / f"{name}.json").write_text(json.dumps(truth), "utf-8")


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
