from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F  # noqa: N812

from alphafpn.tiny.erasing import EraseIgnored

HEIGHT, WIDTH = 12, 17


def boxes_of(rows):
    data = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)
    return tv_tensors.BoundingBoxes(data, format="XYXY", canvas_size=(HEIGHT, WIDTH))


def pixels_of(seed, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (3, HEIGHT, WIDTH), generator=generator)
    return pixels.to(dtype) / 255 if dtype.is_floating_point else pixels.to(dtype)


def painted(pixels, boxes):
    """Pixel by pixel: those whose square a box touches, in the mean of these pixels."""
    result = pixels.clone()
    for left, top, right, bottom in boxes:
        inside = torch.tensor(
            [
                [x + 1 > left and x < right and y + 1 > top and y < bottom for x in range(WIDTH)]
                for y in range(HEIGHT)
            ]
        )
        for channel in range(3):
            if inside.any():
                mean = pixels[channel][inside].double().mean()
                mean = mean if pixels.is_floating_point() else mean.round()
                result[channel][inside] = mean.to(pixels.dtype)
    return result


box = st.builds(
    lambda x, y, w, h: [x, y, x + w, y + h],
    st.floats(-8, 20, width=16), st.floats(-8, 20, width=16),
    st.floats(0.125, 15, width=16), st.floats(0.125, 15, width=16),
)  # fmt: skip


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(box, st.booleans()), max_size=5), st.integers(0, 100))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_regions_are_painted_pixel_by_pixel(dtype, rows, seed):
    pixels = pixels_of(seed, dtype)
    ignored = torch.tensor([flag for _, flag in rows], dtype=torch.bool)
    target = {"boxes": boxes_of([row for row, _ in rows]), "ignore": ignored}
    before = pixels.clone()
    image, rest = EraseIgnored()(pixels, target)
    assert image.dtype == dtype
    torch.testing.assert_close(image, painted(pixels, [row for row, flag in rows if flag]))
    assert rest["boxes"].tolist() == [row for row, flag in rows if not flag]
    assert rest["ignore"].tolist() == [False] * int((~ignored).sum())
    assert torch.equal(pixels, before)
    assert len(target["boxes"]) == len(rows)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "F", "I", "I;16"])
def test_pil_images_are_painted_like_tensors(mode):
    channels = {"RGB": 3, "RGBA": 4}.get(mode, 1)
    dtype = {"F": np.float32, "I": np.int32, "I;16": np.uint16}.get(mode, np.uint8)
    array = np.random.default_rng(0).integers(0, 250, (HEIGHT, WIDTH, channels)).astype(dtype)
    image = Image.fromarray(array.squeeze())
    assert image.mode == mode
    target = {"boxes": boxes_of([[2, 3, 7.5, 9], [1, 1, 4, 4]]), "ignore": [True, False]}
    found, rest = EraseIgnored()(image, target)
    assert isinstance(found, Image.Image)
    assert found.mode == mode
    region = array[3:9, 2:8].reshape(-1, channels).astype(np.float64).mean(0)
    expected = array.copy()
    expected[3:9, 2:8] = region if mode == "F" else region.round()
    np.testing.assert_allclose(np.asarray(found).reshape(expected.shape), expected, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(image), array.squeeze())
    assert rest["ignore"] == [False]


def test_the_last_box_may_be_erased_but_not_what_the_image_is_called():
    target = {"boxes": boxes_of([[0, 0, 5, 5]]), "ignore": [1], "id": torch.tensor([7, 8])}
    target["area"] = 25  # of whatever: not one for each box
    image, rest = EraseIgnored()(tv_tensors.Image(pixels_of(0)), target)
    assert isinstance(image, tv_tensors.Image)
    assert (rest["boxes"].shape, rest["ignore"]) == ((0, 4), [])
    assert (rest["id"].tolist(), rest["area"]) == ([7, 8], 25)


def test_flags_can_be_chosen():
    target = {"boxes": boxes_of([[0, 0, 5, 5], [5, 5, 9, 9]]), "ignore": [1, 0], "crowd": [0, 1]}
    pixels = pixels_of(0)
    image, rest = EraseIgnored("crowd")(pixels, target)
    assert torch.equal(image, painted(pixels, [[5, 5, 9, 9]]))
    assert rest["ignore"] == [1]
    assert EraseIgnored(["crowd", "ignore"])(pixels, target)[1]["ignore"] == []


@pytest.mark.parametrize("target", [{}, {"image_id": 1}, {"boxes": boxes_of([]), "labels": []}])
def test_nothing_to_erase_changes_nothing(target):
    pixels = pixels_of(0)
    image, rest = EraseIgnored()(pixels, target)
    assert torch.equal(image, pixels)
    assert rest.keys() == target.keys()


def test_it_is_a_transform_like_any_other():
    erase = pickle.loads(pickle.dumps(EraseIgnored()))
    assert "ignore" in repr(erase)
    target, pixels = {"boxes": boxes_of([[0, 0, 5, 5]]), "uncertain": [True]}, pixels_of(0)
    image, _ = v2.Compose([erase, v2.ToDtype(torch.float32, scale=True)])(pixels, target)
    torch.testing.assert_close(image, painted(pixels, [[0, 0, 5, 5]]) / 255)


def test_bad_samples_are_named():
    pixels, two = pixels_of(0), boxes_of([[0, 0, 5, 5], [5, 5, 9, 9]])
    erase = EraseIgnored()
    with pytest.raises(ValueError, match=r"one of \['ignore', .*found \['boxes', 'labels'\]"):
        erase(pixels, {"boxes": two, "labels": [1, 2]})
    with pytest.raises(ValueError, match=r"'ignore'\]: expected .* 2 boxes, found shape \[3\]"):
        erase(pixels, {"boxes": two, "ignore": [True, False, True]})
    with pytest.raises(TypeError, match="found mode P"):
        erase(F.to_pil_image(pixels).convert("P"), {"boxes": two, "ignore": [True, False]})
