"""Where tables are is a setting of each: results and files do not depend on it (placement_cases.py)."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from grzoo.embeddings import DynamicEmbeddingCollection, FeatureConfig, TableConfig
from grzoo.embeddings.kernels import BackendUnavailable

CASES = Path(__file__).with_name("placement_cases.py")


@pytest.mark.timeout(900)  # its cores may be shared
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_cases_of_placement() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "--durations=8", "-p", "no:cacheprovider", str(CASES)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=CASES.parents[2])
    print(run.stdout[-2000:])
    assert run.returncode == 0, run.stdout[-12_000:] + run.stderr[-2000:]


def test_placement_is_json_and_is_checked() -> None:
    config = TableConfig(name="item", embedding_dim=4, placement="device")
    assert TableConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert TableConfig(name="item", embedding_dim=4).placement == "host"
    with pytest.raises(ValueError, match=r"placement of table 'item' must be one of .*'gpu'"):
        TableConfig(name="item", embedding_dim=4, placement="gpu")
    with pytest.raises(ValueError, match="backend 'triton' is that of tables on a device: .*placement='device'"):
        DynamicEmbeddingCollection(
            [TableConfig(name="item", embedding_dim=4)], [FeatureConfig(name="f", table="item")], backend="triton"
        )


@pytest.mark.skipif(torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="has a device")
def test_a_table_on_a_device_that_is_not_there_says_what_to_do() -> None:
    tables = [TableConfig(name="item", embedding_dim=4, placement="device")]
    collection = DynamicEmbeddingCollection(tables, [FeatureConfig(name="f", table="item")])
    with pytest.raises(BackendUnavailable, match="placement='host'"):
        collection.prepare([{"f": torch.tensor([1])}])
