from __future__ import annotations

import copy
import math
import threading
import types

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import detection, get_model
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from alphafpn import AnchorLayout
from alphafpn.estimate.probe import DetectorProbe
from tests.anchor_sets import cell_anchors, seeds
from tests.detectors import DETECTORS, generator_of, make_backbone, small_detector
from tests.states import assert_unchanged, snapshot


def build(name, **kwargs):
    return get_model(name, weights=None, weights_backbone=None, **kwargs).eval()


def generated(model, image_size):
    """What the detector's own anchor generator makes of an image, in a batch of one."""
    caught = []
    generator = generator_of(model)
    hook = generator.register_forward_hook(lambda _, __, anchors: caught.append(anchors))
    with torch.no_grad():
        model([torch.rand(3, *image_size)])
    hook.remove()
    ((anchors,),) = caught
    return anchors


def placed(model, layout, image_size):
    """As `generated`, with empty feature maps of the layout's sizes in place of the backbone's."""
    images, _ = model.transform([torch.empty(3, *image_size, device="meta")])
    maps = [torch.empty(1, 1, *size) for size in layout.grid_sizes]
    images = ImageList(images.tensors, images.image_sizes)
    return generator_of(model)(images, maps)[0]


def small_retinanet(backbone=None, levels=4, **kwargs):
    sizes = [8 * 2**i for i in range(levels)]
    return small_detector(sizes=sizes, backbone=backbone, **kwargs).eval()


# What the layout of a detector is


RUNNING = (
    "fasterrcnn_resnet50",
    "fasterrcnn_mobilenet_v3_large_320",
    "fcos_resnet50",
    "retinanet_",
)


@pytest.mark.parametrize("name", [n for n in DETECTORS if n.startswith(RUNNING)])
def test_layouts_are_those_of_running_detectors(name):
    model = build(name, min_size=64, max_size=160)
    for size in ((64, 64), (37, 91), (150, 31)):
        layout = AnchorLayout.from_detector(model, size)
        assert torch.equal(torch.cat(layout.anchors()), generated(model, size))


@pytest.mark.parametrize("name", DETECTORS)
def test_layouts_are_those_of_every_builder(name):
    with torch.device("meta"):
        model = build(name)
    view = DetectorProbe(model)
    for size in ((480, 640), (427, 641), (1, 1), (2000, 90), (333, 1999)):
        if min(view.resize.transform.min_size) * max(size) / min(size) > 1e5:
            continue
        layout = AnchorLayout.from_detector(model, size)
        assert torch.equal(torch.cat(layout.anchors()), placed(model, layout, size))
    assert layout.num_fused_levels == len(model.backbone.fpn.inner_blocks)
    assert (view.is_fcos, name.startswith("fcos")) in {(True, True), (False, False)}


def test_p6_strides_are_what_torchvision_divides():
    with torch.device("meta"):
        model = build("fasterrcnn_resnet50_fpn")
    layout = AnchorLayout.from_detector(model, (800, 1088))
    assert list(layout.strides) == [(s, s) for s in (4, 8, 16, 32)] + [(61, 64)]
    assert layout.level_names == ("P2", "P3", "P4", "P5", "P6")
    with torch.device("meta"):
        model = build("retinanet_resnet50_fpn_v2")
    layout = AnchorLayout.from_detector(model, (800, 1088))
    assert layout.level_names == ("P3", "P4", "P5", "P6", "P7")
    assert (layout.num_fused_levels, len(layout.cell_anchors[0])) == (3, 9)


@pytest.mark.parametrize(
    ("extra", "levels"),
    [(None, 3), (LastLevelMaxPool(), 4), (LastLevelP6P7(8, 16), 5), (LastLevelP6P7(16, 16), 5)],
    ids=["no extra", "pool", "p6p7 on c5", "p6p7 on p5"],
)
def test_custom_backbones(extra, levels):
    # `BackboneWithFPN` puts a pool where there is no extra block.
    backbone = make_backbone(extra, 16)
    if extra is None:
        backbone.fpn.extra_blocks = None
    model = small_retinanet(backbone, levels)
    for size in ((64, 64), (50, 77), (99, 40)):
        layout = AnchorLayout.from_detector(model, size)
        assert layout.num_fused_levels == 3
        assert torch.equal(torch.cat(layout.anchors()), generated(model, size))


class Oblong(BackboneWithFPN):
    """Halves rows once more than columns, and only in large images."""

    def forward(self, x):
        if x.shape[-1] > 80:
            x = x[..., ::2, :]
        return super().forward(x)


class SingleMap(BackboneWithFPN):
    def forward(self, x):
        return super().forward(x)["1"]


class LooksAtValues(BackboneWithFPN):
    def forward(self, x):
        return super().forward(x if x.sum().item() == 0 else x[..., ::2])


class Unregistered(BackboneWithFPN):
    """Holds a tensor that is neither parameter nor buffer, and a batch norm of a subclass."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.mean = torch.full((3, 1, 1), 0.5)
        self.body.add_module("last", nn.SyncBatchNorm(8))

    def forward(self, x):
        return super().forward(x - self.mean)


def test_a_backbone_that_treats_rows_and_columns_differently():
    model = small_retinanet(make_backbone(None, cls=Oblong), min_size=64, max_size=160)
    sizes = ((64, 64), (64, 96), (160, 96), (96, 160))
    for some in (sizes, sizes[::-1]):
        view = DetectorProbe(model)
        for size in some:
            layout = AnchorLayout(*view.anchor_grids(view.resize.frame(size)[1]))
            assert torch.equal(torch.cat(layout.anchors()), generated(model, size))


def test_a_backbone_with_a_single_map_is_of_one_level_and_refused():
    model = small_retinanet(make_backbone(None, cls=SingleMap), 1)
    assert DetectorProbe(model).feature_maps((64, 64)) == [("0", (8, 8))]
    with pytest.raises(ValueError, match="number of levels"):
        AnchorLayout.from_detector(model, (64, 64))


@pytest.mark.parametrize("cls", [LooksAtValues, Unregistered])
def test_backbones_that_meta_tensors_are_hard_on(cls):
    model = small_retinanet(make_backbone(None, cls=cls))
    layout = AnchorLayout.from_detector(model, (64, 96))
    assert torch.equal(torch.cat(layout.anchors()), placed(model, layout, (64, 96)))
    assert layout.grid_sizes[0] == (16, 24)


def test_a_backbone_that_fails_fails_with_its_own_error():
    class Broken(BackboneWithFPN):
        def forward(self, x):
            raise KeyError("no such stage")

    model = small_retinanet(make_backbone(None, cls=Broken))
    with pytest.raises(KeyError, match="no such stage"):
        AnchorLayout.from_detector(model, (64, 64))


def test_hooks_are_not_called():
    def hook(*_):
        raise AssertionError("called")

    class Watcher:
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

        def __call__(self, *_):
            raise AssertionError("called")

    model = small_retinanet()
    for module in (model.backbone, model.backbone.fpn, model.backbone.body["0"], model.transform):
        module.register_forward_hook(hook)
        module.register_forward_pre_hook(hook)
        module.register_forward_hook(Watcher())
    AnchorLayout.from_detector(model, (64, 64))
    assert len(model.backbone.fpn._forward_hooks) == 2


def test_attributes_that_cannot_be_copied_are_shared():
    model = small_retinanet()
    model.backbone.lock = threading.Lock()
    assert DetectorProbe(model).detector.backbone.lock is model.backbone.lock


def test_one_probe_for_each_length():
    view = DetectorProbe(small_retinanet())
    probed = []
    view.detector.backbone.register_forward_pre_hook(
        lambda module, args: probed.append(tuple(args[0].shape[2:]))
    )
    lengths = (64, 96, 128)
    for padded in ((h, w) for h in lengths for w in lengths):
        view.feature_maps(padded)
    # And one of the first oblong shape, which shows that rows and columns are alike.
    assert sorted(probed) == [(64, 64), (64, 96), (96, 96), (128, 128)]


def test_shapes_come_without_data():
    view = DetectorProbe(small_retinanet())
    assert all(tensor.is_meta for tensor in view.detector.state_dict().values())
    # Nor do those of a backbone with tensors that it has not registered.
    view = DetectorProbe(small_retinanet(make_backbone(None, cls=Unregistered)))
    view.feature_maps((64, 64))
    assert view.detector.backbone.mean.is_meta


def test_wrapped_detectors():
    model = small_retinanet()
    expected = AnchorLayout.from_detector(model, (70, 90)).anchors()
    # No wrapper, though it has a part of that name.
    model.module = nn.Identity()
    compiled_backbone = small_retinanet()
    compiled_backbone.backbone = torch.compile(compiled_backbone.backbone)
    for wrapped in (
        torch.compile(model),
        nn.DataParallel(model),
        torch.compile(nn.DataParallel(model)),
        compiled_backbone,
    ):
        found = AnchorLayout.from_detector(wrapped, (70, 90)).anchors()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert DetectorProbe(torch.compile(small_detector("fcos"))).is_fcos


def test_half_precision_and_cell_anchors_of_ones_own():
    model = small_retinanet().half()
    model.anchor_generator.cell_anchors = [
        cell_anchors([(6.2, 12.4), (9.1, 3.3), (7, 5)], [(s / 2, s / 2)] * 3, torch.float64)
        for s in (4, 8, 16, 32)
    ]
    layout = AnchorLayout.from_detector(model, (64, 64))
    assert [cells.dtype for cells in layout.cell_anchors] == [torch.float32] * 4
    model.float()
    assert torch.equal(torch.cat(layout.anchors()), generated(model, (64, 64)))


# The resize


def framed(view, size):
    return [view.resize.frame(size, min_size) for min_size in view.resize.min_sizes]


def transforms_own(transform, size, min_size):
    """What the transform itself does to an image; None where nothing would be left of it."""
    transform = copy.copy(transform).eval()
    transform.min_size = (min_size,)
    try:
        images, _ = transform([torch.empty(3, *size, device="meta")])
    except (RuntimeError, ZeroDivisionError):
        return None
    return images.image_sizes[0], tuple(images.tensors.shape[-2:])


@pytest.fixture(scope="module")
def stock_view():
    return DetectorProbe(small_retinanet())


@settings(max_examples=30, deadline=None)
@given(
    seed=seeds,
    min_sizes=st.lists(st.integers(1, 1500), min_size=1, max_size=3),
    max_size=st.integers(1, 2000),
    divisible=st.sampled_from([32, 1, 7, 64, 128]),
)
@example(0, [800], 1333, 32)
@example(1, [640, 672, 704, 736, 768, 800], 1333, 32)
def test_the_resize_is_the_transforms_own(stock_view, seed, min_sizes, max_size, divisible):
    view = copy.copy(stock_view)
    view.resize.transform = GeneralizedRCNNTransform(
        min_sizes, max_size, [0.5] * 3, [0.5] * 3, size_divisible=divisible
    )
    rng = np.random.default_rng(seed)
    image_sizes = rng.integers(1, rng.choice([50, 700, 3000]), (10, 2)).tolist()
    for size in map(tuple, image_sizes):
        for min_size in view.resize.min_sizes:
            expected = transforms_own(view.resize.transform, size, min_size)
            if expected is None:
                with pytest.raises(ValueError, match="resized to"):
                    view.resize.frame(size, min_size)
            else:
                assert view.resize.frame(size, min_size) == expected


@pytest.mark.parametrize("training", [True, False])
def test_fixed_sizes_and_skipped_resizes(training):
    fixed = small_retinanet(min_size=(40, 64), fixed_size=(96, 60)).train(training)
    assert DetectorProbe(fixed).resize.min_sizes == (None,)
    assert DetectorProbe(fixed).resize.frame((10, 300)) == ((60, 96), (64, 96))
    skipping = small_retinanet(_skip_resize=True).train(training)
    expected = ((50, 70), (64, 96)) if training else ((64, 89), (64, 96))
    assert DetectorProbe(skipping).resize.frame((50, 70)) == expected
    assert DetectorProbe(skipping).resize.min_sizes == ((None,) if training else (64,))
    if not training:
        for model in (fixed, skipping):
            layout = AnchorLayout.from_detector(model, (50, 70))
            assert torch.equal(torch.cat(layout.anchors()), generated(model, (50, 70)))


def test_several_min_sizes():
    view = DetectorProbe(small_retinanet(min_size=(40, 64, 56)).train())
    assert view.resize.min_sizes == (40, 64, 56)
    assert framed(view, (50, 50)) == [((side, side), (64, 64)) for side in (40, 64, 56)]
    # Evaluation takes the last.
    assert view.resize.frame((50, 50)) == view.resize.frame((50, 50), 56)


class NoResize(GeneralizedRCNNTransform):
    def resize(self, image, target=None):
        return image, target


class Snapped(GeneralizedRCNNTransform):
    """Sides that are multiples of 48, by way of numpy."""

    def resize(self, image, target=None):
        height, width = (48 * math.ceil(n / 48) for n in image.numpy().shape[-2:])
        return torch.zeros(3, height, width), target


class Square(GeneralizedRCNNTransform):
    def batch_images(self, images, size_divisible=32):
        side = max(max(image.shape[-2:]) for image in images)
        return images[0].new_zeros(len(images), 3, side, side)


class Other(nn.Module):
    """No subclass of torchvision's."""

    def forward(self, images, targets=None):
        return ImageList(images[0][None, ..., :32], [(20, 32)]), targets

    def postprocess(self, result, *_):
        return result


def own(cls):
    return cls((40, 64), 100, [0.5] * 3, [0.5] * 3)


def replaced_on_the_instance():
    transform = own(GeneralizedRCNNTransform)
    transform.resize = types.MethodType(lambda _, image, target: (image, target), 1)
    return transform


@pytest.mark.parametrize(
    ("transform", "frames"),
    [
        (own(NoResize), [((50, 70), (64, 96))]),
        (own(Snapped), [((96, 96), (96, 96))]),
        (own(Square), [((40, 56), (56, 56)), ((64, 89), (89, 89))]),
        (replaced_on_the_instance(), [((50, 70), (64, 96))]),
        (Other(), [((20, 32), (50, 32))]),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_transforms_of_ones_own(transform, frames, training):
    model = small_retinanet()
    model.transform = transform
    before = snapshot(model.train(training))
    assert framed(DetectorProbe(model), (50, 70)) == frames
    layout = AnchorLayout.from_detector(model, (50, 70))
    assert_unchanged(model, before)
    assert torch.equal(torch.cat(layout.anchors()), generated(model.eval(), (50, 70)))


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (640, TypeError, r"image_size: expected \(height, width\) in whole numbers, found 640"),
        ((1.5, 2), TypeError, r"found \(1.5, 2\)"),
        ((1, 2, 3), TypeError, r"found \(1, 2, 3\)"),
        ((0, 10), ValueError, r"image_size: expected .* of at least 1, found \(0, 10\)"),
        ((1, 5000), ValueError, r"\(1, 5000\) is resized to \(0, 100\)"),
    ],
)
def test_image_sizes_that_are_refused(size, error, message):
    with pytest.raises(error, match=message):
        AnchorLayout.from_detector(small_retinanet(), size)


def test_an_image_may_be_one_pixel_high():
    assert DetectorProbe(small_retinanet()).resize.frame((1, 100)) == ((1, 100), (32, 128))


def test_models_that_are_refused():
    with torch.device("meta"):
        ssd = detection.ssd300_vgg16(weights=None, weights_backbone=None)
    no_fpn = small_retinanet()
    no_fpn.backbone.fpn = nn.Identity()

    class Shifted(AnchorGenerator):
        def grid_anchors(self, grid_sizes, strides):
            return [a + 1 for a in super().grid_anchors(grid_sizes, strides)]

    shifted = small_retinanet()
    shifted.anchor_generator = Shifted()
    patched = small_retinanet()
    patched.anchor_generator.forward = lambda *_: []
    transform_only, backbone_only = nn.Module(), nn.Module()
    transform_only.transform, backbone_only.backbone = shifted.transform, shifted.backbone
    for part in (transform_only, backbone_only):
        part.anchor_generator = AnchorGenerator()
    for model, message in (
        (transform_only, "found none in Module"),
        (backbone_only, "found none in Module"),
        (ssd, "SSD with DefaultBoxGenerator"),
        (nn.Linear(2, 2), "found none in Linear"),
        (None, "found NoneType"),
        ("fasterrcnn", "found str"),
        (no_fpn, "RetinaNet: expected a FeaturePyramidNetwork"),
        (shifted, "Shifted places anchors in its own way"),
        (patched, "AnchorGenerator places anchors in its own way"),
    ):
        with pytest.raises(TypeError, match=message):
            AnchorLayout.from_detector(model, (64, 64))
    wrong = small_retinanet(levels=3)
    with pytest.raises(ValueError, match=r"4 feature maps \['0', '1', '2', 'pool'\], found 3"):
        AnchorLayout.from_detector(wrong, (64, 64))
