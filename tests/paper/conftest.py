from __future__ import annotations

import pytest

from tests.paper.runs import write_dataset


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, "train")
    write_dataset(folder, "val", images=3, seed=1)
    return folder
