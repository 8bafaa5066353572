"""Law 5: the tables in GPU memory equal the naive ones (triton_cases.py), on a GPU or under Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, and other tests may have imported it: hence a process of its own.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("triton_cases.py")


@pytest.mark.timeout(900)  # its cores may be shared
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_cases_of_the_device_backend() -> None:
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--durations=8", "-p", "no:cacheprovider", str(CASES)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **interpret}, cwd=CASES.parents[2])
    print(run.stdout[-2000:])
    assert run.returncode == 0, run.stdout[-12_000:] + run.stderr[-2000:]
