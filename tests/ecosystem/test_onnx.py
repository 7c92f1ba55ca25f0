"""ONNX: pyramids through both exporters, whole detectors as far as stock ones go."""

from __future__ import annotations

import itertools
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

from alphafpn.surgery import fold_alpha
from tests.detectors import BUILDERS, make_detector, make_faster_rcnn, make_fcos
from tests.ecosystem import test_adapted
from tests.ecosystem.test_adapted import adapted
from tests.pyramids import FACTORS, KINDS, make_features, make_patched

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


class Flat(nn.Module):
    """A pyramid between lists of maps, as ONNX has no dicts."""

    def __init__(self, fpn):
        super().__init__()
        self.fpn = fpn

    def forward(self, *maps):
        return tuple(self.fpn(OrderedDict((str(i), c) for i, c in enumerate(maps))).values())


def run(path, inputs):
    """Runs an ONNX file; inputs go by their place."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    found = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    return [torch.from_numpy(x) for x in found]


def export(model, args, path, dynamo):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, args, path, dynamo=dynamo, verbose=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extra", ["pool", "p6p7 on c5"])
@pytest.mark.parametrize("dynamo", [True, False])
def test_pyramids_agree(tmp_path, dynamo, extra, kind):
    model, path = Flat(make_patched(kind(FACTORS), extra=extra)), tmp_path / "pyramid.onnx"
    export(model, tuple(make_features().values()), path, dynamo)
    others = tuple(make_features(seed=1).values())
    with torch.no_grad():
        for found, expected in zip(run(path, others), model(*others), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


CHANGES = {
    "stock": make_detector,
    "patched": lambda build: make_detector(build, FACTORS[:2]),
    "folded": lambda build: fold_alpha(make_detector(build, FACTORS[:2])),
    "adapted": adapted,
}


@pytest.mark.parametrize(
    ("change", "build"),
    [
        *itertools.product(("stock", "patched", "folded"), BUILDERS),
        *itertools.product(["adapted"], test_adapted.BUILDERS),
    ],
)
def test_detectors_agree_as_stock_ones_do(tmp_path, change, build):
    """The exporter that traces takes whole detectors."""
    images = [torch.rand(3, 64, 64, generator=torch.manual_seed(i)) for i in range(2)]
    model = CHANGES[change](build).eval()
    export(model, ([images[0]],), tmp_path / "detector.onnx", dynamo=False)
    found = run(tmp_path / "detector.onnx", images[1:])
    with torch.no_grad():
        (expected,) = model(images[1:])
    assert len(expected["scores"]) > (50 if change != "adapted" else 0)
    for x, y in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("build", "to_onnx"), [(make_faster_rcnn, False), (make_fcos, False), (make_faster_rcnn, True)]
)
def test_detectors_export_no_worse_than_stock(tmp_path, build, to_onnx):
    """torch.export does not take torchvision's detectors; with patched ones it gets as far."""
    images = ([torch.rand(3, 64, 64)],)
    errors = []
    for change in ("stock", "patched"):
        try:
            if to_onnx:
                export(CHANGES[change](build).eval(), images, tmp_path / "detector.onnx", True)
            else:
                torch.export.export(CHANGES[change](build).eval(), images)
            errors.append(None)
        except Exception as error:
            errors.append(type(error))
    assert errors[0] is errors[1]
