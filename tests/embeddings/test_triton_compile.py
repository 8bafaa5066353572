"""Every kernel of the tables compiles for NVIDIA and AMD without a GPU, without spills, with wide loads and stores."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

WIDE = {"gather", "scatter", "sgd", "adagrad", "rowwise_adagrad", "adam", "gather_initial"}  # 16 bytes in and out
WIDE_LOADS = WIDE | {"find", "rehash", "repair"}  # whole records of the index
WIDE_STORES = WIDE | {"fill", "initialize"}
KERNELS = WIDE_LOADS | WIDE_STORES | {"insert", "leader", "claim_first", "rank", "count", "segment_sum", "round"}
TARGETS = ("sm_80", "sm_90", "gfx942")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """In a process of its own: under TRITON_INTERPRET nothing can be compiled."""
    path: Path = tmp_path_factory.mktemp("kernels") / "kernels.csv"
    command = [sys.executable, "-m", "grzoo.embeddings.kernels.triton.inspect", "--widths", "128", "100"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(path.parent / "cache")
    run = subprocess.run([*command, "--output", str(path)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    return list(csv.DictReader(path.open()))


@pytest.mark.timeout(600)
def test_every_kernel_compiles_for_every_target(reports: list[dict[str, str]]) -> None:
    assert {(r["kernel"], r["target"]) for r in reports} == {(k, t) for k in KERNELS for t in TARGETS}
    from grzoo.embeddings.kernels.triton import function_kernels, index_kernels, row_kernels, update_kernels

    modules = (function_kernels, index_kernels, row_kernels, update_kernels)
    assert {name.removesuffix("_kernel") for m in modules for name in vars(m) if name.endswith("_kernel")} == KERNELS


def test_nothing_spills(reports: list[dict[str, str]]) -> None:
    assert [r for r in reports if int(r["spills"]) > 0] == []
    assert all(0 < int(r["registers"]) <= 128 for r in reports if r["registers"] != "-1")


def test_shared_memory_is_there_on_every_target(reports: list[dict[str, str]]) -> None:
    assert all(int(r["shared_bytes"]) <= 64 << 10 for r in reports), "what a MI300 has, which is the least"


def test_rows_and_records_move_sixteen_bytes_at_a_time(reports: list[dict[str, str]]) -> None:
    assert [r for r in reports if r["kernel"] in WIDE_LOADS and r["load_bytes"] != "16"] == []
    assert [r for r in reports if r["kernel"] in WIDE_STORES and r["store_bytes"] != "16"] == []


def test_the_bytes_of_the_floor() -> None:
    from grzoo.embeddings.kernels.triton.costs import floor, gather_bytes, update_bytes

    assert gather_bytes(128) == 8 + 512 + 512
    assert update_bytes(128, 2) == 512 * 7 + 2 * 8 + 64 + 16  # gradient; row and two moments, in and out
    one = floor(128, 3, 1)
    assert one.evaluation < one.forward and floor(128, 6, 2).backward == 2 * one.backward
