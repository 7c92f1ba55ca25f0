from __future__ import annotations

import contextlib
import inspect
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from torch import nn
from torchvision.models import get_model
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from alphafpn import (
    AlphaEstimate,
    AnchorLayout,
    compare_anchors,
    estimate_alpha,
    estimate_alpha_for,
)
from tests import oracle
from tests.anchor_sets import seeds
from tests.annotation_sets import reference, write
from tests.detectors import generator_of, small_detector
from tests.malformed import annotation, coco
from tests.states import assert_unchanged, snapshot


def seen_by_the_network(model, size, boxes, min_size=None):
    """Anchors per level and boxes, by the detector's own transform and anchor generator."""
    generator = generator_of(model)
    transform = model.transform
    training, min_sizes = transform.training, getattr(transform, "min_size", None)
    if min_size is not None:
        transform.eval().min_size = (min_size,)
    image = torch.empty(3, *size, device="meta")
    images, (target,) = transform([image], [{"boxes": boxes}])
    transform.train(training).min_size = min_sizes
    with torch.no_grad():
        maps = model.backbone(torch.zeros(images.tensors.shape)).values()
    levels = [
        m.shape[2] * m.shape[3] * len(c) for m, c in zip(maps, generator.cell_anchors, strict=True)
    ]
    (anchors,) = generator(ImageList(images.tensors, images.image_sizes), list(maps))
    return list(anchors.split(levels)), target["boxes"]


def draw_dataset(rng, count=6):
    """Images of sizes that repeat, some of them without boxes; boxes within their images."""
    shapes = [(50, 70), (64, 64), (33, 90), (120, 80)]
    dataset = []
    for _ in range(count):
        height, width = shapes[rng.integers(len(shapes))]
        number = int(rng.integers(0, 6))
        low = rng.uniform(0, 0.8, (number, 2)) * [width, height]
        high = np.minimum(low + np.exp(rng.normal(2, 1, (number, 2))), [width, height])
        boxes = torch.tensor(np.concatenate([low, high], 1), dtype=torch.float32)
        dataset.append(((height, width), boxes))
    # One box at least.
    dataset.append(((64, 64), torch.tensor([[3.0, 4, 17, 21]])))
    return dataset


def counted(model, dataset, min_sizes=(None,)):
    """Algorithm 1 on what the network sees, at each size; None where rounding would decide."""
    num_levels = len(generator_of(model).cell_anchors)
    counts, unmatched = np.zeros(num_levels, int), 0
    for min_size in min_sizes:
        seen = [seen_by_the_network(model, *item, min_size) for item in dataset]
        for levels, boxes in seen:
            for row in oracle.level_ious(levels, boxes):
                if not oracle.is_clear(row):
                    return None
        found, missed, _ = oracle.counts(*zip(*seen, strict=True))
        counts, unmatched = counts + found, unmatched + missed
    return tuple(counts.tolist()), unmatched


class Halved(GeneralizedRCNNTransform):
    def resize(self, image, target=None):
        height, width = (n // 2 for n in image.shape[-2:])
        small = torch.nn.functional.interpolate(image[None], size=(height, width))[0]
        if target is not None:
            target = {**target, "boxes": target["boxes"] / 2}
        return small, target


def with_own_resize(min_size):
    model = small_detector(min_size=min_size)
    model.transform = Halved(min_size, 100, [0.5] * 3, [0.5] * 3)
    return model


def resized_before():
    return small_detector(_skip_resize=True, min_size=(40, 64))


# And the sizes at which each of them sees an image.
MODELS = {
    "retinanet": (lambda: small_detector().eval(), (None,)),
    "faster": (lambda: small_detector("faster").eval(), (None,)),
    "several min_size": (lambda: small_detector(min_size=(48, 64, 80)).eval(), (48, 64, 80)),
    "fixed_size": (lambda: small_detector(fixed_size=(90, 60)).eval(), (None,)),
    "tiny anchors": (lambda: small_detector(sizes=(2, 4, 6, 8)).eval(), (None,)),
    "a resize of its own": (lambda: with_own_resize((40, 64)), (None,)),
    "no resize in training": (lambda: resized_before().train(), (None,)),
    "no resize in training, in evaluation": (lambda: resized_before().eval(), (40, 64)),
}


@settings(max_examples=6, deadline=None)
@given(seed=seeds)
@pytest.mark.parametrize("name", MODELS)
def test_counts_are_those_of_what_the_network_sees(name, seed):
    build, min_sizes = MODELS[name]
    model, dataset = build(), draw_dataset(np.random.default_rng(seed))
    expected = counted(model, dataset, min_sizes)
    assume(expected is not None)
    estimate = estimate_alpha_for(model, dataset)
    assert (estimate.counts, estimate.num_unmatched) == expected
    assert estimate.num_images == len(dataset)
    assert estimate.num_boxes == sum(len(boxes) for _, boxes in dataset)
    assert estimate.num_sizes == len(min_sizes)
    assert estimate.num_fused_levels == 3


@pytest.mark.parametrize("sizes", [(8, 16, 32, 64), (2, 4, 8, 16), (2, 4, 24, 28)])
def test_fcos_counts_follow_its_regression_ranges(sizes):
    dataset = draw_dataset(np.random.default_rng(0), 60)
    model = small_detector("fcos", sizes, min_size=(32, 64), max_size=200).eval()
    counts = [0] * 5
    for min_size in (32, 64):
        for item in dataset:
            _, boxes = seen_by_the_network(model, *item, min_size)
            for level in oracle.fcos_levels(sizes, boxes):
                counts[level] += 1
    estimate = estimate_alpha_for(model, dataset)
    assert (*estimate.counts, estimate.num_unmatched) == tuple(counts)
    assert estimate.iou_histogram is None
    with pytest.raises(ValueError, match="regression ranges"):
        estimate.recall(0.5)


def test_fcos_takes_the_width_of_an_anchor_for_its_size():
    dataset = draw_dataset(np.random.default_rng(0), 60)
    square, high = (small_detector("fcos", (8, 16, 32, 64)) for _ in range(2))
    high.anchor_generator.cell_anchors = [
        cells * torch.tensor([1, 3, 1, 3]) for cells in square.anchor_generator.cell_anchors
    ]
    assert estimate_alpha_for(high, dataset).counts == estimate_alpha_for(square, dataset).counts


def test_one_size_is_estimate_alpha_on_what_the_network_sees():
    dataset = draw_dataset(np.random.default_rng(0), 40)
    model = small_detector().eval()
    anchors = [AnchorLayout.from_detector(model, size) for size, _ in dataset]
    boxes = [seen_by_the_network(model, *item)[1] for item in dataset]
    estimate = estimate_alpha_for(model, dataset)
    direct = estimate_alpha(anchors, boxes)
    assert estimate.detections_per_image == 300
    for name in ("counts", "moments", "iou_histogram", "reached", "size_sum", "level_names"):
        assert getattr(estimate, name) == getattr(direct, name)
    assert estimate.strides == direct.strides
    assert estimate.anchors_per_cell == direct.anchors_per_cell == (3,) * 4


def test_several_sizes_count_alike():
    dataset = draw_dataset(np.random.default_rng(1), 40)
    one = [estimate_alpha_for(small_detector(min_size=s), dataset) for s in (48, 80)]
    both = estimate_alpha_for(small_detector(min_size=(48, 80)), dataset)
    assert both.counts == tuple(a + b for a, b in zip(*(e.counts for e in one), strict=True))
    assert both.num_boxes == one[0].num_boxes
    assert both.mean_size == pytest.approx((one[0].mean_size + one[1].mean_size) / 2)
    assert both.recall(0) == 1
    # The same size twice tells nothing new: intervals stay as wide.
    twice = estimate_alpha_for(small_detector(min_size=(48, 48)), dataset)
    assert twice.ratios == one[0].ratios
    for a, b in zip(twice.confidence_interval(), one[0].confidence_interval(), strict=True):
        assert a == pytest.approx(b)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["retinanet", "faster", "fcos", "custom"])
def test_the_model_stays_as_it_is(kind, training):
    sizes = (48, 64)
    model = with_own_resize(sizes) if kind == "custom" else small_detector(kind, min_size=sizes)
    model.train(training)
    frozen, trained = (model.backbone.body[name][0].weight for name in "01")
    frozen.requires_grad_(False)
    trained.grad = torch.ones_like(trained)
    called = []
    for module in (model.backbone, model.backbone.fpn, model.transform):
        module.register_forward_hook(lambda *_: called.append(1))
    before = snapshot(model)
    estimate_alpha_for(model, draw_dataset(np.random.default_rng(0)))
    AnchorLayout.from_detector(model, (50, 60))
    assert_unchanged(model, before)
    assert not called


def test_mobilenet_levels_cannot_be_told_apart():
    with torch.device("meta"):
        model = get_model("fasterrcnn_mobilenet_v3_large_fpn", weights=None, weights_backbone=None)
    with pytest.raises(ValueError, match=r"the detector: .* of level 1 also lie on level 0"):
        estimate_alpha_for(model, draw_dataset(np.random.default_rng(0)))


def test_crowded_images_and_what_was_left_out(tmp_path):
    model = small_detector("faster", box_detections_per_img=3)
    box = [1, 2, 10, 12]
    entries = [annotation(id=i, image_id=(7, 3)[i % 5 // 4], bbox=box) for i in range(10)]
    entries.append(annotation(id=10, image_id=3, bbox=box, iscrowd=1))
    path = write(tmp_path, coco(annotations=entries))
    estimate = estimate_alpha_for(model, path, clamp=None)
    assert (estimate.num_crowded, estimate.detections_per_image) == (1, 3)
    assert estimate.left_out == {"crowd": 1}
    assert estimate.num_clipped == 0
    assert (estimate.num_boxes, estimate.num_images) == (10, 2)
    assert estimate.clamp is None
    assert estimate_alpha_for(model, str(path), category_ids=[1]).counts == estimate.counts
    # As many as it may return are not too many.
    model.roi_heads.detections_per_img = 8
    assert estimate_alpha_for(model, path).num_crowded == 0
    del model.roi_heads.detections_per_img
    estimate = estimate_alpha_for(model, path)
    assert (estimate.num_crowded, estimate.detections_per_image) == (0, None)


def test_corners_in_a_coco_file_are_warned_of():
    corners = annotation(image_id=3, bbox=[60, 150, 95, 199])
    estimate = estimate_alpha_for(small_detector("faster"), coco(annotations=[corners] * 3))
    assert estimate.num_clipped == 3
    assert "100% of the boxes reach beyond their image" in estimate.summary()


def test_mistakes_are_named():
    dataset = draw_dataset(np.random.default_rng(0))
    for model in (None, nn.Linear(2, 2), "retinanet_resnet50_fpn"):
        with pytest.raises(TypeError, match="model: expected"):
            estimate_alpha_for(model, dataset)
    model = small_detector()
    with pytest.raises(TypeError, match="clamp"):
        estimate_alpha_for(model, dataset, clamp=2.0)
    with pytest.raises(ValueError, match="expected boxes to count"):
        estimate_alpha_for(model, [((64, 64), torch.zeros(0, 4))])
    thin = [*dataset, ((2, 3000), torch.tensor([[1.0, 0, 5, 2]]))]
    with pytest.raises(ValueError, match=rf"image {len(dataset)}: .*\(2, 3000\) is resized to \(0"):
        estimate_alpha_for(model, thin)
    model.anchor_generator.cell_anchors = model.anchor_generator.cell_anchors[:3]
    with pytest.raises(ValueError, match=r"4 feature maps .* found 3"):
        estimate_alpha_for(model, dataset)


def test_a_default_device_changes_nothing():
    dataset = draw_dataset(np.random.default_rng(0))
    model = small_detector()
    expected = estimate_alpha_for(model, dataset)
    with torch.device("meta"):
        assert estimate_alpha_for(model, dataset) == expected
    with torch.inference_mode():
        assert estimate_alpha_for(model, dataset) == expected


def first_images(path, count, boxes_per_image):
    """The first images of a real annotation file, with some boxes that are not ignored."""
    data = json.loads(path.read_text())
    images = data["images"][:count]
    kept = {image["id"]: [] for image in images}
    for entry in data["annotations"]:
        boxes = kept.get(entry["image_id"])
        if boxes is not None and not entry.get("ignore") and len(boxes) < boxes_per_image:
            boxes.append(entry)
    entries = [entry for boxes in kept.values() for entry in boxes]
    return {**data, "images": images, "annotations": entries}


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("citypersons_train_boxes.json", "fasterrcnn_resnet50_fpn"),
        ("tinyperson_native_boxes.json", "retinanet_resnet50_fpn_v2"),
    ],
)
def test_real_boxes_equal_brute_force(data_file, file, name):
    data = first_images(data_file(file), 100, 6)
    with torch.device("meta"):
        model = get_model(name, weights=None, weights_backbone=None).eval()
    estimate = estimate_alpha_for(model, data)
    counts, unclear, layouts = [0] * len(estimate.counts), 0, {}
    for size, boxes in reference(data):
        image = torch.empty(3, *size, device="meta")
        _, (target,) = model.transform([image], [{"boxes": boxes}])
        if size not in layouts:
            layouts[size] = AnchorLayout.from_detector(model, size).anchors()
        for row in oracle.level_ious(layouts[size], target["boxes"]):
            counts[oracle.best_level(row)] += 1
            unclear += not oracle.is_clear(row)
    assert sum(counts) > 200
    assert sum(abs(a - b) for a, b in zip(counts, estimate.counts, strict=True)) <= 2 * unclear
    assert unclear < 5
    with contextlib.suppress(ZeroDivisionError):
        expected = oracle.ratios(counts, estimate.num_fused_levels)
        assert unclear or estimate.ratios == pytest.approx(expected)


@pytest.mark.parametrize("function", [estimate_alpha, estimate_alpha_for, compare_anchors])
def test_defaults_are_the_same_everywhere(function):
    parameters = inspect.signature(function).parameters
    assert parameters["clamp"].default == AlphaEstimate.clamp == (0.2, 2.0)
    assert "progress" not in parameters or parameters["progress"].default is False


def test_threads_estimate_while_another_one_trains():
    model = small_detector()
    datasets = [draw_dataset(np.random.default_rng(i)) for i in range(4)]
    expected = [estimate_alpha_for(model, dataset) for dataset in datasets]
    image = torch.rand(3, 64, 64)
    target = {"boxes": torch.tensor([[3.0, 4, 17, 21]]), "labels": torch.tensor([1])}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    done = threading.Event()

    def train():
        steps = 0
        while not done.is_set() or not steps:
            losses = model([image], [target])
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            steps += 1
        return all(p.isfinite().all() and p.device.type == "cpu" for p in model.parameters())

    with ThreadPoolExecutor(5) as pool:
        training = pool.submit(train)
        for _ in range(3):
            found = list(pool.map(lambda dataset: estimate_alpha_for(model, dataset), datasets))
            assert found == expected
        done.set()
        assert training.result(timeout=60)
