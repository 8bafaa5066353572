"""The Triton kernels of the ops: equal to the naive twins (triton_cases.py), and compiled for every target."""

import csv
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TARGETS = ("sm_80", "sm_90", "gfx942")
# Bytes that a program may have on an A100, an H100 and a MI300: beyond them a launch fails.
MAX_SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
MAX_SPILLS = 192  # bytes of a thread: see the README of hstu_attention
CASES = Path(__file__).with_name("triton_cases.py")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.timeout(900)  # its cores may be shared
def test_cases_of_the_kernels() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--durations=8", "-p", "no:cacheprovider", str(CASES)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **interpret}, cwd=CASES.parents[3])
    print(run.stdout[-2000:])
    assert run.returncode == 0, run.stdout[-12_000:] + run.stderr[-2000:]


def compiled(path: Path, *arguments: str) -> list[dict[str, str]]:
    command = [sys.executable, "-m", "grzoo.models.ops.inspect", *arguments, "--output", str(path / "kernels.csv")]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(path / "cache")
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    found = list(csv.DictReader((path / "kernels.csv").open()))
    assert [r for r in found if int(r["shared_bytes"]) > MAX_SHARED[r["target"]]] == []
    return found


def all_kernels() -> set[str]:
    """Names of the kernels in models/ops, read from the sources."""
    ops = Path(__file__).parents[3] / "models" / "ops"
    sources = [path.read_text() for path in ops.glob("*/triton_kernels.py")]
    return {name for source in sources for name in re.findall(r"@triton\.jit.*\ndef (\w+)_kernel\(", source)}


def test_every_kernel_of_the_ops_is_known() -> None:
    kernels = {"forward", "query_gradient", "key_value_gradient", "bias_gradient"}
    kernels |= {"norm_gate_forward", "norm_gate_backward", "keyed_dropout", "token_loss", "row_gradient"}
    assert all_kernels() == kernels


@pytest.mark.timeout(900)
def test_kernels_compile_for_nvidia_and_amd_without_a_gpu(tmp_path: Path) -> None:
    found = compiled(tmp_path, "--widths", "64", "--targets", *TARGETS)
    assert {(r["kernel"], r["target"]) for r in found} == {(k, t) for k in all_kernels() for t in TARGETS}
    assert [r for r in found if int(r["spills"]) > MAX_SPILLS] == []
    assert {r["load_bytes"] for r in found if r["target"] == "sm_90" and r["kernel"] != "bias_gradient"} == {"16"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kernels_of_float32_compile_everywhere(tmp_path: Path) -> None:
    found = compiled(tmp_path, "--dtypes", "fp32", "--widths", "64", "256", "--targets", *TARGETS)
    assert {(r["kernel"], r["target"]) for r in found} == {(k, t) for k in all_kernels() for t in TARGETS}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kernels_of_common_widths_hardly_spill_on_hopper(tmp_path: Path) -> None:
    found = compiled(tmp_path, "--widths", "32", "128", "--targets", "sm_90")
    assert [r for r in found if int(r["spills"]) > MAX_SPILLS] == []
