"""What needs no function of its own: ramped factors, and the paper's sigma-power initialisation."""

from __future__ import annotations

import copy

import pytest
import torch

from alphafpn.surgery import fold_alpha, patch_detector
from tests.detectors import BUILDERS, make_batch, make_detector
from tests.pyramids import make_features, make_pyramid, relative_error

FACTORS = [0.5, 0.25]


@pytest.mark.parametrize("build", BUILDERS)
def test_factors_ramp_under_a_running_optimizer(build):
    torch.manual_seed(0)
    model, ramp = make_detector(build), 4
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, 1e-3, momentum=0.9)
    stock, seen = copy.deepcopy(model), []
    for step in range(6):
        share = min(step / ramp, 1.0)
        patch_detector(model, [1 + share * (factor - 1) for factor in FACTORS])
        seen.append(model.backbone.fpn.alpha.tolist())
        if step == 0:
            first = model.backbone.fpn.alpha
            torch.manual_seed(1)
            expected = stock(*make_batch())
            torch.manual_seed(1)
            torch.testing.assert_close(model(*make_batch()), expected, rtol=0, atol=0)
        optimizer.zero_grad()
        sum(model(*make_batch()).values()).backward()
        optimizer.step()
    assert seen == [[1, 1], [0.875, 0.8125], [0.75, 0.625], [0.625, 0.4375], FACTORS, FACTORS]
    assert model.backbone.fpn.alpha is first
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert len(optimizer.state) == len(parameters)


@pytest.mark.parametrize("sigma", [0.5, 2.0, 0.3])
@pytest.mark.parametrize("extra", ["pool", "p6p7 on c5", "p6p7 on p5"])
def test_sigma_power_initialisation_is_to_patch_and_fold(sigma, extra):
    """Table 2: inner_i times sigma^(i-2), layer_i divided by it; section 3.3: as alpha = sigma."""
    by_hand = make_pyramid(extra=extra)
    with torch.no_grad():
        for i, (inner, layer) in enumerate(
            zip(by_hand.inner_blocks, by_hand.layer_blocks, strict=True)
        ):
            inner[0].weight.mul_(sigma**i)
            inner[0].bias.mul_(sigma**i)
            layer[0].weight.div_(sigma**i)
    folded = fold_alpha(patch_detector(make_pyramid(extra=extra), sigma))
    assert list(folded.state_dict()) == list(by_hand.state_dict())
    for name, tensor in by_hand.state_dict().items():
        torch.testing.assert_close(folded.state_dict()[name], tensor, rtol=1e-6, atol=0)

    x = make_features()
    expected = patch_detector(make_pyramid(extra=extra), sigma)(x)
    assert relative_error(by_hand(x), expected) < 1e-5
    assert relative_error(make_pyramid(extra=extra)(x), expected) > 0.01
