"""The paper's other detectors: losses against loops, factors, and that they learn."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork, box_iou

from alphafpn import (
    AlphaFeaturePyramidNetwork,
    AnchorLayout,
    estimate_alpha_for,
    fold_alpha,
    patch_detector,
)
from alphafpn.tiny import evaluate_tiny, tiny_faster_rcnn, tiny_retinanet
from benchmarks.paper.config import Config
from benchmarks.paper.detectors import free_anchor, grid_rcnn, libra_rcnn, tiny_fcos
from benchmarks.paper.detectors.free_anchor import FreeAnchorHead, bag_losses
from benchmarks.paper.detectors.grid_rcnn import (
    Exchange,
    GridHead,
    boxes_from_maps,
    neighbours,
    target_maps,
)
from benchmarks.paper.detectors.libra_rcnn import (
    BalancedPyramid,
    LibraRoIHeads,
    NonLocal,
    balanced_l1,
    sample_evenly,
)
from benchmarks.paper.models import make_detector
from tests.paper import references
from tests.tiny.test_detectors import FACTORS, build, scene, small_backbone

NAMES = ("freeanchor", "librarcnn", "gridrcnn", "fcos")
BUILDERS = (free_anchor, libra_rcnn, grid_rcnn, tiny_fcos)
FEW = {
    "box_batch_size_per_image": 32,
    "rpn_post_nms_top_n_train": 100,
    "rpn_post_nms_top_n_test": 100,
}
FEW_POINTS = {"grid_channels": 36, "grid_convolutions": 1, "grid_rois": 4}
seeds = st.integers(0, 2**32 - 1)


def small(name, **changes):
    """A detector of a configuration, with small parts."""
    changes = {"backbone": "small", "weights": "none", "channels": 32, **changes}
    return make_detector(Config(detector=name, **changes), 2)


def rough_boxes(generator, count, side=64.0):
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 0.7 * side
    sides = 4 + 0.25 * side * torch.rand(count, 2, generator=generator, dtype=torch.float64)
    return torch.cat([corner, corner + sides], 1)


# FreeAnchor


@given(seed=seeds, objects=st.integers(0, 4), bag_size=st.integers(1, 9))
@settings(max_examples=15, deadline=None)
def test_freeanchor_s_loss_is_the_literal_one(seed, objects, bag_size):
    generator = torch.Generator().manual_seed(seed)
    head = FreeAnchorHead(RetinaNetHead(4, 1, 3), bag_size)
    head.regression_head.box_coder.weights = (10.0, 10.0, 5.0, 5.0)
    images, targets, logits, deltas, anchors = [], [], [], [], []
    for count in (objects, 2):
        boxes = rough_boxes(generator, count)
        labels = torch.randint(1, 3, (count,), generator=generator)
        # Around the objects, so that some of the predicted boxes are on them.
        near = boxes.repeat(9, 1) + 0.5 * torch.randn(9 * count, 4, generator=generator).double()
        cells = torch.cat([near, rough_boxes(generator, 40 - len(near))])
        logit = torch.randn(40, 3, generator=generator, dtype=torch.float64)
        delta = 0.3 * torch.randn(40, 4, generator=generator, dtype=torch.float64)
        scores = logit.sigmoid().tolist()
        parts = (delta.tolist(), cells.tolist(), boxes.tolist(), labels.tolist())
        images.append((scores, *parts))
        targets.append({"boxes": boxes, "labels": labels})
        logits.append(logit)
        deltas.append(delta)
        anchors.append(cells)
    outputs = {"cls_logits": torch.stack(logits), "bbox_regression": torch.stack(deltas)}
    losses = head.compute_loss(targets, outputs, anchors, [])
    expected = references.free_anchor(images, bag_size)
    assert [float(v) for v in losses.values()] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_freeanchor_infers_as_retinanet_does():
    model = build(free_anchor)
    other = build(tiny_retinanet)
    assert model.state_dict().keys() == other.state_dict().keys()
    other.load_state_dict(model.state_dict())
    image, _ = scene()
    for part in (model, other):
        part.score_thresh = 0.0
    found, expected = (part.eval()([image])[0] for part in (model, other))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(found["boxes"]) == 100
    prior = torch.sigmoid(model.head.classification_head.cls_logits.bias)
    assert torch.allclose(prior, torch.full_like(prior, 0.02))


def test_a_bag_takes_the_best_anchor_once_it_is_good_and_the_mean_before():
    low = torch.tensor([[0.01, 0.02, 0.03]])
    assert float(bag_losses(low)) == pytest.approx(-0.5 * math.log(0.02), rel=1e-2)
    assert float(bag_losses(torch.tensor([[0.01, 0.02, 1 - 1e-6]]))) < 1e-5


# Libra R-CNN


@given(st.lists(st.floats(-5, 5), min_size=1))
def test_the_balanced_loss_is_the_literal_one(values):
    found = balanced_l1(torch.tensor(values, dtype=torch.float64)).tolist()
    assert found == pytest.approx([references.balanced_l1(v) for v in values], rel=1e-6, abs=1e-12)


def test_the_balanced_loss_and_its_slope_go_on_where_its_pieces_meet():
    x = torch.tensor([1 - 1e-6, 1 + 1e-6], dtype=torch.float64, requires_grad=True)
    loss = balanced_l1(x)
    (slope,) = torch.autograd.grad(loss.sum(), x)
    assert loss.tolist() == pytest.approx([loss[0].item()] * 2, abs=1e-5)
    assert slope.tolist() == pytest.approx([1.5, 1.5], abs=1e-5)


@given(seed=seeds, size=st.integers(0, 60), count=st.integers(0, 40))
@settings(deadline=None)
def test_background_is_drawn_evenly_over_its_iou(seed, size, count):
    """As many from each third as its share, or all that it has; the rest from what is left."""
    torch.manual_seed(seed)
    iou = 0.5 * torch.rand(size) ** 3
    chosen = sample_evenly(iou, count, 0.5).tolist()
    assert len(set(chosen)) == len(chosen) == min(count, size)
    thirds = [[], [], []]
    for index, value in enumerate(iou.tolist()):
        thirds[min(2, int(value / (0.5 / 3)))].append(index)
    shares = [count // 3, (2 * count) // 3 - count // 3, count - (2 * count) // 3]
    for third, share in zip(thirds, shares, strict=True):
        assert len(set(third) & set(chosen)) >= min(share, len(third))


def test_all_background_of_a_third_is_as_likely():
    torch.manual_seed(0)
    iou = torch.cat([torch.full((30,), 0.05), torch.full((6,), 0.2), torch.full((6,), 0.45)])
    drawn = torch.zeros(len(iou))
    for _ in range(600):
        drawn[sample_evenly(iou, 9, 0.5)] += 1
    # Three from each: a tenth of the first third, half of the others.
    expected = torch.cat([torch.full((30,), 0.1), torch.full((12,), 0.5)])
    assert torch.allclose(drawn / 600, expected, atol=0.08)


def test_the_heads_sample_the_background_by_the_iou_of_the_proposals():
    model = build(libra_rcnn, box_batch_size_per_image=30)
    heads = model.roi_heads
    boxes = torch.tensor([[40.0, 40, 60, 60]])
    rough = torch.rand(400, 2) * 70
    far = torch.cat([rough, rough + 8], 1)
    shift = torch.linspace(11, 13, 9)[:, None]  # IoU .2 to .3: in the second third of [0, .5)
    near = boxes + shift * torch.tensor([1.0, 0, 1, 0])
    for proposals in (torch.cat([far, near]), far[:5]):
        _, labels = heads.assign_targets_to_proposals([proposals], [boxes], [torch.ones(1)])
        (chosen,) = heads.subsample(labels)
        assert (labels[0][chosen] >= 0).all()
        assert torch.equal(chosen, chosen.unique())
        if len(proposals) > 5:
            assert set(range(400, 409)) <= set(chosen.tolist())
    empty = heads.assign_targets_to_proposals([far], [boxes[:0]], [torch.ones(0)])[1]
    assert len(heads.subsample(empty)[0]) == 30


def literal_balance(levels, refine):
    """The balanced pyramid, level by level, with what is nearest or largest looked up."""
    size = levels[2].shape[-2:]

    def at(level, target):
        rows, columns = target
        height, width = level.shape[-2:]
        found = level.new_zeros(*level.shape[:2], rows, columns)
        for y in range(rows):
            for x in range(columns):
                if height >= rows:
                    top, bottom = y * height // rows, -(-(y + 1) * height // rows)
                    left, right = x * width // columns, -(-(x + 1) * width // columns)
                    found[..., y, x] = level[..., top:bottom, left:right].amax((-2, -1))
                else:
                    found[..., y, x] = level[..., y * height // rows, x * width // columns]
        return found

    mean = sum(at(level, size) for level in levels) / len(levels)
    refined = mean.clone()
    query, key, value = (part(mean) for part in (refine.query, refine.key, refine.value))
    n, _, h, w = mean.shape
    for image in range(n):
        for i in range(h * w):
            here = query[image].flatten(1)[:, i]
            scores = torch.exp(
                torch.stack([here @ key[image].flatten(1)[:, j] for j in range(h * w)])
            )
            seen = (value[image].flatten(1) * scores).sum(1) / scores.sum()
            out = refine.out.weight[:, :, 0, 0] @ seen + refine.out.bias
            refined[image, :, i // w, i % w] += out
    return [level + at(refined, level.shape[-2:]) for level in levels]


@pytest.mark.parametrize("size", [(32, 48), (20, 28)])
def test_the_balanced_pyramid_is_the_literal_one(size):
    torch.manual_seed(0)
    balance = BalancedPyramid(6, None).double()
    with torch.no_grad():
        for parameter in balance.parameters():
            parameter.normal_(0, 0.5)
        sizes = [tuple(-(-side // 2**i) for side in size) for i in range(5)]
        levels = [torch.randn(2, 6, *shape, dtype=torch.float64) for shape in sizes]
        found, names = balance(levels, [], list("abcde"))
        expected = literal_balance(levels, balance.refine)
    assert names == list("abcde")
    for level, other in zip(found, expected, strict=True):
        torch.testing.assert_close(level, other, rtol=1e-6, atol=1e-9)


def test_the_refinement_begins_as_the_identity():
    x = torch.rand(1, 8, 5, 6)
    assert torch.equal(NonLocal(8)(x), x)


def step(model):
    images, targets = zip(*[scene(seed=seed) for seed in range(2)], strict=True)
    torch.manual_seed(3)
    losses = model(list(images), copy.deepcopy(list(targets)))
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {name: float(loss.detach()) for name, loss in losses.items()}, gradients


def test_libra_rcnn_with_all_parts_off_is_faster_rcnn():
    anchors = {"anchor_sizes": (8, 16, 32, 64, 128), "aspect_ratios": (0.5, 1.0, 2.0)}
    off = dict.fromkeys(("balanced_sampling", "balanced_pyramid", "balanced_loss"), False)
    stock, model = build(tiny_faster_rcnn, **anchors, **FEW), build(libra_rcnn, **off, **FEW)
    (losses, gradients), (expected, others) = step(model), step(stock)
    assert losses == expected
    assert all(torch.equal(gradients[name], others[name]) for name in others)
    assert gradients.keys() == others.keys()
    image, _ = scene()
    found, known = (part.eval()([image])[0] for part in (model, stock))
    assert all(torch.equal(found[name], known[name]) for name in known)


@pytest.mark.parametrize("part", ["balanced_sampling", "balanced_pyramid", "balanced_loss"])
def test_each_part_of_libra_rcnn_can_be_off(part):
    off = dict.fromkeys(("balanced_sampling", "balanced_pyramid", "balanced_loss"), False)
    names = [name for name, _ in build(libra_rcnn, **off).named_parameters()]
    model = build(libra_rcnn, **{**off, part: True}, **FEW)
    losses, _ = step(model)
    expected, _ = step(build(libra_rcnn, **off))
    assert losses.keys() == expected.keys()
    own = losses["loss_box_reg"] == expected["loss_box_reg"]
    assert not own
    assert (losses["loss_objectness"] == expected["loss_objectness"]) == (
        part != "balanced_pyramid"
    )
    assert (len(list(model.parameters())) > len(names)) == (part == "balanced_pyramid")


def test_the_box_loss_is_the_balanced_one_over_all_rois(monkeypatch):
    seen = {}
    select = LibraRoIHeads.select_training_samples

    def record(self, *arguments):
        seen["samples"] = select(self, *arguments)
        return seen["samples"]

    monkeypatch.setattr(LibraRoIHeads, "select_training_samples", record)
    model = build(libra_rcnn, box_batch_size_per_image=16)
    model.roi_heads.box_predictor.register_forward_hook(
        lambda module, inputs, result: seen.update(deltas=result[1].tolist())
    )
    losses, _ = step(model)
    _, _, labels, wanted = seen["samples"]
    labels, wanted = torch.cat(labels).tolist(), torch.cat(wanted).tolist()
    total = 0.0
    for row, label in enumerate(labels):
        if label > 0:
            found = seen["deltas"][row][4 * label : 4 * label + 4]
            for a, b in zip(found, wanted[row], strict=True):
                total += references.balanced_l1(a - b)
    assert losses["loss_box_reg"] == pytest.approx(total / len(labels), rel=1e-5)
    assert any(labels)


# Grid R-CNN


@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_grid_targets_are_the_literal_ones(seed):
    generator = torch.Generator().manual_seed(seed)
    rois = rough_boxes(generator, 4)
    boxes = rois + 4 * torch.randn(4, 4, generator=generator, dtype=torch.float64)
    boxes[:, 2:] = boxes[:, 2:].maximum(boxes[:, :2] + 1)
    boxes[3] += 200  # no point of it is in reach
    found = target_maps(rois, boxes).tolist()
    for roi, box, maps in zip(rois.tolist(), boxes.tolist(), found, strict=True):
        for point in range(9):
            assert maps[point] == references.target_map(roi, box, *divmod(point, 3))
    assert not any(any(map(any, part)) for part in found[3])


@given(seed=seeds)
@settings(max_examples=5, deadline=None)
def test_boxes_from_points_are_the_literal_ones(seed):
    generator = torch.Generator().manual_seed(seed)
    rois = rough_boxes(generator, 2)
    # In rough order, as those of a trained head.
    truth = rois + torch.randn(2, 4, generator=generator, dtype=torch.float64)
    maps = 3 * target_maps(rois, truth) + torch.rand(2, 9, 56, 56, generator=generator)
    found = boxes_from_maps(maps, rois)
    for roi, part, box in zip(rois.tolist(), maps.sigmoid().tolist(), found.tolist(), strict=True):
        assert box == pytest.approx(references.box_from_maps(part, roi), rel=1e-6, abs=1e-6)


def test_points_on_an_object_give_its_box_to_a_pixel_of_the_map():
    rois = torch.tensor([[20.0, 20, 34, 48]]).repeat(6, 1)
    boxes = rois + torch.tensor([-3.0, 2, 2, -4]) * torch.linspace(0, 1, 6)[:, None]
    maps = 20 * target_maps(rois, boxes) - 10
    # The cross's middle is not higher than its arms: take it alone.
    middle = F.max_pool2d(-maps, 3, 1, 1) < 10
    maps = torch.where((F.avg_pool2d(maps, 3, 1, 1) > 0) | middle, maps + 1, maps)
    error = (boxes_from_maps(maps, rois) - boxes).abs()
    assert (error[:, 0::2] <= 28 / 56).all()
    assert (error[:, 1::2] <= 56 / 56).all()


def test_points_that_lie_the_wrong_way_round_still_make_a_box():
    boxes = boxes_from_maps(
        torch.randn(50, 9, 56, 56), torch.tensor([[8.0, 8, 30, 30]]).repeat(50, 1)
    )
    assert (boxes[:, 2:] >= boxes[:, :2]).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_points_exchange_features_with_their_neighbours(channels):
    torch.manual_seed(0)
    exchange = Exchange(channels).double()
    x = torch.randn(2, 9 * channels, 14, 14, dtype=torch.float64)
    found = exchange(x).unflatten(1, (9, channels))
    expected = torch.zeros_like(found)
    assert len(neighbours()) == 24
    for goal in range(9):
        for source in range(9):
            (y, z), (v, u) = divmod(goal, 3), divmod(source, 3)
            if abs(y - v) + abs(z - u) != 1:
                continue
            pair = neighbours().index((source, goal))
            part = slice(pair * channels, (pair + 1) * channels)
            sent = x[:, source * channels : (source + 1) * channels]
            for layer in exchange.transform:
                sent = F.conv2d(sent, layer.weight[part], layer.bias[part], padding=2)
            expected[:, goal] += sent
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_the_second_order_starts_from_the_first():
    torch.manual_seed(0)
    head = GridHead(4, 36, 1).double()
    x = torch.randn(1, 4, 14, 14, dtype=torch.float64)
    own = head.convolutions(x)
    second = own + head.second_order(own + head.first_order(own))
    assert torch.equal(head(x), head.upsample(second))
    assert head(x).shape == (1, 9, 56, 56)
    # A corner's map depends on its neighbours' neighbours, not on the opposite corner.
    (gradient,) = torch.autograd.grad(
        head.second_order(own + head.first_order(own))[:, :4].sum(), own
    )
    reached = gradient.unflatten(1, (9, 4)).abs().sum((0, 2, 3, 4)) > 0
    assert reached.tolist() == [True, False, True, False, True, False, True, False, False] or (
        reached.tolist() == [True, True, True, True, True, False, True, False, False]
    )


def test_the_grid_s_loss_is_the_mean_over_all_pixels_of_positive_rois(monkeypatch):
    model = build(grid_rcnn, **FEW_POINTS, **FEW)
    heads, seen = model.roi_heads, {}
    heads.grid_roi_pool.register_forward_hook(lambda m, inputs, out: seen.update(rois=inputs[1]))
    heads.grid_head.register_forward_hook(lambda m, inputs, out: seen.update(maps=out))
    images, targets = zip(*[scene(seed=seed) for seed in range(2)], strict=True)
    losses = model(list(images), copy.deepcopy(list(targets)))
    total, row = 0.0, 0
    for rois, target in zip(seen["rois"], targets, strict=True):
        assert 0 < len(rois) <= 4
        for roi in rois:
            overlap = box_iou(roi[None], target["boxes"])[0]
            assert overlap.max() >= 0.5
            box = target["boxes"][overlap.argmax()].tolist()
            for point in range(9):
                p = seen["maps"][row, point].double().sigmoid()
                wanted = torch.tensor(references.target_map(roi.tolist(), box, *divmod(point, 3)))
                total -= float(torch.where(wanted > 0, p.log(), (1 - p).log()).sum())
            row += 1
    expected = 15 * total / (row * 9 * 56 * 56)
    assert float(losses["loss_grid"]) == pytest.approx(expected, rel=1e-5)
    assert set(losses) == {"loss_classifier", "loss_grid", "loss_objectness", "loss_rpn_box_reg"}


# FCOS


def test_fcos_has_the_ranges_it_says(monkeypatch):
    model = build(tiny_fcos, small_backbone(32))
    assert model.center_sampling_radius == 3.0
    for side, level in ((20, 0), (31, 0), (34, 1), (62, 1), (66, 2), (126, 2), (130, 3), (258, 4)):
        boxes = torch.tensor([[96.0, 96, 96 + side, 96 + side]])
        estimate = estimate_alpha_for(model, [((512, 512), boxes)])
        assert estimate.counts == tuple(int(i == level) for i in range(5))
        assert estimate.level_names == ("P2", "P3", "P4", "P5", "P6")


def literal_fcos_matches(anchors, per_level, boxes):
    """Which object each point is for, point by point; -1 for none."""
    strides = [4, 8, 16, 32, 64]
    ends = [0, 16, 32, 64, 128, math.inf]
    found = []
    level_of = [level for level, count in enumerate(per_level) for _ in range(count)]
    for (x1, y1, x2, y2), level in zip(anchors.tolist(), level_of, strict=True):
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        best, least = -1, math.inf
        for index, (left, top, right, bottom) in enumerate(boxes.tolist()):
            middle = (left + right) / 2, (top + bottom) / 2
            close = max(abs(x - middle[0]), abs(y - middle[1])) < 1.5 * strides[level]
            far = max(x - left, y - top, right - x, bottom - y)
            inside = min(x - left, y - top, right - x, bottom - y) > 0
            area = (right - left) * (bottom - top)
            if close and inside and ends[level] < far < ends[level + 1] and area < least:
                best, least = index, area
        found.append(best)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_fcos_trains_points_within_their_level_s_range(seed, monkeypatch):
    model, seen = build(tiny_fcos, small_backbone(32)), {}
    compute = model.head.compute_loss

    def record(targets, outputs, anchors, matches):
        seen.update(anchors=anchors, matches=matches)
        return compute(targets, outputs, anchors, matches)

    model.head.compute_loss = record
    generator = torch.Generator().manual_seed(seed)
    boxes = rough_boxes(generator, 6, 128.0).float()
    model([torch.rand(3, 128, 128)], [{"boxes": boxes, "labels": torch.ones(6, dtype=torch.int64)}])
    expected = literal_fcos_matches(seen["anchors"][0], [1024, 256, 64, 16, 4], boxes)
    assert seen["matches"][0].tolist() == expected
    assert max(expected) >= 0


def test_fcos_without_normalisation_takes_any_channels():
    with pytest.raises(ValueError, match=r"group_norm: expected .* multiple of 32 .* found 16"):
        build(tiny_fcos)
    model = build(tiny_fcos, group_norm=False)
    assert not any(isinstance(m, torch.nn.GroupNorm) for m in model.head.modules())
    losses, _ = step(model)
    assert all(math.isfinite(value) for value in losses.values())


# All of them


@pytest.mark.parametrize("name", NAMES)
def test_factors_are_estimated_patched_and_folded(name):
    model = small(name, channels=64).eval()
    boxes = [scene(seed=seed)[1]["boxes"] for seed in range(3)]
    estimate = estimate_alpha_for(model, [((96, 128), part) for part in boxes])
    assert sum(estimate.counts) == estimate.num_boxes == 12
    assert estimate.level_names == ("P2", "P3", "P4", "P5", "P6")
    if name != "fcos":
        layout = AnchorLayout.from_detector(model, (96, 128)).anchors()
        owner = torch.cat([torch.full((len(level),), i) for i, level in enumerate(layout)])
        best = owner[box_iou(torch.cat(boxes), torch.cat(layout)).argmax(1)]
        assert estimate.counts == tuple(torch.bincount(best, minlength=5).tolist())
    heads = getattr(model, "roi_heads", model)
    heads.score_thresh, heads.detections_per_img = 0.0, 20
    patch_detector(model.double(), FACTORS)
    assert isinstance(model.backbone.fpn, AlphaFeaturePyramidNetwork)
    images = [scene(seed=seed)[0].double() for seed in range(2)]
    with torch.no_grad():
        expected = model(images)
        fold_alpha(model)
        assert type(model.backbone.fpn) is FeaturePyramidNetwork
        found = model(images)
    for entry, other in zip(found, expected, strict=True):
        assert len(entry["boxes"]) == 20
        torch.testing.assert_close(entry["boxes"], other["boxes"], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(entry["scores"], other["scores"], rtol=1e-9, atol=1e-12)
        assert torch.equal(entry["labels"], other["labels"])


@pytest.mark.parametrize("builder", BUILDERS)
def test_builders_take_factors_and_images_as_they_are(builder):
    extra = FEW if builder in (libra_rcnn, grid_rcnn) else {}
    extra = extra | (FEW_POINTS if builder is grid_rcnn else {})
    model = build(builder, small_backbone(32), alpha=FACTORS, num_classes=4, **extra)
    assert model.backbone.fpn.alpha.tolist() == pytest.approx(FACTORS)
    layout = AnchorLayout.from_detector(model, (101, 67))
    assert (layout.num_fused_levels, layout.grid_sizes[0]) == (4, (32, 24))
    image, target = scene(64, 96, boxes=2)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    losses = model([image, image], [target, empty])
    assert all(math.isfinite(value) for value in losses.values())
    copied = pickle.loads(pickle.dumps(model.eval()))
    with torch.no_grad():
        (found,), (again,) = copied([image]), model([image])
    assert torch.equal(found["boxes"], again["boxes"])


def test_images_without_any_object_train_and_detect():
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    for name in NAMES:
        model = small(name)
        losses = model([torch.rand(3, 64, 96)], [dict(empty)])
        assert all(math.isfinite(value) for value in losses.values())
        heads = getattr(model.eval(), "roi_heads", model)
        heads.score_thresh = 1.0
        assert model([torch.rand(3, 64, 96)])[0]["boxes"].shape == (0, 4)


def test_wishes_that_cannot_be_met_are_refused_in_a_line():
    for builder, options, message in (
        (free_anchor, {"bag_size": 0}, "bag_size: expected at least 1 anchor, found 0"),
        (free_anchor, {"anchor_sizes": [8, 16]}, "anchor_sizes: expected sizes for 5 levels"),
        (libra_rcnn, {"anchor_sizes": [8, 16]}, "anchor_sizes: expected sizes for 5 levels"),
        (grid_rcnn, {"grid_channels": 40}, "grid_channels: expected a multiple of 36, found 40"),
        (grid_rcnn, {"grid_channels": 0}, "grid_channels: expected a multiple of 36, found 0"),
        (tiny_fcos, {"sizes": [2, 4], "group_norm": False}, "expected sizes for 5 levels"),
        (tiny_fcos, {"sizes": [(2, 3)] * 5, "group_norm": False}, "sizes: expected one per level"),
        *((builder, {"alpha": [0.5]}, "alpha of") for builder in (free_anchor, libra_rcnn)),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            build(builder, **options)
        assert "\n" not in str(caught.value)
    for builder in BUILDERS:
        with pytest.raises(TypeError, match="no_such"):
            build(builder, small_backbone(32), no_such=1)


@pytest.mark.parametrize("name", NAMES)
def test_detectors_learn(name):
    """Until they find some of what one picture shows. Runs on record show more."""
    torch.manual_seed(0)
    model = small(name)
    image, target = scene(64, 96, boxes=3, seed=1)
    patch_detector(model, estimate_alpha_for(model, [((64, 96), target["boxes"])]))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    truth = {"images": [{"id": 1, "width": 96, "height": 64}], "categories": [{"id": 1}]}
    truth["annotations"] = [
        {"id": n, "image_id": 1, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        | {"area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
        for n, (x1, y1, x2, y2) in enumerate(target["boxes"].tolist(), start=1)
    ]
    figures = []
    for _ in range(16):
        figures.append(judged(model, image, truth))
        if figures[-1] > 0.3:
            break
        for _ in range(10):
            loss = sum(model([image], [dict(target)]).values())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
    assert figures[0] < 0.1
    assert figures[-1] > 0.3


def judged(model, image, truth):
    """AP50_all on one picture; leaves the model in training mode."""
    with torch.no_grad():
        (entry,) = model.eval()([image])
    model.train()
    sides = entry["boxes"].clone()
    sides[:, 2:] -= sides[:, :2]
    rows = zip(sides.tolist(), entry["scores"].tolist(), strict=True)
    detections = [{"image_id": 1, "category_id": 1, "bbox": b, "score": s} for b, s in rows]
    return evaluate_tiny(truth, detections)["AP50_all"] if detections else 0.0
