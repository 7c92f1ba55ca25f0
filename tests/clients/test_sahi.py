"""sahi: its torchvision wrapper runs patched and folded detectors, on whole images and slices."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from alphafpn.surgery import fold_alpha
from tests.detectors import BUILDERS, make_detector

pytest.importorskip("sahi")
from sahi.models.torchvision import TorchVisionDetectionModel
from sahi.predict import get_prediction, get_sliced_prediction

IMAGE = np.random.default_rng(0).integers(0, 256, (100, 140, 3), dtype=np.uint8)


def wrap(detector):
    return TorchVisionDetectionModel(
        model=detector,
        device="cpu",
        confidence_threshold=0.1,
        category_mapping={"0": "background", "1": "person"},
    )


def listed(result):
    """Predictions as rows (x1, y1, x2, y2, score, category), best first."""
    return torch.tensor(
        [
            (*p.bbox.to_xyxy(), p.score.value, p.category.id)
            for p in sorted(result.object_prediction_list, key=lambda p: -p.score.value)
        ]
    )


@pytest.mark.parametrize("build", BUILDERS)
def test_patched_and_folded_detectors_predict_the_same(build):
    patched = make_detector(build, [0.5, 0.25])
    folded = fold_alpha(copy.deepcopy(patched))
    whole, sliced = [], []
    slices = {"slice_height": 64, "slice_width": 64, "verbose": 0}
    for detector in (patched, folded, make_detector(build)):
        wrapped = wrap(detector)
        whole.append(listed(get_prediction(IMAGE, wrapped)))
        sliced.append(listed(get_sliced_prediction(IMAGE, wrapped, **slices)))
    for found, again, stock in (whole, sliced):
        assert len(found) > 5
        torch.testing.assert_close(again, found, rtol=1e-3, atol=1e-2)
        assert stock.shape != found.shape or not torch.allclose(stock, found, atol=1e-2)
    with torch.no_grad():
        (expected,) = patched.eval()([torch.from_numpy(IMAGE).permute(2, 0, 1) / 255])
    confident = expected["scores"][expected["scores"] > 0.1]
    torch.testing.assert_close(whole[0][:, 4], confident, rtol=1e-4, atol=1e-5)
