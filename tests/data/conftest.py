"""Small splits and dataset folders for the tests of the data layer."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from grzoo.data import EventDataset
from grzoo.data.prepare import prepare
from hypothesis import settings

settings.register_profile("data", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("data")


@pytest.fixture
def split() -> Callable[..., EventDataset]:
    """split(lengths, target_from=1) in memory; item of event e of row r: 1000 r + e, its time 10 times that."""

    def make(lengths: list[int], target_from: int | list[int] = 1) -> EventDataset:
        items = np.concatenate([np.zeros(0, int), *(1000 * row + np.arange(n) for row, n in enumerate(lengths))])
        return EventDataset.from_arrays({"item_id": items, "timestamp": items * 10}, lengths, target_from)

    return make


@pytest.fixture(scope="session")
def synthetic_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic dataset folder with all three splits."""
    folder = tmp_path_factory.mktemp("data") / "synthetic"
    prepare("synthetic", folder, validation="last", num_users=120, num_items=80, mean_length=15.0)
    return folder
