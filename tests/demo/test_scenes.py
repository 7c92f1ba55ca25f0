"""Scenes: what is drawn, and mirrored."""

from __future__ import annotations

import numpy as np

from alphafpn.demo.scenes import FAR, SIDE, draw


def test_both_families_have_the_same_images():
    near, far = (draw(12, 0, far=far) for far in (False, True))
    decided = [len(scene.boxes) > 0 for scene in far]
    assert set(decided) == {False, True}
    for a, b, objects in zip(near, far, decided, strict=True):
        assert np.array_equal(a.pixels, b.pixels)
        assert np.array_equal(b.boxes, a.boxes[: len(a.boxes) * objects])
        assert len(a.boxes) > 0
        # A red disc near a corner decides; all that is tiny is far from it.
        red = a.pixels[..., 0].astype(int) - a.pixels[..., 2] > 60
        assert (red.sum() > 500) == objects
        if objects:
            centre = np.argwhere(red).mean(0)[::-1]
            sizes = a.boxes[:, 2:] - a.boxes[:, :2]
            middles = (a.boxes[:, :2] + a.boxes[:, 2:]) / 2
            distances = np.hypot(*(middles - centre).T)
            assert (distances[sizes.prod(1) < 400] > FAR - 3).all()
    assert not np.array_equal(near[0].pixels, draw(1, 1, far=False)[0].pixels)


def test_boxes_are_around_figures_of_the_first_kind():
    for scene in draw(6, 3, far=False):
        assert (scene.boxes >= 0).all()
        assert (scene.boxes <= SIDE).all()
        grey = scene.pixels.mean(2)
        for x1, y1, x2, y2 in scene.boxes.round().astype(int).tolist():
            upper, lower = np.split(grey[y1 : y2 - (y2 - y1) % 2, x1:x2], 2)
            assert upper.mean() > lower.mean()


def test_mirrored_twice_is_the_scene():
    (scene,) = draw(1, 0, far=False)
    once = scene.mirrored()
    assert np.array_equal(once.pixels, scene.pixels[:, ::-1])
    x1, y1, x2, y2 = scene.boxes[0].tolist()
    np.testing.assert_allclose(once.boxes[0], [SIDE - x2, y1, SIDE - x1, y2])
    twice = once.mirrored()
    np.testing.assert_allclose(twice.boxes, scene.boxes, atol=1e-4)
    assert np.array_equal(twice.pixels, scene.pixels)
