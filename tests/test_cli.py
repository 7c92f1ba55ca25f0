"""The command line: what it prints where, and how it ends."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from torchvision.models import detection

from alphafpn import __version__, cli, compare_anchors, estimate_alpha_for
from alphafpn.cli import main
from alphafpn.estimate.report import warnings
from tests.malformed import annotation, coco

RETINANET = ("--detector", "retinanet_resnet50_fpn_v2")


@pytest.fixture
def annotations(tmp_path):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(coco()))
    return path


def fail(capsys, *arguments):
    """The one line of an error."""
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("alphafpn: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_json_is_the_estimate_of_the_library(annotations, capsys):
    main(["estimate", str(annotations), *RETINANET, "--json"])
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    model = detection.retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None)
    expected = [f"warning: {text}" for text in warnings(estimate_alpha_for(model, annotations))]
    assert captured.err.splitlines() == expected
    assert len(expected) > 1
    # Some levels have no objects, so the answer holds what other anchors would give.
    anchors = printed.pop("anchors")
    assert printed.pop("findings") == []
    assert anchors == compare_anchors(model, annotations).to_list()
    assert printed == estimate_alpha_for(model, annotations).to_dict()
    assert {
        "alpha", "ratios", "counts", "level_names", "num_boxes", "num_unmatched",
        "confidence_interval",
    } <= printed.keys()  # fmt: skip


def test_several_files_count_as_one(annotations, tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text(json.dumps(coco()))
    main(["estimate", str(annotations), str(other), *RETINANET, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert (printed["num_images"], printed["num_boxes"]) == (4, 4)
    other.write_text("{")
    assert f"error: {other}: " in fail(capsys, "estimate", annotations, other, *RETINANET)
    # The place of an image that a detector cannot take is that in its file.
    thin = {"id": 1, "width": 1, "height": 3000}
    other.write_text(json.dumps(coco(images=[thin], annotations=[])))
    # Also if it is the one of median size, of which the cost is computed.
    error = fail(capsys, "estimate", annotations, other, other, *RETINANET)
    assert f"error: {other}: images[0]: " in error


def test_the_report_opens_with_what_to_do(tmp_path, capsys):
    path = tmp_path / "boxes.json"
    image = {"id": 7, "width": 800, "height": 800}
    command = ["estimate", str(path), "--detector", "fasterrcnn_resnet50_fpn"]

    def first_line(sides):
        entries = [annotation(bbox=[32, 32, s, s]) for s in sides for _ in range(20)]
        path.write_text(json.dumps(coco(images=[image], annotations=entries)))
        main(command)
        out = capsys.readouterr().out
        assert " boxes on 1 images, mean size " in out
        assert "\nP3 -> P2 " in out
        return out.splitlines()[0]

    assert first_line((32, 64, 128)) == (
        "The detector fits these boxes: there is nothing to adapt."
    )
    assert first_line((8, 9)).startswith("0% of the boxes reach IoU 0.5; with smaller anchors 100%")
    assert first_line((0.1, 0.2)).startswith("the mean object is smaller than a pixel")
    first_line((8, 9))
    main([*command, "--json"])
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["findings"][0].endswith("max_objects=40)")
    assert "times the cost" not in outcome["findings"][0]  # anchors alone cost nothing
    assert [row["best"] for row in outcome["anchors"]].count(True) == 1
    main([*command, "--min-size", "600"])
    out = capsys.readouterr().out
    assert "for a detector that is built with your --min-size\n" in out
    assert out.splitlines()[-1].startswith("adapt_detector(model, 0.")


def test_options_reach_the_detector(annotations, capsys):
    ours = ("--anchor-sizes", "8", "16", "32", "64", "128,160", "--aspect-ratios", "1", "2")
    sizes = ("--min-size", "320", "480", "--max-size", "700")
    detector = ("--detector", "fasterrcnn_resnet50_fpn")
    main(["estimate", str(annotations), *detector, *ours, *sizes, "--json"])
    printed = json.loads(capsys.readouterr().out)
    generator = detection.anchor_utils.AnchorGenerator(
        ((8,), (16,), (32,), (64,), (128, 160)), ((1.0, 2.0),) * 5
    )
    model = detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=(320, 480), max_size=700
    )
    model.rpn.anchor_generator = generator
    expected = estimate_alpha_for(model, annotations).to_dict()
    assert {key: printed[key] for key in expected} == expected
    assert printed["num_sizes"] == 2
    assert printed["anchors_per_cell"] == [2, 2, 2, 2, 4]


@pytest.mark.parametrize(
    ("option", "sizes", "ratios"),
    [
        ("--anchor-sizes 9 17 33 65 129", ((9,), (17,), (33,), (65,), (129,)), (0.5, 1.0, 2.0)),
        ("--aspect-ratios 1 3", ((32,), (64,), (128,), (256,), (512,)), (1.0, 3.0)),
    ],
)
def test_sizes_and_ratios_can_be_given_alone(option, sizes, ratios, annotations, capsys):
    detector = ("--detector", "fasterrcnn_resnet50_fpn")
    main(["estimate", str(annotations), *detector, *option.split(), "--json"])
    printed = json.loads(capsys.readouterr().out)
    model = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    model.rpn.anchor_generator = detection.anchor_utils.AnchorGenerator(sizes, (ratios,) * 5)
    assert printed["iou_histogram"] == list(estimate_alpha_for(model, annotations).iou_histogram)


def test_categories_and_clamp(annotations, capsys):
    main(["estimate", str(annotations), *RETINANET, "--categories", "1", "--no-clamp", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["clamp"] is None
    assert "categories" in fail(capsys, "estimate", annotations, *RETINANET, "--categories", "99")


def test_plot_is_a_picture(annotations, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "counts.png"
    main(["estimate", str(annotations), *RETINANET, "--plot", str(picture)])
    with Image.open(picture) as image:
        assert (image.format, image.size) == ("PNG", (960, 1200))
    assert str(picture) in capsys.readouterr().err
    picture = tmp_path / "counts.svg"
    main(["estimate", str(annotations), *RETINANET, "--plot", str(picture)])
    assert str(picture) in capsys.readouterr().err
    text = picture.read_text()
    # The comparison is above the counts, and there is nothing else.
    assert text.count('id="axes_') == 2
    assert text.index("<!-- share with IoU") < text.index("<!-- pyramid level -->")
    before = sorted(tmp_path.iterdir())
    for name in ("counts.nonsense", "counts", "nowhere/a.png"):
        # Before any work: the annotations do not even exist.
        picture = tmp_path / name
        assert str(picture) in fail(capsys, "estimate", "none.json", *RETINANET, "--plot", picture)
    assert sorted(tmp_path.iterdir()) == before


KNOWN = "estimate a.json --detector retinanet_resnet50_fpn_v2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "COMMAND"),
        ("frobnicate", "frobnicate"),
        ("estimat", "estimat"),
        ("estimate a.json", "expected a detector with a feature pyramid, found none; known names"),
        ("estimate a.json --detector", "--detector"),
        ("estimate a.json --detector ssd300_vgg16", "ssd300_vgg16"),
        ("estimate a.json --detector retinanet", "mean retinanet_resnet50_fpn_v2?"),
        (
            "estimate a.json --detector fastercnn_resnet50_fpn",
            "found 'fastercnn_resnet50_fpn' (did you mean fasterrcnn_resnet50_fpn?); known names",
        ),
        ("estimate a.json --detector tiny_retinanet --min-size 8", "--min-size"),
        (KNOWN.replace("a.", "nowhere."), "error: nowhere.json: No such file or directory\n"),
        (f"{KNOWN} --catgories 1", "unrecognized arguments: --cat"),
        (f"{KNOWN} --min-size 0", "--min-size"),
        (f"{KNOWN} --max-size 1.5", "expected a positive whole number, found '1.5'"),
        (f"{KNOWN} --anchor-sizes 8,x", "expected a positive number, found 'x'"),
        (f"{KNOWN} --anchor-sizes 8 16", "5, found 2"),
        (f"{KNOWN} --aspect-ratios nan", "found 'nan'"),
        (f"{KNOWN} --aspect-ratios inf", "found 'inf'"),
        ("demo --nothing-alike", "unrecognized arguments: --nothing-alike\n"),
        ("demo --images somewhere", "--annotations"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, capsys):
    assert message in fail(capsys, *arguments.split())


@pytest.mark.parametrize("name", ["tiny_retinanet", "tiny_faster_rcnn"])
def test_tiny_detectors_by_name(name, annotations, capsys):
    main(["estimate", str(annotations), "--detector", name, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["level_names"] == ["P2", "P3", "P4", "P5", "P6"]
    assert printed["num_boxes"] == 2


def test_the_demo_is_called_with_its_options(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("alphafpn.demo.run_demo", lambda **given: calls.append(given))
    main(["demo", "--out", "a"])
    main(["demo", "--images", "b", "--annotations", "c.json"])
    assert calls == [
        {"out": Path("a"), "images": None, "annotations": None},
        {"out": Path("alphafpn-demo"), "images": Path("b"), "annotations": Path("c.json")},
    ]


def test_the_package_runs_as_a_program_and_only_then(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["alphafpn", "--version"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("alphafpn", run_name="__main__")
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"alphafpn {__version__}\n"
    runpy.run_module("alphafpn.__main__", run_name="alphafpn.__main__")


def test_a_reader_that_ends_early_is_no_mistake(annotations):
    command = [sys.executable, "-m", "alphafpn", "estimate", str(annotations), *RETINANET]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_an_interrupt_ends_quietly(annotations, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "read_annotations", interrupt)
    with pytest.raises(SystemExit) as exit_:
        main(["estimate", str(annotations), *RETINANET])
    assert exit_.value.code == 130
    assert capsys.readouterr() == ("", "alphafpn: interrupted\n")
