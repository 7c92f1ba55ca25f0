from __future__ import annotations

import copy
import functools
import itertools
import math
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F  # noqa: N812

from alphafpn.tiny.erasing import EraseIgnored
from alphafpn.tiny.scale_match import MonotoneScaleMatch, ScaleMatch, box_sizes

unhurried = settings(deadline=None, max_examples=50)
positive = st.floats(3, 500)


def sample(sides, size=(300, 400), **entries):
    """A plain grey image, and boxes of the given (w, h) at its upper left corner."""
    boxes = torch.tensor([[0, 0, w, h] for w, h in sides], dtype=torch.float64).reshape(-1, 4)
    boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)
    return torch.zeros(1, *size, dtype=torch.uint8), {"boxes": boxes, **entries}


def geometric_mean(sides):
    return math.exp(sum(0.5 * math.log(w * h) for w, h in sides) / len(sides))


def law(sizes):
    """The rectified histogram as the protocol puts it: edges, and the share of each bin."""
    ordered, total = sorted(sizes), len(sizes)
    low, high = int(total * 0.02 / 2), int(total * (1 - 0.02 / 2))
    counts, inner = np.histogram(ordered[low:high], bins=98)
    edges = np.array([ordered[0], *inner, ordered[-1]])
    return edges, np.array([low, *counts, total - high]) / total


def mean_sizes(transform, samples):
    """Mean sizes of the boxes of each sample before and after."""
    before, after = [], []
    for image, target in samples:
        _, scaled = transform(image, target)
        for means, boxes in [(before, target["boxes"]), (after, scaled["boxes"])]:
            means.append(geometric_mean((boxes[:, 2:] - boxes[:, :2]).tolist()))
    return np.array(before), np.array(after)


def between(low, high, values):
    return values[(values > low) & (values < high)]


def resized(match, mean, times=1):
    """Sizes that objects of one size get, before the image's size is rounded to pixels."""
    image, target = sample([(mean, mean)])
    inputs = [image, target["boxes"], target]
    return [mean * match.make_params(inputs)["scale"] for _ in range(times)]


@pytest.fixture(scope="module")
def sizes():
    rng = np.random.default_rng(0)
    return {
        "target": between(8, 90, rng.lognormal(math.log(24), 0.5, 5000)),
        "source": between(100, 300, rng.lognormal(math.log(150), 0.4, 5000)),
    }


def test_mean_sizes_follow_the_target_whatever_the_source(sizes):
    """Images with one to three boxes; the first box has the size of a source object."""
    rng = np.random.default_rng(1)
    images = [
        sample(
            [(size * ratio, size / ratio) for ratio in rng.uniform(0.8, 1.25, rng.integers(1, 4))]
        )
        for size in rng.choice(sizes["source"], 1000)
    ]
    torch.manual_seed(0)
    before, after = mean_sizes(ScaleMatch(sizes["target"], scale_range=(0.0, 2.0)), images)
    assert stats.kstest(after, sizes["target"]).pvalue > 1e-3
    edges, shares = law(sizes["target"])
    cumulative = np.concatenate([[0.0], np.cumsum(shares)])
    exact = stats.kstest(after, lambda size: np.interp(size, edges, cumulative))
    assert exact.pvalue > 1e-3
    # Far enough from what a target a tenth larger would give.
    assert stats.kstest(after, sizes["target"] * 1.1).pvalue < 1e-4
    assert abs(stats.spearmanr(before, after).statistic) < 0.1


def test_the_tails_are_a_bin_of_one_percent_each():
    target = np.concatenate([np.linspace(20, 30, 980), np.full(10, 5.0), np.full(10, 95.0)])
    torch.manual_seed(0)
    match = ScaleMatch(target, scale_range=(0.0, 2.0))
    drawn = np.array(resized(match, 200.0, 4000))
    # A tail reaches from the extreme to the middle's nearest size, and is uniform in between.
    for tail, low, high in [(drawn[drawn < 20], 5, 20), (drawn[drawn > 30], 30, 95)]:
        assert stats.binomtest(len(tail), 4000, 0.01).pvalue > 1e-3
        assert stats.kstest((tail - low) / (high - low), "uniform").pvalue > 1e-3


def monotone_reference(source, target, mean):
    edges, shares = law(target)
    ordered, total = sorted(source), len(source)
    quantiles = [ordered[0]] + [
        ordered[min(int(share * total), total - 1)] for share in np.cumsum(shares)
    ]
    quantiles[-1] = max(ordered[-1], quantiles[-1])
    k = next(k for k in range(100) if mean <= quantiles[k + 1] + 1e-6)
    part = (mean - quantiles[k]) / (quantiles[k + 1] - quantiles[k])
    return edges[k] + part * (edges[k + 1] - edges[k])


@unhurried
@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_monotone_is_the_protocol_taken_literally(seed, part):
    rng = np.random.default_rng(seed)
    source = rng.lognormal(4, 0.5, rng.integers(200, 500))
    target = rng.lognormal(3, 0.5, rng.integers(200, 500))
    mean = float(np.quantile(source, part))
    match = MonotoneScaleMatch(source, target, scale_range=(0, 1e6))
    boxes = sample([(mean, mean)])[1]["boxes"]
    params = match.make_params([torch.zeros(1, 300, 400), boxes, {}])
    if params["kept"].all() and params["scale"] != match.default_scale:
        expected = monotone_reference(source, target, float(boxes[0, 2])) / mean
        assert params["scale"] == pytest.approx(expected, rel=1e-5)


@unhurried
@given(
    st.lists(st.sampled_from([3.0, 7.0, 7 + 2e-7, 50.0]) | positive, min_size=1, max_size=300),
    st.lists(st.sampled_from([9.0, 9 + 2e-15]) | positive, min_size=1, max_size=300),
    st.lists(st.floats(3, 1000), min_size=2, max_size=30),
    st.sampled_from([(0.1, 1.0), (0.0, 2.0), (0.0, 1e9)]),
)
def test_monotone_is_monotone_and_within_the_target(source, target, means, scale_range):
    match = MonotoneScaleMatch(source, target, scale_range=scale_range)
    means = sorted(means + source[:10] + [mean + 5e-7 for mean in source[:10]])
    mapped = [resized(match, mean)[0] for mean in means]
    assert mapped == [resized(match, mean)[0] for mean in means]
    assert all(b >= a * (1 - 1e-12) for a, b in itertools.pairwise(mapped))
    if scale_range[1] == 1e9:
        assert min(target) * (1 - 1e-12) <= mapped[0]
        assert mapped[-1] <= max(target) * (1 + 1e-12)


@unhurried
@given(
    st.lists(st.sampled_from([7.0, 7 + 1e-15]) | positive, min_size=1, max_size=300), st.integers()
)
def test_drawn_sizes_are_within_the_target(target, seed):
    torch.manual_seed(seed % 2**32)
    match = ScaleMatch(target, scale_range=(0, 1e9))
    drawn = resized(match, 100.0, 20)
    assert min(target) * (1 - 1e-12) <= min(drawn)
    assert max(drawn) <= max(target) * (1 + 1e-12)
    if len(set(target)) == 1:
        assert drawn == pytest.approx([target[0]] * 20)


@pytest.mark.parametrize(
    ("target", "out_of_range", "scale"),
    [(500.0, "clip", 0.8), (5.0, "clip", 0.2), (500.0, "default", 0.5), (5.0, "default", 0.5),
     (50.0, "clip", 0.5), (50.0, "default", 0.5), (30.0, "default", 0.3)],
)  # fmt: skip
@pytest.mark.parametrize("monotone", [False, True])
def test_scales_stay_inside_the_range(monotone, target, out_of_range, scale):
    options = {"scale_range": (0.2, 0.8), "default_scale": 0.5, "out_of_range": out_of_range}
    match = (
        MonotoneScaleMatch([100.0], [target], **options)
        if monotone
        else ScaleMatch([target], **options)
    )
    image, scaled = match(*sample([(100, 100)]))
    assert image.shape == (1, round(300 * scale), round(400 * scale))
    assert scaled["boxes"].canvas_size == tuple(image.shape[1:])
    assert scaled["boxes"][0].tolist() == pytest.approx([0, 0, 100 * scale, 100 * scale])


def test_five_draws_are_made_and_the_last_is_clipped():
    target = [10.0] * 500 + [1000.0] * 500  # bins are 10 wide: sizes near 10, or far too large
    torch.manual_seed(0)
    match = ScaleMatch(target, scale_range=(0.1, 1.0))
    scales = np.array(resized(match, 50.0, 4000)) / 50
    clipped = int((scales == 1.0).sum())
    assert ((scales < 0.5) | (scales == 1.0)).all()
    assert stats.binomtest(clipped, 4000, 0.5**5).pvalue > 1e-3


def test_the_same_seed_gives_the_same_and_only_torchs_numbers_are_drawn(sizes):
    match = pickle.loads(pickle.dumps(ScaleMatch(sizes["target"])))
    state = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(resized(match, 100.0, 10))
    assert found[0] == found[1] != found[2]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state  # noqa: NPY002

    monotone = pickle.loads(pickle.dumps(MonotoneScaleMatch(sizes["source"], sizes["target"])))
    state = torch.get_rng_state()
    monotone(*sample([(100, 100)]))
    assert torch.equal(torch.get_rng_state(), state)


@unhurried
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=8), st.integers(1, 40))
def test_small_boxes_are_dropped_by_their_inclusive_sides(sides, target):
    size, default = (301, 403), 0.5
    match = MonotoneScaleMatch([20.0], [float(target)], default_scale=default)
    image, scaled = match(*sample(sides, size, labels=list(range(len(sides)))))
    height, width = image.shape[1:]
    assert scaled["boxes"].canvas_size == (height, width)
    scale = min(max(target / geometric_mean(sides), 0.1), 1.0) if sides else default
    by_scale = round(scale * 301), round(scale * 403)
    kept = [
        index
        for index, (w, h) in enumerate(sides)
        if (w - 1) * by_scale[1] / 403 + 1 >= 2 and (h - 1) * by_scale[0] / 301 + 1 >= 2
    ]
    if kept:
        assert (height, width) == by_scale
        assert scaled["labels"] == kept
    else:
        assert (height, width) == (round(default * 301), round(default * 403))
        assert scaled["labels"] == list(range(len(sides)))
    for box, index in zip(scaled["boxes"].tolist(), scaled["labels"], strict=True):
        w, h = sides[index]
        assert box == pytest.approx([0, 0, w * width / 403, h * height / 301], rel=1e-5)


def test_what_belongs_to_a_box_goes_with_it():
    sides = [(100, 100), (3, 100), (50, 60), (100, 2)]
    masks = torch.stack([torch.full((300, 400), i, dtype=torch.uint8) for i in range(4)])
    image, target = sample(
        sides,
        labels=torch.tensor([4, 5, 6, 7]),
        masks=tv_tensors.Mask(masks),
        plain_masks=masks,
        keypoints=torch.arange(24).reshape(4, 2, 3),
        area=np.arange(4.0),
        iscrowd=[0, 0, 1, 1],
        names=("a", "b", "c", "d"),
    )
    before = copy.deepcopy((image, target))
    match = MonotoneScaleMatch([50.0], [10.0], per_box=("plain_masks", "names"))
    scaled_image, scaled = match(image, target)
    height, width = scaled_image.shape[1:]
    assert isinstance(scaled["boxes"], tv_tensors.BoundingBoxes)
    assert isinstance(scaled["masks"], tv_tensors.Mask)
    assert scaled["masks"].shape == (2, height, width)
    assert scaled["masks"].amax((1, 2)).tolist() == [0, 2]
    assert scaled["plain_masks"].shape == (2, 300, 400)
    for key, expected in (
        ("labels", [4, 6]),
        ("keypoints", target["keypoints"][[0, 2]].tolist()),
        ("area", [0, 2]),
        ("iscrowd", [0, 1]),
        ("names", ["a", "c"]),
    ):
        assert np.asarray(scaled[key]).tolist() == expected
    # And nothing was done to what came in.
    assert torch.equal(image, before[0])
    assert target.keys() == before[1].keys()
    for key in ("boxes", "labels", "masks", "keypoints"):
        assert torch.equal(target[key], before[1][key])


OF_THE_IMAGE = {
    "size": torch.tensor([300, 400]),
    "image_size": (300, 400),
    "orig_size": np.array([300, 400]),
    "canvas": [300, 400],
    "caption": ["a street", "two people"],
    "extra": {"a": 1, "b": 2},
    "scale_factor": torch.ones(2),
    "proposals": torch.zeros(2, 4),
    "semantic": tv_tensors.Mask(torch.zeros(2, 300, 400)),
}


@pytest.mark.parametrize("transform", [MonotoneScaleMatch([50.0], [10.0]), EraseIgnored()])
def test_what_is_as_long_as_the_boxes_is_not_therefore_per_box(transform):
    image, target = sample([(100, 100), (3, 100)], labels=[1, 2], ignore=[0, 1])
    _, rest = transform(image, {**target, **OF_THE_IMAGE})
    assert len(rest["boxes"]) == len(rest["labels"]) == len(rest["ignore"]) == 1
    for key, entry in OF_THE_IMAGE.items():
        assert len(rest[key]) == 2, key
        assert type(rest[key]) is type(entry), key


@pytest.mark.parametrize("per_box", ["vector", ["vector", "other"]])
@pytest.mark.parametrize(
    "make", [functools.partial(MonotoneScaleMatch, [50.0], [10.0]), EraseIgnored]
)
def test_further_entries_per_box_can_be_named(make, per_box):
    image, target = sample([(100, 100), (3, 100)], ignore=[0, 1], vector=[1, 2])
    assert make(per_box=per_box)(image, target)[1]["vector"] == [1]
    assert make()(image, target)[1]["vector"] == [1, 2]


@pytest.mark.parametrize("box_format", ["XYXY", "XYWH", "CXCYWH"])
def test_every_box_format_is_the_same(box_format):
    image, target = sample([(100, 100), (3, 100), (40, 70)])
    boxes = F.convert_bounding_box_format(
        target["boxes"], new_format=tv_tensors.BoundingBoxFormat[box_format]
    )
    match = MonotoneScaleMatch([50.0], [10.0])
    expected = match(image, target)[1]["boxes"]
    found = match(image, {"boxes": boxes})[1]["boxes"]
    assert found.format.value == box_format
    back = F.convert_bounding_box_format(found, new_format=expected.format)
    torch.testing.assert_close(back.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))


def test_images_of_every_kind_become_the_same():
    pixels = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8)
    pixels = F.gaussian_blur(pixels, [9, 9])
    _, target = sample([(60, 60)], (90, 120))
    match = MonotoneScaleMatch([60.0], [20.0])
    expected = match(pixels, target)[0]
    assert torch.equal(expected, F.resize(pixels, [30, 40], antialias=True))
    wrapped, pil = (
        match(tv_tensors.Image(pixels), target)[0],
        match(F.to_pil_image(pixels), target)[0],
    )
    assert isinstance(wrapped, tv_tensors.Image)
    assert isinstance(pil, Image.Image)
    for other in (wrapped, F.pil_to_tensor(pil), match(pixels / 255, target)[0] * 255):
        found = other.as_subclass(torch.Tensor).double()
        torch.testing.assert_close(found, expected.double(), atol=2, rtol=0)


def test_samples_may_be_dicts_or_nested_or_without_boxes():
    image, target = sample([(100, 100)])
    match = MonotoneScaleMatch([100.0], [50.0])
    flat = match({"image": tv_tensors.Image(image), **target})
    assert flat["image"].shape == (1, 150, 200)
    assert flat["boxes"].tolist() == [[0, 0, 50, 50]]
    nested = match([(image, {"inner": target})])
    assert nested[0][0].shape == (1, 150, 200)
    assert nested[0][1]["inner"]["boxes"].tolist() == [[0, 0, 50, 50]]
    assert match(image).shape == (1, 75, 100)
    assert match(image, {"image_id": 3})[1] == {"image_id": 3}
    assert match(image, {"gt": target["boxes"]})[1]["gt"].tolist() == [[0, 0, 50, 50]]
    piped, _ = v2.Compose([match, v2.ToDtype(torch.float32, scale=True)])(image, target)
    assert piped.shape == (1, 150, 200)
    # An image among the boxes' entries is none of them, even with a channel per box.
    three = sample([(100, 100), (1, 1), (90, 90)])[1]
    found = MonotoneScaleMatch([20.8], [10.4])({"image": torch.zeros(3, 300, 400), **three})
    assert found["image"].shape[0] == 3
    assert found["boxes"][:, 2].tolist() == [50, 45]


def test_the_smallest_image_has_a_pixel():
    image, target = MonotoneScaleMatch([100.0], [10.0])(*sample([(100, 100)], (4, 400)))
    assert image.shape == (1, 1, 40)
    assert target["boxes"].canvas_size == (1, 40)


def test_a_mask_of_the_whole_image_is_not_one_per_box():
    masks = tv_tensors.Mask(torch.arange(2).repeat_interleave(400).reshape(2, 400))
    _, target = MonotoneScaleMatch([20.0], [90.0])(
        *sample([(100, 100), (1, 100)], (2, 400), masks=masks)
    )
    assert len(target["boxes"]) == 1
    assert torch.equal(target["masks"], masks)


def test_sizes_of_a_dataset():
    boxes = [
        {"bbox": [0, 0, 4, 9]},
        {"bbox": [0, 0, 5, 5], "ignore": True},
        {"bbox": [0, 0, 5, 5], "iscrowd": 1},
        {"bbox": [0, 0, 0, 5], "iscrowd": 0},
        {"bbox": [0.5, 0, 2.5, 2.5], "ignore": False, "category_id": 7},
    ]
    annotations = [{"image_id": 1, **box} for box in boxes]
    assert box_sizes({"images": [{"id": 1}], "annotations": annotations}).tolist() == [6, 2.5]


@pytest.mark.parametrize(
    ("target_sizes", "message"),
    [
        ([], "target_sizes: expected shape"),
        ([[1.0]], "target_sizes: expected shape"),
        ([1.0, 0.0], r"target_sizes\[1\]: .* found 0"),
        ([1.0, -1.0], r"target_sizes\[1\]: .* found -1"),
        (torch.tensor([math.nan]), r"target_sizes\[0\]: .* found nan"),
    ],
)
def test_bad_sizes_are_named(target_sizes, message):
    with pytest.raises(ValueError, match=message):
        ScaleMatch(target_sizes)
    with pytest.raises(ValueError, match=message.replace("target", "source")):
        MonotoneScaleMatch(target_sizes, [1.0])


@pytest.mark.parametrize(
    "options",
    [
        {"scale_range": (1.0, 0.5)},
        {"scale_range": (-1.0, 0.5)},
        {"scale_range": (0.1, math.inf)},
        {"default_scale": 0.0},
        {"default_scale": math.nan},
        {"out_of_range": "drop"},
    ],
)
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ScaleMatch([1.0], **options)


def test_bad_samples_are_named():
    match = ScaleMatch([10.0])
    image, target = sample([(10, 10), (20, 20)])
    with pytest.raises(TypeError, match=r"boxes: expected .*BoundingBoxes, found Tensor"):
        match(image, {"boxes": torch.zeros(1, 4)})
    with pytest.raises(TypeError, match="sample: expected an image, found"):
        match(target)
    with pytest.raises(TypeError, match="boxes: expected them in a dict, found a tuple"):
        match(image, target["boxes"])
    for bad in ([20.0, 0, 10, 10], [math.nan, 0, 10, 10], [0, 0, math.inf, 10]):
        target["boxes"][1] = torch.tensor(bad)
        with pytest.raises(ValueError, match=r"boxes\[1\]: expected finite .*found .*XYXY"):
            match(image, target)
