from __future__ import annotations

import numpy as np
import pytest
from alphafpn.estimate.columns import (
    CROWD,
    Annotations,
    check_categories,
    clip,
    concatenate,
)


def clipped(*boxes: list[float], reason: int = 0, size: tuple[int, int] = (20, 10)) -> Annotations:
    return clip(
        np.array([size]),
        np.array(boxes, np.float32),
        np.array([len(boxes)]),
        np.full(len(boxes), reason, np.int8),
    )


@pytest.mark.parametrize("edge", range(4))
def test_more_than_a_pixel_beyond_the_image_is_counted(edge: int) -> None:
    outward = np.array([-1, -1, 1, 1])[edge]
    for by, counted in ((0, 0), (1, 0), (1.0625, 1)):
        box = [0.0, 0.0, 10.0, 20.0]
        box[edge] += outward * by
        found = clipped(box)
        assert found.num_clipped == counted
        assert found.boxes.tolist() == [[0, 0, 10, 20]]


def test_left_out_boxes_are_not_counted_as_clipped() -> None:
    found = clipped([-5, -5, 5, 5], reason=CROWD)
    assert (found.num_clipped, found.left_out) == (0, {"crowd": 1})
    found = clipped([3, 3, 3, 8], [11, 3, 15, 8], [2, 3, 4, 5])
    assert found.left_out == {"zero size": 1, "outside the image": 1}
    assert found.boxes_per_image.tolist() == [1]


def test_parts_are_put_in_a_row() -> None:
    parts = [clipped([-5, 0, 5, 5], [3, 3, 3, 3]), clipped([1, 1, 2, 2], [4, 4, 4, 9])]
    found = concatenate(parts)
    assert found.image_sizes.tolist() == [[20, 10]] * 2
    assert found.boxes.tolist() == [[0, 0, 5, 5], [1, 1, 2, 2]]
    assert found.boxes_per_image.tolist() == [1, 1]
    assert (found.num_clipped, found.left_out) == (1, {"zero size": 2})
    assert found.place(1) == "image 1"


@pytest.mark.parametrize(("count", "ending"), [(99, "98, 99"), (100, "99, 100"), (101, "100, ...")])
def test_long_lists_of_categories_are_cut(count: int, ending: str) -> None:
    with pytest.raises(ValueError, match="found 777") as caught:
        check_categories({777}, set(range(1, count + 1)), "file")
    known = str(caught.value).partition("among ")[2].partition(", found")[0]
    assert known.startswith("1, 2, 3, ")
    assert known.removesuffix(" (101 in all)").endswith(ending)
    assert ("101 in all" in known) == (count > 100)
