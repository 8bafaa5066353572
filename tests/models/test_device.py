"""Models on a GPU: what they give, where, and what the host waits for (device_cases.py)."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("device_cases.py")


@pytest.mark.timeout(900)  # its cores may be shared
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_cases_of_models_on_a_device() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "--durations=8", "-p", "no:cacheprovider", str(CASES)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=CASES.parents[2])
    print(run.stdout[-2000:])
    assert run.returncode == 0, run.stdout[-12_000:] + run.stderr[-2000:]
