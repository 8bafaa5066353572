"""Runs save_job.py below the recorder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def build_recorder(folder: Path) -> Path:
    """Compiles recorder.c; the test is skipped where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("the recorder of file operations needs Linux and a C compiler")
    library = folder / "recorder.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "recorder.c", "-ldl"], check=True)
    return library


def run_job(task: str, folder: Path, world_size: int, timeout: float = 280.0) -> tuple[Path, Path, dict[str, Any]]:
    """Runs a task of save_job.py on ranks of their own; returns the recorded folder, the log and rank 0's answer."""
    root, log, report = folder / "disk", folder / "log", folder / "report"
    root.mkdir()
    environment = os.environ | {
        "LD_PRELOAD": str(build_recorder(folder)),
        "GRZOO_TRACE_ROOT": str(root),
        "GRZOO_TRACE_LOG": str(log),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    words = [sys.executable, str(HERE / "save_job.py"), task, str(root / "run" / "out"), str(report)]
    ranks = [
        subprocess.Popen([*words, str(rank), str(world_size), str(folder / "rendezvous")], env=environment)
        for rank in range(world_size)
    ]
    try:
        codes = [rank.wait(timeout) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * world_size
    return root, log, json.loads((folder / "report-0").read_text())
