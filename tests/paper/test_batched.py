"""Losses of a whole batch at once, against those of `tiny_retinanet`'s own loop over images."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alphafpn.demo.detector import DEVIATION, MEAN, detector
from benchmarks.paper.batched import BatchedLoss, outputs

SIZE = (64, 96)


def targets_of(counts: list[int], classes: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Boxes and labels of images with so many objects each, most of them tiny."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for count in counts:
        sides = 3 * 16 ** torch.rand(count, 2, generator=draw)
        room = torch.tensor([SIZE[1], SIZE[0]]) - sides
        corners = room.clamp(min=0) * torch.rand(count, 2, generator=draw)
        labels = torch.randint(1, classes + 1, (count,), generator=draw)
        found.append({"boxes": torch.cat([corners, corners + sides], 1), "labels": labels})
    return found


@settings(max_examples=10, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    classes=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_losses_and_gradients_are_those_of_the_loop(
    counts: list[int], classes: int, seed: int
) -> None:
    torch.manual_seed(seed)
    model = detector(tuple((8.0 * 2**i,) for i in range(5)), (0.5, 1.0, 2.0), classes).train()
    targets = targets_of(counts, classes, seed)
    images = torch.rand(len(counts), 3, *SIZE)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    expected = model(list(images), targets)
    expected_gradients = torch.autograd.grad(sum(expected.values()), parameters)
    batched = BatchedLoss(model, SIZE)
    boxes, labels = ([target[name] for target in targets] for name in ("boxes", "labels"))
    found = batched(
        *outputs(model, (images - MEAN) / DEVIATION), batched.match(boxes), boxes, labels
    )
    gradients = torch.autograd.grad(sum(found.values()), parameters)

    assert list(found) == list(expected)
    for name, loss in expected.items():
        assert found[name].item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        scale = float(reference.abs().max())
        torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=1e-4 * scale + 1e-7)
