"""Adapting: what it changes in a detector, and what it keeps."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
import threading

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import detection, get_model, resnet50
from torchvision.models.detection import backbone_utils
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from alphafpn import AnchorFit, adapt_detector, fold_alpha, patch_detector
from alphafpn.adapt import start_of
from alphafpn.tiny.detectors import tiny_retinanet
from tests import detectors
from tests.detectors import (
    DETECTORS,
    SIZES,
    generator_of,
    make_batch,
    make_detector,
    make_stages,
    squares,
)
from tests.pyramids import NORMS

ONE_STAGE = ["fcos_resnet50_fpn", "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"]
OUT = 64  # two channels for each group of FCOS's head


# Detectors of a few thousand weights


def make_retinanet(levels=3, size=16, backbone=None, **kwargs):
    backbone = backbone or make_stages(levels, LastLevelP6P7(OUT, OUT))
    return detectors.make_retinanet(backbone, levels + 2, size, **kwargs)


def make_fcos(levels=3, size=16, **kwargs):
    backbone = make_stages(levels, LastLevelP6P7(OUT, OUT))
    return detectors.make_fcos(backbone, levels + 2, size, **kwargs)


def make_rcnn(levels=3, size=16, backbone=None, **kwargs):
    backbone = backbone or make_stages(levels)
    kwargs = {"box_detections_per_img": 4, **kwargs}
    return detectors.make_faster_rcnn(backbone, levels + 1, size, **kwargs)


def make_mask_rcnn(**kwargs):
    head = detection.mask_rcnn.MaskRCNNHeads(OUT, (8,), 1)
    parts = {"mask_head": head, "mask_predictor": detection.mask_rcnn.MaskRCNNPredictor(8, 8, 2)}
    return make_rcnn(cls=detection.MaskRCNN, **parts, **kwargs)


def make_keypoint_rcnn(**kwargs):
    head = detection.keypoint_rcnn.KeypointRCNNHeads(OUT, (8,))
    predictor = detection.keypoint_rcnn.KeypointRCNNPredictor(8, 3)
    parts = {"keypoint_head": head, "keypoint_predictor": predictor}
    return make_rcnn(cls=detection.KeypointRCNN, **parts, **kwargs)


RCNNS = [make_rcnn, make_mask_rcnn, make_keypoint_rcnn]
BUILDERS = [make_retinanet, make_fcos, *RCNNS]


def make(build=make_retinanet, **kwargs):
    return make_detector(build, **kwargs)


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return get_model(name, weights=None, weights_backbone=None, **kwargs)


def cells_of(model):
    return [level.tolist() for level in generator_of(model).cell_anchors]


def maps_of(model, image):
    with torch.no_grad():
        return list(model.backbone(image).items())


def images(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, 64, 90, generator=generator), torch.rand(3, 70, 64, generator=generator)]


def assert_same_outputs(found, expected):
    with torch.no_grad():
        torch.testing.assert_close(found(images()), expected(images()), rtol=0, atol=0)


def row_of(model, scale=0.5, finer_level=False, input_scale=1, max_objects=150):
    """A row of `compare_anchors` for this detector; what a row shows is left out."""
    shown = {"anchor_sizes": (), "reached": 1.0, "cost": 1.0, "different_anchors": ()}
    start = dict(zip(("own_anchors", "own_input"), start_of(model), strict=True))
    fit = {"finer_level": finer_level, "input_scale": input_scale, "max_objects": max_objects}
    return AnchorFit(scale, estimate=None, **fit, **shown, **start)


# Anchors


@pytest.mark.parametrize("name", DETECTORS)
def test_halved_and_doubled_anchors_are_the_first(name):
    model = on_meta(name)
    generator = generator_of(model)
    parts = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    first, sizes = cells_of(model), generator.sizes
    radius = getattr(model, "center_sampling_radius", 0)
    others = pickle.dumps([model.transform, vars(generator)["aspect_ratios"]])

    assert adapt_detector(model, 0.5) is model
    halves = [tuple(size / 2 for size in level) for level in sizes]
    made = AnchorGenerator(tuple(halves), generator.aspect_ratios)
    assert cells_of(model) == [level.tolist() for level in made.cell_anchors]
    assert list(generator.sizes) == halves
    assert getattr(model, "center_sampling_radius", 0) == 2 * radius

    adapt_detector(model, 2)
    assert cells_of(model) == first
    assert generator.sizes == tuple(map(tuple, sizes))
    assert getattr(model, "center_sampling_radius", 0) == radius
    assert generator_of(model) is generator
    for before, after in ((parts, model.named_modules()), (parameters, model.named_parameters())):
        assert {path: id(part) for path, part in after} == {p: id(x) for p, x in before.items()}
    assert pickle.dumps([model.transform, vars(generator)["aspect_ratios"]]) == others


@functools.cache
def without_head():
    """A detector whose anchors may be any, since no head says how many there are."""
    model = make_rcnn()
    model.rpn.head = nn.Identity()
    return model


@settings(max_examples=30, deadline=None)
@given(
    scale=st.floats(0.25, 4).map(lambda scale: float(f"{scale:.3g}")),
    sizes=st.lists(st.integers(16, 600) | st.floats(16, 600, width=32), min_size=1, max_size=3),
    ratios=st.lists(st.floats(0.4, 2.5), min_size=1, max_size=3),
    as_list=st.booleans(),
)
@example(scale=0.3, sizes=[25, 32], ratios=[1.0], as_list=True)
def test_a_scale_and_its_inverse_give_the_first_anchors(scale, sizes, ratios, as_list):
    kind, model = list if as_list else tuple, without_head()
    levels = kind([kind(sizes)] * 4), kind([kind(ratios)] * 4)
    model.rpn.anchor_generator = AnchorGenerator(*levels)
    first = cells_of(model)
    adapt_detector(model, scale)
    made = [[size * scale for size in sizes]] * 4, [ratios] * 4
    assert cells_of(model) == [level.tolist() for level in AnchorGenerator(*made).cell_anchors]
    adapt_detector(model, 1 / scale)
    assert cells_of(model) == first
    assert np.allclose(generator_of(model).sizes, sizes, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("finer_level", [False, True])
@pytest.mark.parametrize("scale", [1, 0.5, 0.37, 0.03])
def test_handmade_cells_are_scaled_about_their_centres(dtype, finer_level, scale):
    """Also cells off the origin, not whole, and smaller than a pixel afterwards."""
    generator, model = torch.Generator().manual_seed(0), make(make_rcnn)
    corner = 4 * torch.rand(4, 1, 2, generator=generator) - 12
    cells = torch.cat([corner, corner + 9 + 20 * torch.rand(4, 1, 2, generator=generator)], -1)
    cells = cells.to(dtype)
    generator_of(model).cell_anchors = list(cells)
    adapt_detector(model, scale, finer_level=finer_level)
    found = torch.stack(generator_of(model).cell_anchors)
    exact = cells.double()
    centres = (exact[..., :2] + exact[..., 2:]).repeat(1, 1, 2) / 2
    expected = (centres + (exact - centres) * scale).to(dtype)
    if finer_level:
        expected = torch.cat([expected[:1] / 2, expected])
    torch.testing.assert_close(found, expected)
    if scale == 1:
        assert torch.equal(found[-4:], cells)
    adapt_detector(model, 1 / scale)
    again = torch.stack(generator_of(model).cell_anchors[-4:])
    # Up to the rounding of what was stored: 16 px are 2^-6 apart in half precision.
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(again, cells, rtol=0, atol=tolerance / min(scale, 1))


@pytest.mark.parametrize("sizes", [((3,), (5,), (7,), (9,)), ((16,), (32,), (64,), (128,), (256,))])
def test_sizes_that_did_not_make_the_cells_are_not_used(sizes):
    model = make(make_rcnn)
    first = cells_of(model)
    generator_of(model).sizes = sizes
    adapt_detector(model, 0.5)
    assert cells_of(model) == [[[side / 2 for side in cell] for cell in level] for level in first]
    assert generator_of(model).sizes == tuple((size / 2,) for (size,) in sizes)


def test_cells_in_half_precision_are_made_from_the_sizes():
    model = make(make_rcnn).half()
    generator_of(model).set_cell_anchors(torch.float16, torch.device("cpu"))
    adapt_detector(model, 1.3, finer_level=True)
    expected = AnchorGenerator(
        tuple((size * 1.3,) for size in (8, 16, 32, 64, 128)), ((1.0,),) * 5
    ).cell_anchors
    for found, level in zip(generator_of(model).cell_anchors, expected, strict=True):
        assert torch.equal(found, level.half())


# A finer level


def stock_with_finer_level(name):
    """The detector that torchvision builds with layer1 among the returned layers."""
    with torch.device("meta"):
        extra = LastLevelP6P7(2048 if name.endswith("v2") else 256, 256)
        backbone = backbone_utils._resnet_fpn_extractor(resnet50(), 5, [1, 2, 3, 4], extra)
        if name.startswith("fcos"):
            return detection.FCOS(backbone, 91, anchor_generator=squares(6))
        sizes = tuple((x, 1.3 * x, 1.6 * x) for x in (16, 32, 64, 128, 256, 512))
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 6)
        head = None
        if name.endswith("v2"):
            norm = lambda channels: nn.GroupNorm(32, channels)  # noqa: E731
            head = detection.retinanet.RetinaNetHead(256, 9, 91, norm_layer=norm)
        return detection.RetinaNet(backbone, 91, anchor_generator=anchors, head=head)


@pytest.mark.parametrize("name", ONE_STAGE)
def test_a_finer_level_is_what_torchvision_builds(name):
    model, stock = on_meta(name), stock_with_finer_level(name)
    parameters = {id(parameter) for parameter in model.parameters()}
    sizes, radius = generator_of(model).sizes, getattr(model, "center_sampling_radius", 0)
    adapt_detector(model, 1, finer_level=True)
    shapes = [[(k, x.shape) for k, x in m.state_dict().items()] for m in (model, stock)]
    assert shapes[0] == shapes[1]
    stock.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(stock.state_dict(), strict=True)
    new = [path for path, p in model.named_parameters() if id(p) not in parameters]
    assert {path.rsplit(".", 1)[0] for path in new} == {
        f"backbone.fpn.{kind}_blocks.0.0" for kind in ("inner", "layer")
    }
    assert parameters < {id(parameter) for parameter in model.parameters()}
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert type(model) is type(stock)
    assert type(model.backbone.fpn) is FeaturePyramidNetwork
    assert generator_of(model).sizes[0] == tuple(size / 2 for size in sizes[0])
    assert generator_of(model).sizes[1:] == tuple(map(tuple, sizes))
    assert getattr(model, "center_sampling_radius", 0) == radius


@pytest.mark.parametrize("build", [make_retinanet, make_fcos, make_rcnn])
def test_old_maps_stay_bitwise_and_new_blocks_train(build):
    model = make(build).eval()
    model.backbone.body.requires_grad_(False)
    image = torch.rand(1, 3, 64, 96)
    before = maps_of(model, image)
    adapt_detector(model, 0.5, finer_level=True)
    after = maps_of(model, image)
    extra = ["pool"] if build is make_rcnn else ["p6", "p7"]
    assert [key for key, _ in after] == ["0", "1", "2", "3", *extra]
    assert after[0][1].shape[2:] == (16, 24)
    for (_, old), (_, new) in zip(before, after[1:], strict=True):
        assert torch.equal(new, old)

    images, targets = make_batch()
    sum(model.train()(images[:1], targets[:1]).values()).backward()
    for path, parameter in model.backbone.fpn.named_parameters():
        assert parameter.grad.isfinite().all(), path
        assert parameter.grad.any(), path


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("build", BUILDERS)
def test_adapted_predicts_as_if_built_so(build, used):
    """With the same weights; also after a pass, of which torchvision's pools keep the scales."""
    model = make(build).eval()
    if used:
        with torch.no_grad():
            model(images())
    adapt_detector(model, 0.5, finer_level=True, input_scale=2)
    built = build(levels=4, size=4, **{name: 2 * size for name, size in SIZES.items()}).eval()
    if build is make_fcos:
        built.center_sampling_radius *= 2
    built.load_state_dict(model.state_dict())
    assert_same_outputs(model, built)
    names = {tuple(m.featmap_names) for m in model.modules() if isinstance(m, MultiScaleRoIAlign)}
    assert names == ({("0", "1", "2", "3")} if build in RCNNS else set())


@pytest.mark.parametrize("build", RCNNS)
def test_every_map_that_was_pooled_is_and_the_new_one(build):
    """Maps with names of their own, of which box, mask and keypoint pools take two."""
    model = make(build, backbone=make_stages(names=["fine", "middle", "coarse"]))
    pools = [part for part in model.modules() if isinstance(part, MultiScaleRoIAlign)]
    for keywords in ({}, {"input_scale": 2}, {"finer_level": True}):
        for pool in pools:
            pool.featmap_names = ["fine", "middle"]
            pool.scales, pool.map_levels = [1 / 8, 1 / 16], "of another input"
        adapt_detector(model, 1, **keywords)
        assert {(pool.scales, pool.map_levels) for pool in pools} == {(None, None)}
    names = [name for name, _ in maps_of(model.eval(), torch.rand(1, 3, 64, 64))]
    assert names == ["block2", "fine", "middle", "coarse", "pool"]
    assert [pool.featmap_names for pool in pools] == [["block2", "fine", "middle"]] * len(pools)
    assert len(pools) == 1 + (build is not make_rcnn)


def test_a_new_map_takes_no_name_that_is_taken():
    parts = [nn.Conv2d(3 if i == 0 else 4, 4, 3, 2, 1) for i in range(5)]
    layers = {"2": "1", "3": "2", "4": "3"}  # the stage of stride 4 is called 1
    backbone = backbone_utils.BackboneWithFPN(nn.Sequential(*parts), layers, [4] * 3, OUT)
    model = adapt_detector(make(make_rcnn, backbone=backbone), 1, finer_level=True)
    names = [name for name, _ in maps_of(model, torch.rand(1, 3, 64, 64))]
    assert names == ["finer 1", "1", "2", "3", "pool"]


def test_tiny_retinanet_gets_a_finer_level():
    torch.manual_seed(0)
    sizes = [16, 32, 64, 128]
    model = tiny_retinanet(make_stages(), weights_backbone=None, anchor_sizes=sizes)
    adapt_detector(model, 1, finer_level=True, max_objects=150)
    names = [name for name, _ in maps_of(model, torch.rand(1, 3, 64, 64))]
    assert names == ["0", "1", "2", "3", "pool"]
    sum(model(*make_batch()).values()).backward()
    assert model.backbone.fpn.layer_blocks[0][0].weight.grad.any()
    assert (model.detections_per_img, model.topk_candidates) == (200, 1000)


# The new blocks


def test_new_blocks_follow_the_finest_ones():
    model = make()
    for blocks in (model.backbone.fpn.inner_blocks, model.backbone.fpn.layer_blocks):
        blocks[0][0].bias = None
    adapt_detector(model, 1, finer_level=True)
    for blocks in (model.backbone.fpn.inner_blocks, model.backbone.fpn.layer_blocks):
        assert [block[0].bias is None for block in blocks] == [True, True, False, False]


@pytest.mark.parametrize(("training", "frozen"), [(True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("norm", NORMS)
def test_new_blocks_are_like_their_neighbours(norm, dtype, frozen, training):
    layer = NORMS[norm]
    model = make(make_rcnn, backbone=make_stages(norm=layer)).to(dtype).train(training)
    fpn = model.backbone.fpn.requires_grad_(not frozen)
    with torch.no_grad():
        for tensor in fpn.state_dict().values():
            tensor.add_(1)  # as if trained
    old = copy.deepcopy(fpn.state_dict())
    adapt_detector(model, 1, finer_level=True)
    expected = FeaturePyramidNetwork([6, 8, 10, 12], OUT, LastLevelMaxPool(), layer)
    assert repr(fpn) == repr(expected)
    for name, tensor in expected.state_dict().items():
        found = fpn.state_dict()[name]
        level = int(name.split(".")[1])
        if level:
            assert torch.equal(found, old[name.replace(f".{level}.", f".{level - 1}.", 1)]), name
        elif not name.endswith("0.0.weight"):  # of a convolution, which is random
            assert torch.equal(found, tensor.to(found.dtype)), name
        assert found.shape == tensor.shape
        assert found.dtype == (dtype if tensor.is_floating_point() else tensor.dtype)
    assert {parameter.requires_grad for parameter in fpn.parameters()} == {not frozen}
    assert {part.training for part in fpn.modules()} == {training}
    for blocks, inputs in ((fpn.inner_blocks, 6), (fpn.layer_blocks, 9 * OUT)):
        largest = blocks[0][0].weight.detach().abs().max()
        assert 0.8 < float(largest) / math.sqrt(3 / inputs) < 1.01  # He's uniform bound


@pytest.mark.parametrize("inference", [True, False])
def test_only_the_new_blocks_draw_random_numbers(inference):
    """A backbone that drops out draws none, and the same seed gives the same blocks."""
    state = torch.get_rng_state()
    drawn, weights = [], []
    for dropout in (0.0, 0.5):
        model = make()
        model.backbone.body["block3"].append(nn.Dropout(dropout))
        torch.set_rng_state(state)
        with torch.inference_mode(inference):
            adapt_detector(model, 0.5)
            assert torch.equal(torch.get_rng_state(), state)
            adapt_detector(model, 1, finer_level=True)
        drawn.append(torch.get_rng_state())
        weights.append(model.backbone.fpn.state_dict())
        sum(model(*make_batch()).values()).backward()  # also of blocks made under inference mode
    assert not torch.equal(drawn[0], state)
    assert torch.equal(*drawn)
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_hooks_of_the_neighbours_stay_theirs():
    """Hooks are not called for the new blocks, nor copied with what they hold."""
    model, calls = make().eval(), []
    hook = functools.partial(lambda lock, *args: calls.append(args), threading.Lock())
    block = model.backbone.fpn.inner_blocks[0]
    for part in (block, block[0]):
        part.register_forward_hook(hook)
        part.register_forward_pre_hook(hook)
    block[0].weight.register_hook(hook)
    adapt_detector(model, 1, finer_level=True)
    maps_of(model, torch.rand(1, 3, 64, 64))
    assert len(calls) == 4


# What trained weights predict


def decoded(model, image):
    """Boxes [A, 4] before any selection, and the centres of the anchors."""
    batch, _ = model.transform([image])
    features = list(model.backbone(batch.tensors).values())
    anchors = generator_of(model)(batch, features)
    if isinstance(model, detection.FasterRCNN):
        outputs = model.rpn.head(features)
        deltas = detection.rpn.concat_box_prediction_layers(*outputs)[1]
        boxes = model.rpn.box_coder.decode(deltas, anchors)[:, 0]
    else:
        deltas = model.head(features)["bbox_regression"][0]
        single = isinstance(model, detection.RetinaNet)
        boxes = (model.box_coder.decode_single if single else model.box_coder.decode)(
            deltas, anchors[0]
        )
    return boxes, (anchors[0][:, :2] + anchors[0][:, 2:]).repeat(1, 2) / 2


@pytest.mark.parametrize("scale", [0.5, 0.25, 2])
@pytest.mark.parametrize("build", [make_retinanet, make_fcos, make_rcnn])
def test_the_same_weights_predict_boxes_of_scaled_size(build, scale):
    model = make(build).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        before, centres = decoded(model, images()[0])
        adapt_detector(model, scale)
        after, same = decoded(model, images()[0])
    assert torch.equal(centres, same)
    assert float((before[:, 2:] - before[:, :2]).std()) > 1
    torch.testing.assert_close(after - centres, (before - centres) * scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [0.5, 0.25])
def test_fcos_predicts_the_same_boxes_with_its_last_convolution_divided(scale):
    model = make(make_fcos).eval()
    expected = copy.deepcopy(model)
    adapt_detector(model, scale)
    with torch.no_grad():
        for parameter in model.head.regression_head.bbox_reg.parameters():
            parameter /= scale
        assert len(expected(images())[0]["boxes"]) > 20
    assert_same_outputs(model, expected)


# Input and caps


@pytest.mark.parametrize("scale", [2, 0.5, np.float32(1.5)])
def test_every_size_of_the_input_is_scaled(scale):
    model = make(min_size=(64, 80), max_size=128, fixed_size=(96, 64))
    adapt_detector(model, 1, input_scale=scale)
    found = model.transform.min_size, model.transform.max_size, model.transform.fixed_size
    assert found == ((64 * scale, 80 * scale), 128 * scale, (96 * scale, 64 * scale))
    assert all(isinstance(size, int) for size in (*found[0], found[1], *found[2]))
    (image,) = model.transform([torch.rand(3, 50, 50)])[0].image_sizes
    assert image == (64 * scale, 96 * scale)


def test_an_input_may_shrink_to_one_pixel():
    for fixed, expected in ((None, None), ((2, 3), (1, 2))):
        model = make(min_size=2, max_size=3, fixed_size=fixed)
        transform = adapt_detector(model, 1, input_scale=0.5).transform
        assert (transform.min_size, transform.max_size) == ((1,), 2)
        assert transform.fixed_size == expected


@pytest.mark.parametrize(
    ("objects", "detections"), [(1, 300), (300, 300), (301, 400), (np.int64(400), 400)]
)
def test_caps_are_rounded_up_and_never_lowered(objects, detections):
    model = adapt_detector(
        make(detections_per_img=300, topk_candidates=500), 1, max_objects=objects
    )
    assert (model.detections_per_img, model.topk_candidates) == (
        detections,
        max(500, 2 * math.ceil(objects / 100) * 100),
    )
    assert type(model.detections_per_img) is int


def test_caps_of_two_stages():
    model = make(make_rcnn, rpn_pre_nms_top_n_train=900, rpn_post_nms_top_n_test=100)
    adapt_detector(model, 1, max_objects=401)
    assert model.roi_heads.detections_per_img == 500
    assert model.rpn._pre_nms_top_n == {"training": 1000, "testing": 1000}
    assert model.rpn._post_nms_top_n == {"training": 2000, "testing": 1000}
    before = copy.deepcopy(vars(model.rpn))
    adapt_detector(model, 1, max_objects=7)
    assert model.rpn._pre_nms_top_n == before["_pre_nms_top_n"]
    assert model.rpn._post_nms_top_n == before["_post_nms_top_n"]
    assert model.roi_heads.detections_per_img == 500


# Rows of a comparison


def test_a_row_is_the_call_that_it_stands_for():
    call = {"finer_level": True, "input_scale": 2, "max_objects": 350}
    by_row = adapt_detector(make(), row_of(make(), 0.5, **call))
    by_hand = adapt_detector(make(), 0.5, **call)
    by_row.load_state_dict(by_hand.state_dict())
    assert_same_outputs(by_row.eval(), by_hand.eval())
    assert by_row.topk_candidates == by_hand.topk_candidates == 1000
    assert by_row.detections_per_img == 400


def test_a_row_shows_what_a_call_takes():
    shown = repr(row_of(make()))
    for name in ("estimate", "different_anchors", "own_anchors", "own_input"):
        assert name not in shown
    assert "anchor_scale=0.5" in shown


# Models that hold the detector; copies and files


@pytest.mark.parametrize("wrap", [nn.Sequential, nn.DataParallel])
def test_the_one_detector_in_a_module_is_adapted(wrap):
    model = make()
    wrapped = wrap(model)
    assert adapt_detector(wrapped, 0.5, finer_level=True) is wrapped
    assert generator_of(model).sizes[0] == (4.0,)
    assert len(model.backbone.fpn.inner_blocks) == 4


def through_file(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("restored", [copy.deepcopy, through_file])
@pytest.mark.parametrize("build", [make_retinanet, make_fcos, make_rcnn])
def test_copies_are_adapted_already(build, restored):
    model = make(build).eval()
    row = row_of(model, finer_level=True)
    other = restored(adapt_detector(model, row))
    assert_same_outputs(other, model)
    with pytest.raises(ValueError, match="is the detector already adapted"):
        adapt_detector(other, row)


def test_adapted_patches_and_folds():
    model = adapt_detector(make().eval(), 0.5, finer_level=True)
    image, stock = torch.rand(1, 3, 64, 96), copy.deepcopy(model)
    patched = dict(maps_of(patch_detector(model, [0.5, 0.4, 0.3]), image))
    folded = dict(maps_of(fold_alpha(model), image))
    torch.testing.assert_close(folded, patched)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert not torch.allclose(folded["0"], maps_of(stock, image)[0][1])
