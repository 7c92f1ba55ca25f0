from __future__ import annotations

from pathlib import Path

import pytest
from torchvision.datasets import CocoDetection

from tests.annotation_sets import (
    content_as_coco,
    write,
)


@pytest.fixture
def coco_detection(tmp_path: Path) -> CocoDetection:
    """The content as a `CocoDetection` that cannot open an image."""
    return CocoDetection(tmp_path / "nowhere", str(write(tmp_path, content_as_coco())))
