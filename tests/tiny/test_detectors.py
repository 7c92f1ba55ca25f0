"""The paper's detectors: what they are made of, what they see, and how their losses add up."""

from __future__ import annotations

import copy
import math
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d, MultiScaleRoIAlign, box_iou
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from alphafpn.estimate.anchor_layout import AnchorLayout
from alphafpn.pyramid import LearnableAlpha, alpha_parameters
from alphafpn.surgery import fold_alpha, patch_detector
from alphafpn.tiny.detectors import tiny_faster_rcnn, tiny_retinanet

BUILDERS = [tiny_retinanet, tiny_faster_rcnn]
FACTORS = [0.367, 0.387, 0.368]


def small_backbone(out_channels=16, layers=4, extra=True):
    """A narrow ResNet with a pyramid on its last `layers` stages, whose maps have odd names."""
    body = ResNet(BasicBlock, [1, 1, 1, 1])
    names = {f"layer{5 - layers + i}": f"map{i}" for i in range(layers)}
    backbone = BackboneWithFPN(body, names, [64, 128, 256, 512][4 - layers :], out_channels)
    if not extra:
        backbone.fpn.extra_blocks = None
    return backbone


def build(builder, backbone=None, **options):
    torch.manual_seed(0)
    backbone = small_backbone() if backbone is None else backbone
    return builder(backbone, weights_backbone=None, **options)


def generator_of(model):
    return getattr(model, "rpn", model).anchor_generator


def cap_of(model):
    heads = getattr(model, "roi_heads", model)
    return heads.score_thresh, heads.nms_thresh, heads.detections_per_img


def scene(height=96, width=128, boxes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(boxes, 2, generator=generator) * (torch.tensor([width, height]) - 24)
    side = 6 + 14 * torch.rand(boxes, 2, generator=generator)
    image = 0.3 * torch.rand(3, height, width, generator=generator)
    found = torch.cat([corner, corner + side], 1)
    for x1, y1, x2, y2 in found.round().int().tolist():
        image[:, y1:y2, x1:x2] += 0.6
    return image, {"boxes": found, "labels": torch.ones(boxes, dtype=torch.int64)}


def sides(cells):
    return sorted((int(x2 - x1), int(y2 - y1)) for x1, y1, x2, y2 in cells.tolist())


def captured(model):
    """Boxes and images as the model's backbone and anchor generator get them, once it has run."""
    seen = {}
    model.backbone.register_forward_pre_hook(lambda m, args: seen.update(batch=args[0]))
    generator_of(model).register_forward_hook(lambda m, args, found: seen.update(anchors=found))
    return seen


# Levels and anchors


def test_retinanet_has_the_papers_anchors_as_torchvision_rounds_them():
    cells = build(tiny_retinanet).anchor_generator.cell_anchors
    assert sides(cells[0]) == [
        *((6, 12), (8, 8), (8, 14), (8, 18), (10, 10), (12, 6), (12, 12), (14, 8), (18, 8)),
    ]
    for level, cell in enumerate(cells):
        shapes = [
            (2 * round(8 * 2 ** (level + octave / 3) * math.sqrt(1 / ratio) / 2), ratio)
            for ratio in (0.5, 1, 2)
            for octave in range(3)
        ]
        assert [int(x2 - x1) for x1, _, x2, _ in cell.tolist()] == [width for width, _ in shapes]


def test_faster_rcnn_has_the_papers_anchors_as_torchvision_rounds_them():
    cells = build(tiny_faster_rcnn).rpn.anchor_generator.cell_anchors
    assert [sides(cell) for cell in cells] == [
        [(6, 12), (8, 10), (12, 6)],
        [(8, 18), (10, 14), (18, 8)],
        [(14, 26), (16, 22), (26, 14)],
        [(22, 42), (26, 34), (42, 22)],
        [(42, 86), (52, 68), (86, 42)],
    ]


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("size", [(96, 128), (101, 67)])
def test_the_layout_is_what_the_detector_generates(builder, size):
    model = build(builder).eval()
    seen = captured(model)
    with torch.no_grad():
        model([torch.rand(3, *size)])
    layout = AnchorLayout.from_detector(model, size)
    assert torch.equal(torch.cat(layout.anchors()), seen["anchors"][0])
    assert layout.num_fused_levels == 4
    assert layout.level_names == ("P2", "P3", "P4", "P5", "P6")


@pytest.mark.parametrize("builder", BUILDERS)
def test_heads_follow_the_anchors(builder):
    sizes, ratios = [(6, 9), (12, 18), (24, 36), (48, 72), (96, 150)], (0.4, 1.0, 1.5, 3.0)
    model = build(builder, anchor_sizes=sizes, aspect_ratios=ratios).eval()
    assert generator_of(model).num_anchors_per_location() == [8] * 5
    image = torch.rand(3, 64, 96)
    assert set(model([image])[0]) == {"boxes", "labels", "scores"}
    per_level = [ratios, ratios[::-1], ratios, ratios, ratios]
    other = build(builder, anchor_sizes=sizes, aspect_ratios=per_level)
    assert sides(generator_of(other).cell_anchors[1]) == sides(generator_of(model).cell_anchors[1])


def test_roi_levels_follow_the_pyramid():
    backbone = small_backbone(layers=3)
    model = build(tiny_faster_rcnn, backbone, anchor_sizes=[16, 32, 64, 128])
    assert model.roi_heads.box_roi_pool.featmap_names == ["map0", "map1", "map2"]
    pooled = []
    model.roi_heads.box_roi_pool.register_forward_hook(lambda m, args, out: pooled.append(m.scales))
    model.eval()([torch.rand(3, 128, 160)])
    assert pooled == [[1 / 8, 1 / 16, 1 / 32]]
    pool = MultiScaleRoIAlign(["map0"], output_size=7, sampling_ratio=2)
    assert build(tiny_faster_rcnn, box_roi_pool=pool).roi_heads.box_roi_pool is pool


def test_a_pyramid_without_extra_level_is_served():
    model = build(tiny_retinanet, small_backbone(extra=False), anchor_sizes=[8, 16, 32, 64])
    assert AnchorLayout.from_detector(model, (64, 96)).num_fused_levels == 4
    assert model.eval()([torch.rand(3, 64, 96)])[0]["boxes"].shape[1] == 4


@pytest.mark.parametrize(
    ("name", "channels"), [("resnet18", 64), ("resnet50", 256), ("resnext50_32x4d", 256)]
)
def test_a_resnet_by_name(name, channels):
    model = tiny_retinanet(name, weights_backbone=None)
    fpn = model.backbone.fpn
    assert [block[0].in_channels for block in fpn.inner_blocks] == [
        channels * 2**i for i in range(4)
    ]
    assert isinstance(fpn.extra_blocks, LastLevelMaxPool)
    assert type(fpn) is FeaturePyramidNetwork
    # Without weights there is nothing to freeze.
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in model.modules())


def test_pretrained_backbones_have_their_first_parts_frozen(monkeypatch):
    requested = []

    def state(weights, **kwargs):
        requested.append(weights.url)
        return ResNet(BasicBlock, [2, 2, 2, 2]).state_dict()

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", state)
    body = tiny_faster_rcnn("resnet18").backbone.body
    assert len(requested) == 1
    assert requested[0].rsplit("/", 1)[1].startswith("resnet18-")
    trained = {name.split(".")[0] for name, p in body.named_parameters() if p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}
    assert isinstance(body.bn1, FrozenBatchNorm2d)
    body = tiny_faster_rcnn("resnet18", trainable_backbone_layers=0).backbone.body
    assert not any(p.requires_grad for p in body.parameters())


# What the network sees and gives back


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("training", [True, False])
def test_images_are_padded_but_never_resized(builder, training):
    model = build(builder).train(training)
    seen = captured(model)
    images, targets = zip(*[scene(70, 129), scene(99, 64)], strict=True)
    model(images, copy.deepcopy(targets) if training else None)
    assert seen["batch"].shape == (2, 3, 128, 160)
    assert "min_size" not in repr(model.transform)
    for image, padded in zip(images, seen["batch"], strict=True):
        height, width = image.shape[1:]
        assert torch.equal(padded[:, :height, :width], model.transform.normalize(image))
        padded[:, :height, :width] = 0
        assert not padded.any()


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_resize_that_is_asked_for(builder):
    model = build(builder, min_size=128, max_size=200)
    assert AnchorLayout.from_detector(model, (64, 64)).grid_sizes[0] == (32, 32)
    model = build(builder, image_mean=[0.5, 0.5, 0.5], size_divisible=64)
    assert model.transform.image_mean == [0.5, 0.5, 0.5]
    assert AnchorLayout.from_detector(model, (65, 65)).grid_sizes[0] == (32, 32)


def test_the_recipes_limits_and_others():
    assert cap_of(build(tiny_retinanet)) == (0.05, 0.4, 100)
    assert build(tiny_retinanet).topk_candidates == 1000
    assert cap_of(build(tiny_faster_rcnn)) == (0.05, 0.5, 200)
    model = build(tiny_retinanet, nms_thresh=0.6, detections_per_img=7, score_thresh=0.0)
    assert cap_of(model) == (0.0, 0.6, 7)
    assert len(model.eval()([torch.rand(3, 64, 64)])[0]["boxes"]) == 7


@pytest.mark.parametrize("builder", BUILDERS)
def test_boxes_stay_exact_under_autocast(builder):
    model = build(builder, **({"score_thresh": 0} if builder is tiny_retinanet else {})).eval()
    seen = captured(model)
    image = torch.rand(3, 32, 900)
    with torch.no_grad():
        for deltas in (
            m for n, m in model.named_modules() if n.endswith(("bbox_reg", "bbox_pred"))
        ):
            deltas.weight.zero_()
            deltas.bias.zero_()
        model([image])
        expected = seen["anchors"]
        with torch.autocast("cpu", torch.bfloat16):
            (found,) = model([image])
    assert seen["anchors"][0].dtype == torch.float32
    assert torch.equal(seen["anchors"][0], expected[0])
    if builder is tiny_retinanet:
        # With all deltas zero, detections are anchors cut at the border.
        anchors = expected[0].clone()
        anchors[:, 0::2].clamp_(0, 900)
        anchors[:, 1::2].clamp_(0, 32)
        assert len(found["boxes"]) == 100
        distance = torch.cdist(found["boxes"], anchors, p=float("inf")).min(1).values
        assert float(distance.max()) < 1e-3
    else:
        assert found["boxes"].dtype == torch.float32


# Losses


def literal_losses(model, outputs, anchors, targets):
    """The paper's losses, anchor by anchor."""
    class_loss = box_loss = 0.0
    positives = 0
    for logits, deltas, cells, target in zip(*outputs, anchors, targets, strict=True):
        iou = box_iou(target["boxes"], cells)
        best = iou.max(1).values if len(iou) else None
        for a in range(len(cells)):
            overlap, truth = iou[:, a].max(0) if len(iou) else (torch.tensor(0.0), None)
            low_quality = len(iou) and bool((iou[:, a] == best).any())
            if 0.4 <= overlap < 0.5 and not low_quality:
                continue
            positive = overlap >= 0.5 or low_quality
            for c, p in enumerate(torch.sigmoid(logits[a].double())):
                if positive and c == target["labels"][truth]:
                    class_loss -= 0.25 * (1 - p) ** 2 * torch.log(p)
                else:
                    class_loss -= 0.75 * p**2 * torch.log(1 - p)
            if positive:
                positives += 1
                gt, anchor = target["boxes"][truth].double(), cells[a].double()
                size, other = anchor[2:] - anchor[:2], gt[2:] - gt[:2]
                shift = (gt[2:] + gt[:2] - anchor[2:] - anchor[:2]) / 2 / size
                wanted = torch.cat([10 * shift, 5 * torch.log(other / size)])
                error = (deltas[a] - wanted).abs()
                box_loss += torch.where(error < 0.11, error**2 / 0.22, error - 0.055).sum()
    return class_loss / (positives + len(targets)), box_loss / (4 * max(1, positives))


@pytest.mark.parametrize("counts", [(3, 1), (2, 0), (0, 0)])
def test_retinanets_losses_are_the_papers(counts):
    model = build(tiny_retinanet, num_classes=3)
    seen, outputs = captured(model), {}
    model.head.register_forward_hook(lambda m, args, result: outputs.update(result))
    nn.init.normal_(model.head.classification_head.cls_logits.weight, std=0.5)
    nn.init.normal_(model.head.regression_head.bbox_reg.weight, std=0.5)
    images, targets = zip(
        *[scene(32, 64, boxes=n, seed=i) for i, n in enumerate(counts)], strict=True
    )
    for target in targets:
        target["labels"] = 1 + torch.arange(len(target["labels"])) % 2
    losses = model(images, targets)
    with torch.no_grad():
        expected = literal_losses(
            model, (outputs["cls_logits"], outputs["bbox_regression"]), seen["anchors"], targets
        )
    for loss, value in zip(losses.values(), expected, strict=True):
        assert loss.item() == pytest.approx(float(value), rel=1e-4)
    sum(losses.values()).backward()


def test_retinanet_decodes_what_its_loss_encodes():
    model = build(tiny_retinanet)
    anchors = torch.tensor([[10.0, 10, 18, 18], [40, 20, 56, 28]])
    boxes = torch.tensor([[8.0, 11, 18, 22], [42, 16, 50, 30]])
    deltas = model.head.regression_head.box_coder.encode_single(boxes, anchors)
    torch.testing.assert_close(model.box_coder.decode_single(deltas, anchors), boxes)
    assert float(deltas[0, 0]) == pytest.approx(10 * -1 / 8)


def test_losses_in_bfloat16_are_computed_in_float32():
    model = build(tiny_retinanet)
    images, targets = zip(scene(64, 64), strict=True)
    full = model(images, targets)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(images, targets)
    assert all(loss.dtype == torch.float32 for loss in narrow.values())
    for name, loss in full.items():
        assert narrow[name].item() == pytest.approx(loss.item(), rel=0.02)


# Factors


@pytest.mark.parametrize("builder", BUILDERS)
def test_factors_are_in_the_pyramid(builder):
    assert build(builder, alpha=FACTORS).backbone.fpn.alpha.tolist() == pytest.approx(FACTORS)
    assert len(alpha_parameters(build(builder, alpha=LearnableAlpha(FACTORS)))) == 1
    assert type(build(builder).backbone.fpn) is FeaturePyramidNetwork
    # Without alpha, a patched backbone stays patched.
    patched = build(builder, patch_detector(small_backbone(), FACTORS))
    assert patched.backbone.fpn.alpha.tolist() == pytest.approx(FACTORS)


@pytest.mark.parametrize("builder", BUILDERS)
def test_pickled_and_folded_detectors_find_the_same(builder):
    image = scene()[0]
    model = build(builder, alpha=FACTORS).eval()
    expected = model([image])[0]
    found = pickle.loads(pickle.dumps(model))([image])[0]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    stock = build(builder).eval()
    stock.load_state_dict(fold_alpha(model).state_dict())
    found = stock([image])[0]
    assert found["boxes"].shape == expected["boxes"].shape
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-4, atol=1e-5)


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchor_sizes": [8, 16, 32]}, r"5 levels.*'map0'.*found 3"),
        ({"anchor_sizes": []}, "expected some for each level"),
        ({"aspect_ratios": [(0.5, 1.0)] * 4}, "each of 5, found 4"),
        ({"aspect_ratios": [(1.0,)] * 4 + [(1.0, 2.0)]}, "equally many"),
        ({"anchor_sizes": [0.5, 16, 32, 64, 128]}, "level 0"),
        ({"alpha": [0.5, 0.5]}, "expected 3 factors"),
        ({"weights": "DEFAULT"}, "weights: expected None"),
        ({"backbone": "vgg16"}, r"'resnet101'.*found 'vgg16'"),
        ({"backbone": nn.Linear(3, 4)}, "out_channels"),
    ],
)
@pytest.mark.parametrize("builder", BUILDERS)
def test_parts_that_do_not_fit_are_refused(builder, options, message):
    with pytest.raises(ValueError, match=message):
        build(builder, **options)


@pytest.mark.parametrize("builder", BUILDERS)
def test_unknown_weights_pyramids_and_options_are_refused(builder):
    with pytest.raises(ValueError, match=r"IMAGENET1K_V1.*found 'IMAGENET'"):
        builder("resnet18", weights_backbone="IMAGENET")
    plain = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 1)))
    plain.out_channels = 4
    with pytest.raises(TypeError, match="expected a FeaturePyramidNetwork"):
        build(builder, plain)
    with pytest.raises(TypeError, match=r"^no_such_option: expected .* found"):
        build(builder, no_such_option=1)
