"""Settings that every test process needs before torch is imported, and the real data when it is there."""

import os
import re
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

# Spawned ranks import their jobs by name: `from spawn import spawn`, tests/distributed/*_jobs.py, helpers and parts of
# tests/faults work everywhere.
sys.path += [str(Path(__file__).parent / folder) for folder in ("distributed", "embeddings", "faults")]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of public logs that $GRZOO_DATA names; tests on real data are skipped without it."""
    folder = os.environ.get("GRZOO_DATA")
    if not folder:
        pytest.skip("set GRZOO_DATA to a folder with ml-1m, ml-100k, ... to run tests on real data")
    return Path(folder)


@pytest.fixture(scope="session")
def readme_block() -> tuple[str, str]:
    """The first block of Python in the README, and the output below it."""
    readme = Path(__file__).parents[1] / "README.md"
    match = re.search(r"```python\n(.*?)```\n```\n(.*?)```", readme.read_text(), re.DOTALL)
    assert match is not None
    return match[1], match[2]


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets the threads of torch, which the kernels use too, for one test."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
