"""Where a number comes from: the machine, the versions, the commit."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch


def device() -> str:
    """The GPU, or the CPU with its number of cores."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


def processor() -> str:
    """Model name and number of the machine's cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.machine()


def commit() -> str:
    """What git says of the source, "-dirty" where it was changed since; "none" of an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "none"
    return done.stdout.strip() if done.returncode == 0 else "none"


def versions() -> dict[str, str]:
    """Versions and machine: the conditions of every measured number."""
    packages = [f"{name} {version(name)}" for name in ("grzoo", "torch", "deepspeed", "transformers")]
    return {
        "versions": ", ".join([*packages, f"Python {platform.python_version()}"]),
        "commit": commit(),
        "machine": f"{device()}, {platform.machine()}, {len(os.sched_getaffinity(0))} CPU cores",
    }
