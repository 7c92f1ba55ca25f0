"""The command line: `alphafpn estimate` and `alphafpn demo`.

Results go to stdout, progress and messages to stderr. A mistake in what the user gave is exit code
2 and one line that starts with `alphafpn: error:`.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torchvision.models import detection, get_model_builder, list_models
from torchvision.models.detection.anchor_utils import AnchorGenerator

from alphafpn import __version__
from alphafpn.comparison import compare_probe
from alphafpn.display import new_axes
from alphafpn.estimate.annotations import read_annotations
from alphafpn.estimate.checks import DEFAULT_CLAMP
from alphafpn.estimate.probe import DetectorProbe
from alphafpn.estimate.report import warnings

TINY = ("tiny_retinanet", "tiny_faster_rcnn")


class _Parser(argparse.ArgumentParser):
    """Gives one line per mistake, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        _fail(message)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; leaves by `SystemExit` unless all went well."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, TypeError, ImportError) as error:
        _fail(str(error))
    except BrokenPipeError:  # whoever read the output has ended, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        named = error.filename is not None
        _fail(f"{error.filename}: {error.strerror}" if named else str(error))
    except KeyboardInterrupt:
        print("alphafpn: interrupted", file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    print("alphafpn: error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="alphafpn", description="Makes detectors fit small objects.")
    parser.add_argument("--version", action="version", version=f"alphafpn {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    estimate = commands.add_parser(
        "estimate",
        help="compare the boxes of a COCO-format file with the anchors of a detector",
        description="Compares the boxes of a COCO-format file with the anchors of a detector, and "
        "prints how to adapt it, the boxes on each pyramid level, and the fusion factors.",
    )
    estimate.set_defaults(run=_estimate)
    add = estimate.add_argument
    several = "COCO-format JSON; several files count as one"
    add("annotations", type=Path, nargs="+", metavar="ANNOTATIONS", help=several)
    names = (
        f"a torchvision FPN detector, such as fasterrcnn_resnet50_fpn_v2, or {' or '.join(TINY)}"
    )
    # The default is no name, so that the message without it lists the names.
    add("--detector", default="", metavar="NAME", help=names)
    own = "as the detector's own argument"
    add("--min-size", type=partial(_positive, int), nargs="+", metavar="N", help=own)
    add("--max-size", type=partial(_positive, int), metavar="N", help=own)
    sizes = "anchor sizes in pixels, one argument per level; several per level with commas"
    add("--anchor-sizes", type=_numbers, nargs="+", metavar="S[,S...]", help=sizes)
    ratios = "height / width of the anchors on every level"
    add("--aspect-ratios", type=partial(_positive, float), nargs="+", metavar="R", help=ratios)
    add("--categories", type=_id, nargs="+", metavar="ID", help="count only these category ids")
    add("--no-clamp", action="store_true", help="leave the factors unclamped")
    add("--json", action="store_true", help="one JSON object instead of a table")
    add("--plot", type=Path, metavar="FILE", help="save a picture")

    demo = commands.add_parser(
        "demo",
        help="compare, adapt, train and evaluate, in a few minutes",
        description="Trains a small detector as it is, adapted, and with fusion factors, on drawn "
        "scenes or on your images, and compares them (extra: demo).",
    )
    demo.set_defaults(run=_demo)
    add = demo.add_argument
    add("--images", type=Path, metavar="DIR", help="your images")
    add("--annotations", type=Path, metavar="FILE", help="their COCO-format JSON")
    default = Path("alphafpn-demo")
    add("--out", type=Path, metavar="DIR", default=default, help="default: %(default)s")
    return parser


def _estimate(options: argparse.Namespace) -> None:
    if options.plot is not None:
        _check_picture(options.plot)
    probe = DetectorProbe(_detector(options))
    annotations = read_annotations(options.annotations, category_ids=options.categories)
    comparison = compare_probe(probe, annotations, None if options.no_clamp else DEFAULT_CLAMP)
    estimate, findings = comparison.rows[0].estimate, comparison.findings()
    if options.plot is not None:
        figure: Any = new_axes().figure
        figure.clear()
        figure.set_size_inches(6.4, 8)
        above, below = figure.subplots(2)
        comparison.plot(above)
        estimate.plot(below)
        figure.savefig(options.plot, dpi=150)
        print(f"wrote {options.plot}", file=sys.stderr)
    if options.json:
        anchors = comparison.to_list()
        print(json.dumps({**estimate.to_dict(), "anchors": anchors, "findings": findings}))
        for text in warnings(estimate):
            print("warning:", text, file=sys.stderr)
        return
    print("\n".join(findings or ["The detector fits these boxes: there is nothing to adapt."]))
    print(f"\n{estimate.summary()}\n")
    names = ("--min-size", "--max-size", "--anchor-sizes", "--aspect-ratios")
    given = [name for name in names if getattr(options, name[2:].replace("-", "_"))]
    if given:
        print(f"All scales and calls are for a detector that is built with your {', '.join(given)}")
    print(comparison)


def _detector(options: argparse.Namespace) -> nn.Module:
    """Builds the detector by name, without weights: only its anchors and sizes matter."""
    names = [*(name for name in list_models(module=detection) if "_fpn" in name), *TINY]
    if options.detector not in names:
        begun = [name for name in names if name.startswith(options.detector)]
        near = begun[-1:] or difflib.get_close_matches(options.detector, names, 1)
        hint = f" (did you mean {near[0]}?)" if near and options.detector else ""
        found = repr(options.detector) if options.detector else "none"
        raise ValueError(
            f"--detector: expected a detector with a feature pyramid, found {found}{hint}; known "
            f"names are {', '.join(names)}"
        )
    sizes = {"min_size": options.min_size, "max_size": options.max_size}
    given = {name: value for name, value in sizes.items() if value is not None}
    if options.detector in TINY:
        from alphafpn import tiny

        if given:
            raise ValueError(
                f"{options.detector} does not resize: leave out --min-size, --max-size"
            )
        builder = getattr(tiny, options.detector)
    else:
        builder = get_model_builder(options.detector)
    with torch.device("meta"):
        model: nn.Module = builder(weights=None, weights_backbone=None, **given)
    if options.anchor_sizes or options.aspect_ratios:
        _set_anchors(model, options.anchor_sizes, options.aspect_ratios)
    return model


def _set_anchors(
    model: nn.Module, sizes: list[tuple[float, ...]] | None, ratios: list[float] | None
) -> None:
    """Gives `model` other anchors; its head would no longer fit, but it is not used."""
    owner: Any = getattr(model, "rpn", model)
    old = owner.anchor_generator
    if sizes is not None and len(sizes) != len(old.sizes):
        raise ValueError(
            f"--anchor-sizes: expected one argument per level, {len(old.sizes)}, found {len(sizes)}"
        )
    owner.anchor_generator = AnchorGenerator(
        tuple(sizes) if sizes is not None else old.sizes,
        (tuple(ratios),) * len(old.sizes) if ratios is not None else old.aspect_ratios,
    )


def _check_picture(path: Path) -> None:
    """Checks the name of a picture before the counting, so that no mistake comes after it."""
    kinds = new_axes().figure.canvas.get_supported_filetypes()
    if path.suffix[1:] not in kinds:
        raise ValueError(
            f"--plot {path}: expected a file name that ends in one of {', '.join(sorted(kinds))}"
        )
    if not path.parent.is_dir():
        raise ValueError(f"--plot {path}: expected its folder to exist, found none")


def _demo(options: argparse.Namespace) -> None:
    if (options.images is None) != (options.annotations is None):
        raise ValueError("--images and --annotations: expected both or none, found one")
    from alphafpn.demo import run_demo

    run_demo(out=options.out, images=options.images, annotations=options.annotations)


def _id(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdecimal() else text


def _positive(kind: type[int] | type[float], text: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        name = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"expected a positive {name}, found {text!r}")
    return value


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(_positive(float, part) for part in text.split(","))
