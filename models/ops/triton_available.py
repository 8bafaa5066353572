"""Whether Triton is installed; the kernels themselves are imported where they are used."""

import importlib.util
from functools import cache


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None
