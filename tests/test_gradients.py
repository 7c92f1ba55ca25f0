"""Eq. 3 measured: a pyramid worked out by hand, torchvision's detectors, and no trace left."""

from __future__ import annotations

import contextlib
import re
import threading
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from alphafpn.gradients import gradient_shares
from alphafpn.pyramid import LearnableAlpha
from alphafpn.surgery import patch_detector
from tests.detectors import (
    BUILDERS,
    make_batch,
    make_detector,
    make_faster_rcnn,
    make_fcos,
    make_retinanet,
)
from tests.pictures import drawn
from tests.pyramids import KINDS
from tests.states import assert_unchanged, snapshot

FACTORS = [0.5, 0.25]


# A pyramid worked out by hand


class ByHand(nn.Module):
    """One channel, all convolutions the identity, and at P_j a gradient of w_j everywhere."""

    def __init__(self, weights, extra=None):
        super().__init__()
        self.fpn = FeaturePyramidNetwork([1, 1, 1], 1, extra)
        self.weights = weights
        with torch.no_grad():
            for parameter in self.fpn.parameters():
                parameter.zero_()
            for block in self.fpn.inner_blocks:
                block[0].weight.fill_(1)
            for block in self.fpn.layer_blocks:
                block[0].weight[0, 0, 1, 1] = 1

    def forward(self, images, targets):
        self.remembered = len(images)
        batch = torch.stack(images)
        features = OrderedDict((f"c{i}", F.avg_pool2d(batch, 4 << i)) for i in range(3))
        levels = self.fpn(features).values()
        return {f"loss {j}": w * p.sum() for j, (w, p) in enumerate(zip(self.weights, levels))}  # noqa: B905


IMAGES = [torch.zeros(1, 16, 32), torch.ones(1, 16, 32)]
# Cells of C_0, C_1 and C_2 in the batch.
CELLS = [64, 16, 4]


def shares_by_hand(weights, alpha):
    """Eq. 3: a pixel of C_i feeds 4^(i-j) pixels of P_j, through each factor in between."""
    norms = [
        [
            w * np.prod(alpha[j:i]) * 4.0 ** (i - j) * CELLS[i] ** 0.5 if j <= i else 0.0
            for j, w in enumerate(weights)
        ]
        for i in range(3)
    ]
    return torch.tensor(norms, dtype=torch.float64)


@pytest.mark.parametrize("alpha", [[1.0, 1.0], [0.5, 0.25], [0.367, 2.0], [0.0, 1.0], [-0.5, 1.0]])
def test_equation_3_by_hand(alpha):
    weights = [3.0, 2.0, 0.5]
    result = gradient_shares(patch_detector(ByHand(weights), alpha), IMAGES, [{}, {}])
    expected = shares_by_hand(weights, alpha).abs()
    torch.testing.assert_close(result.norms, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        result.shares, expected / expected.sum(1, keepdim=True), rtol=1e-6, atol=0
    )
    assert result.feature_names == ("C c0", "C c1", "C c2")


def test_extra_levels_have_their_own_column():
    model = ByHand([1.0, 1.0, 1.0, 5.0], LastLevelMaxPool())
    result = gradient_shares(model, IMAGES, [{}, {}])
    assert result.level_names == ("P c0", "P c1", "P c2", "P pool")
    # Of the two cells of C_2 of an image, the pooling passes the gradient to one.
    expected = torch.tensor([0, 0, 5.0 * 2**0.5], dtype=torch.float64)
    torch.testing.assert_close(result.norms[:, 3], expected)
    torch.testing.assert_close(result.norms[:, :3], shares_by_hand([1.0, 1.0, 1.0], [1.0, 1.0]))


def test_a_level_that_no_loss_uses_passes_nothing():
    model = ByHand([1.0, 1.0])
    result = gradient_shares(model, IMAGES, [{}, {}])
    assert not hasattr(model, "remembered")
    expected = shares_by_hand([1.0, 1.0, 0.0], [1.0, 1.0])
    torch.testing.assert_close(result.norms, expected)


def test_what_else_a_pyramid_is_given_reaches_it():
    class Scaled(FeaturePyramidNetwork):
        def forward(self, x, factor):
            return OrderedDict((name, factor * p) for name, p in super().forward(x).items())

    model = ByHand([1.0, 1.0, 1.0])
    expected = 3 * gradient_shares(model, IMAGES, [{}, {}]).norms
    model.fpn.__class__ = Scaled
    model.fpn.register_forward_pre_hook(lambda fpn, args: (*args, 3.0))
    torch.testing.assert_close(gradient_shares(model, IMAGES, [{}, {}]).norms, expected)


def test_a_feature_that_no_gradient_reaches_is_nan_and_prints():
    result = gradient_shares(ByHand([0.0, 1.0, 1.0]), IMAGES, [{}, {}])
    assert result.shares[0].isnan().all()
    torch.testing.assert_close(result.shares[1:].sum(1), torch.ones(2, dtype=torch.float64))
    assert str(result).splitlines()[2].split() == ["C", "c0", "-", "-", "-"]


def test_gradients_too_small_for_their_squares_are_measured():
    result = gradient_shares(ByHand([1e-30, 1e-20, 1.0]), IMAGES, [{}, {}])
    expected = shares_by_hand([1e-30, 1e-20, 1.0], [1.0, 1.0])
    torch.testing.assert_close(result.norms, expected, rtol=1e-6, atol=0)


# torchvision's detectors


@pytest.mark.parametrize("build", BUILDERS)
def test_shares_add_up_along_the_top_down_paths(build):
    result = gradient_shares(make_detector(build, FACTORS), *make_batch())
    features, levels = result.norms.shape
    assert result.feature_names == ("C2", "C3", "C4")
    assert result.level_names == ("P2", "P3", "P4", "P5", "P6")[:levels]
    torch.testing.assert_close(result.shares.sum(1), torch.ones(3, dtype=torch.float64))
    for i in range(features):
        for j in range(levels):
            reached = j <= i or i == features - 1
            assert (result.norms[i, j] > 0) == reached, (i, j)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_one_backward_pass_for_each_level(kind):
    """The slow way: train with the graph cut at all output maps but one, and read the leaves."""
    model = make_detector(make_fcos, kind(FACTORS))
    result = gradient_shares(model, *make_batch())
    state = torch.get_rng_state()
    for j, open_level in enumerate(["0", "1", "2", "pool"]):
        leaves = {}

        def start(module, args, leaves=leaves):
            leaves |= {name: c.detach().requires_grad_() for name, c in args[0].items()}
            return (leaves,)

        def cut(module, args, output, open_level=open_level):
            return OrderedDict(
                (name, p if name == open_level else p.detach()) for name, p in output.items()
            )

        fpn = model.backbone.fpn
        torch.set_rng_state(state)
        with fpn.register_forward_pre_hook(start), fpn.register_forward_hook(cut):
            sum(model(*make_batch()).values()).backward()
        norms = [0.0 if c.grad is None else float(c.grad.norm()) for c in leaves.values()]
        assert result.norms[:, j].tolist() == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("build", BUILDERS)
def test_images_without_boxes_are_measured(build):
    result = gradient_shares(make_detector(build), *make_batch(boxes=False))
    assert result.norms.isfinite().all()
    assert (result.norms.sum(1) > 0).all()


# No trace


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", BUILDERS)
def test_nothing_changes(build, training):
    model = make_detector(build, LearnableAlpha(FACTORS)).train(training)
    model.backbone.fpn.eval()
    model.backbone.body["0"][0].weight.grad = torch.ones_like(model.backbone.body["0"][0].weight)
    for parameter in model.backbone.body["1"].parameters():
        parameter.requires_grad_(False)
    model.backbone.register_forward_hook(lambda module, args, output: None)
    before = snapshot(model)
    gradient_shares(model, *make_batch())
    assert_unchanged(model, before)


def test_nothing_changes_when_it_fails():
    model = make_detector(make_retinanet).eval()
    before = snapshot(model)
    images, targets = make_batch()
    with pytest.raises(ValueError, match=r"All bounding boxes should have positive .*index 0"):
        gradient_shares(model, images, [{**targets[0], "boxes": torch.zeros(2, 4)}, targets[1]])
    assert_unchanged(model, before)


def test_parts_in_evaluation_mode_stay_so():
    model = make_detector(make_retinanet, FACTORS)
    whole = gradient_shares(model, *make_batch())
    model.backbone.body["0"][1].eval()
    assert not torch.equal(gradient_shares(model, *make_batch()).norms, whole.norms)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("build", BUILDERS)
def test_on_a_gpu(build):
    model = make_detector(build, FACTORS).cuda()
    images, targets = make_batch()
    images = [image.cuda() for image in images]
    targets = [{name: value.cuda() for name, value in target.items()} for target in targets]
    before = snapshot(model)
    result = gradient_shares(model, images, targets)
    assert_unchanged(model, before)
    assert result.norms.device.type == "cpu"
    assert torch.equal(gradient_shares(model, images, targets).norms, result.norms)


# Wrapped models


class Task(nn.Module):
    """Holds a detector as a LightningModule does; its own forward pass is something else."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.metric = nn.Identity()
        self.lock = threading.Lock()  # cannot be pickled

    def forward(self, batch):
        raise NotImplementedError


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", BUILDERS)
def test_the_detector_inside_a_module_is_measured(build, training):
    expected = gradient_shares(make_detector(build, FACTORS), *make_batch())
    task = Task(make_detector(build, FACTORS)).train(training)
    for model in (task, torch.compile(task, backend="eager")):
        assert torch.equal(gradient_shares(model, *make_batch()).norms, expected.norms)
    assert all(module.training is training for module in task.modules())


class NoDouble(TorchDispatchMode):
    """As on MPS, which has no float64; only what was copied to the CPU may be of it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            assert result.ndim <= 2, func
        return result


def compiled(model):
    def backend(graph, inputs):
        pytest.fail("compiled code ran")

    model.backbone.fpn = torch.compile(model.backbone.fpn, backend=backend)
    model.head.compile(backend=backend)
    return torch.compile(model, backend=backend)


@pytest.mark.parametrize(
    ("prepare", "mode"),
    [
        (compiled, contextlib.nullcontext()),
        (lambda model: model.requires_grad_(False), torch.no_grad()),
        (lambda model: model, torch.inference_mode()),
        (lambda model: model, NoDouble()),
    ],
    ids=["compiled", "frozen and without gradients", "inference mode", "without float64"],
)
def test_equals_the_original_in_other_modes(prepare, mode):
    expected = gradient_shares(make_detector(make_fcos, FACTORS), *make_batch())
    model = prepare(make_detector(make_fcos, FACTORS))
    with mode:
        grad = torch.is_grad_enabled()
        result = gradient_shares(model, *make_batch())
        assert torch.is_grad_enabled() == grad
    assert torch.equal(result.norms, expected.norms)


def test_ddp_measures_the_module_inside_on_its_own_images(monkeypatch, tmp_path):
    model = make_detector(make_retinanet, FACTORS)
    expected = gradient_shares(model, *make_batch())
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        # Its own forward pass would wait for the other processes.
        monkeypatch.setattr(DistributedDataParallel, "forward", None)
        assert torch.equal(gradient_shares(wrapped, *make_batch()).norms, expected.norms)
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_models_are_refused():
    scripted = torch.jit.script(FeaturePyramidNetwork([1], 1))
    with pytest.raises(TypeError, match=r"found a ScriptModule.*before sharding or scripting"):
        gradient_shares(scripted, IMAGES, [{}, {}])


# Bad input


def test_a_loss_that_is_not_finite_is_named():
    with pytest.raises(ValueError, match="loss 1: expected a finite loss, found nan"):
        gradient_shares(ByHand([1.0, float("nan"), 1.0]), IMAGES, [{}, {}])
    with pytest.raises(ValueError, match="loss 0: expected a finite loss, found inf"):
        gradient_shares(ByHand([float("inf"), 0.0, 1.0]), [torch.ones(1, 16, 32)], [{}])
    images, targets = make_batch()
    images[0][:] = float("nan")
    with pytest.raises(ValueError, match="classification: expected a finite loss, found nan"):
        gradient_shares(make_detector(make_retinanet), images, targets)


def test_gradients_that_are_not_finite_are_refused():
    class Root(ByHand):
        def forward(self, images, targets):
            return {name: loss.sqrt() for name, loss in super().forward(images, targets).items()}

    with pytest.raises(ValueError, match="gradients: expected finite ones, found norms"):
        gradient_shares(Root([1.0, 1.0, 1.0]), IMAGES[:1], [{}])


@pytest.mark.parametrize(("images", "targets"), [(0, 0), (1, 2), (2, 0)])
def test_images_and_targets_go_together(images, targets):
    found = f"found {images} images and {targets} targets"
    with pytest.raises(ValueError, match=f"expected equally many and at least one, {found}"):
        gradient_shares(ByHand([1.0]), IMAGES[:images], [{}] * targets)


MASKS = {"masks": torch.ones(2, 64, 64, dtype=torch.uint8)}


def make_mask_rcnn():
    model = make_faster_rcnn()
    model.roi_heads.mask_roi_pool = MultiScaleRoIAlign(["0", "1", "2"], 7, 2)
    model.roi_heads.mask_head = nn.Conv2d(8, 8, 3, padding=1)
    model.roi_heads.mask_predictor = MaskRCNNPredictor(8, 8, 2)
    return model


GIVEN = make_batch()[1][0]
BOXES, LABELS = GIVEN.values()


@pytest.mark.parametrize(
    ("build", "target", "found"),
    [
        *((build, {"boxes": BOXES}, "found boxes [2, 4]") for build in BUILDERS),
        *((build, {"labels": LABELS}, "found labels [2]") for build in BUILDERS),
        *((build, GIVEN | {"labels": LABELS.float()}, "found torch.float32") for build in BUILDERS),
        *((build, GIVEN | {"labels": 2 * LABELS}, "and below 2, found 2") for build in BUILDERS),
        *((build, GIVEN | {"labels": -LABELS}, "and below 2, found -1") for build in BUILDERS),
        (make_fcos, [BOXES, LABELS], "found list"),
        (make_fcos, {}, "found dict"),
        (make_fcos, GIVEN | {"boxes": BOXES.tolist()}, "found boxes list, labels [2]"),
        (make_fcos, GIVEN | {"boxes": BOXES[:, :3]}, "found boxes [2, 3], labels [2]"),
        (make_fcos, GIVEN | {"labels": LABELS[:1]}, "found boxes [2, 4], labels [1]"),
        (make_fcos, GIVEN | {"labels": LABELS[:, None]}, "[2, 4], labels [2, 1]"),
        (make_mask_rcnn, GIVEN, "found boxes [2, 4], labels [2]"),
        (make_mask_rcnn, GIVEN | {"masks": torch.ones(1, 64, 64)}, "labels [2], masks [1, 64, 64]"),
    ],
)
def test_targets_that_the_detector_cannot_train_on_are_named(build, target, found):
    images, targets = make_batch()
    with pytest.raises(ValueError, match=rf"^targets\[1\]: expected .*{re.escape(found)}"):
        gradient_shares(make_detector(build), images, [targets[0] | MASKS, target])


@pytest.mark.parametrize(
    ("build", "dtype", "taken"),
    [
        (make_retinanet, torch.int32, True),
        (make_fcos, torch.int32, True),
        (make_retinanet, torch.int16, False),
        (make_faster_rcnn, torch.int64, True),
        (make_faster_rcnn, torch.int32, False),
    ],
)
def test_the_integers_that_labels_may_be(build, dtype, taken):
    images, (target, other) = make_batch()
    error = contextlib.nullcontext() if taken else pytest.raises(ValueError, match=f"found {dtype}")
    with error:
        gradient_shares(
            make_detector(build), images, [target | {"labels": target["labels"].to(dtype)}, other]
        )


def test_masks_are_measured():
    images, targets = make_batch()
    targets[1]["masks"] = torch.zeros(0, 50, 70, dtype=torch.uint8)
    result = gradient_shares(
        make_detector(make_mask_rcnn), images, [targets[0] | MASKS, targets[1]]
    )
    assert (result.norms.sum(1) > 0).all()


def test_heads_of_ones_own_may_have_any_number_of_classes():
    images, targets = make_batch()
    model = make_detector(make_faster_rcnn)
    expected = gradient_shares(model, images, targets)
    model.roi_heads.box_predictor = nn.Sequential(model.roi_heads.box_predictor)
    assert torch.equal(gradient_shares(model, images, targets).norms, expected.norms)


def test_weights_without_values_are_named():
    with pytest.raises(ValueError, match="expected weights with values, found some on the meta"):
        gradient_shares(make_detector(make_fcos).to("meta"), *make_batch())


class NoLosses(ByHand):
    def forward(self, images, targets):
        return list(super().forward(images, targets).values())


class NoPyramid(ByHand):
    def forward(self, images, targets):
        return {"loss": torch.zeros(())}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("model.pt", "expected a torch.nn.Module, found str"),
        (nn.Conv2d(1, 1, 1), "one FeaturePyramidNetwork, found none in Conv2d"),
        (nn.ModuleList([ByHand([1]), ByHand([1])]), "found 0.fpn, 1.fpn in ModuleList"),
        (
            Task(nn.ModuleDict({"a": make_fcos(), "b": make_fcos()})),
            "found model.a.backbone.fpn, model.b.backbone.fpn in Task",
        ),
        (NoLosses([1.0]), "expected a dict of losses in training, found list"),
        (NoPyramid([1.0]), "expected its pyramid to run once, it ran 0 times"),
    ],
)
def test_what_cannot_be_measured_is_named(model, message):
    with pytest.raises(TypeError, match=message):
        gradient_shares(model, IMAGES, [{}, {}])


# Reading the result


def test_prints_as_a_table():
    result = gradient_shares(make_detector(make_faster_rcnn, FACTORS), *make_batch())
    title, header, *rows = str(result).splitlines()
    assert "share" in title
    assert header.split() == ["P2", "P3", "P4", "P5"]
    assert [row.split()[0] for row in rows] == ["C2", "C3", "C4"]
    assert rows[0].split()[1:] == ["100.0%", "-", "-", "-"]
    for row, shares in zip(rows, result.shares.tolist(), strict=True):
        cells = [float(cell.rstrip("%")) if cell != "-" else 0 for cell in row.split()[1:]]
        assert cells == pytest.approx([100 * share for share in shares], abs=0.051)


def test_plots_the_shares():
    pytest.importorskip("matplotlib")
    result = gradient_shares(make_detector(make_retinanet, FACTORS), *make_batch())
    axes = result.plot()
    heights = torch.tensor([[bar.get_height() for bar in bars] for bars in axes.containers])
    torch.testing.assert_close(heights.double().T, result.shares, rtol=0, atol=1e-6)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(result.level_names)
    assert [label.get_text() for label in axes.get_xticklabels()] == list(result.feature_names)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("backbone feature", "share of the gradient")
    figure, place = drawn(axes)
    inside, legend = place(axes), place(axes.get_legend())
    # The bars of a feature stand on each other and fill the picture; the legend hides none of them.
    for stack in zip(*axes.containers, strict=True):
        places = [place(bar) for bar in stack]
        assert [places[0].y0, places[-1].y1] == pytest.approx([inside.y0, inside.y1])
        assert [p.y0 for p in places[1:]] == pytest.approx([p.y1 for p in places[:-1]])
    assert inside.x1 <= legend.x0 < legend.x1 <= figure.bbox.x1
    assert legend.y0 + legend.y1 == pytest.approx(inside.y0 + inside.y1, abs=2)
    assert not axes.get_legend().get_frame_on()
    assert result.plot(axes) is axes
