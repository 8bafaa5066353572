"""Initial values of rows: pure functions of (seed, init_key, id, column), bit for bit the same on every backend."""

import functools
import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .kernels.base import RowInit
from .keyed import fold, keyed, string_key

INITIALIZERS = {"uniform": "scale", "normal": "std", "truncated_normal": "std", "constant": "value"}

TRUNCATION = 2.0  # standard deviations
_QUANTILES = 65536


def check_initializer(spec: object) -> None:
    """Raise ValueError unless `spec` holds a "kind" of INITIALIZERS and its parameter, finite and in range.

    Or {"kind": "pretrained", "file": path, "otherwise": one of those}.
    """
    usage = " or ".join(f'{{"kind": "{kind}", "{name}": ...}}' for kind, name in INITIALIZERS.items())
    if isinstance(spec, Mapping) and spec.get("kind") == "pretrained":
        _check_pretrained(spec, usage)
        return
    if not isinstance(spec, Mapping) or spec.get("kind") not in INITIALIZERS:
        raise ValueError(f"initializer {spec!r} must be {usage}")
    name = INITIALIZERS[spec["kind"]]
    if set(spec) != {"kind", name}:
        raise ValueError(f"initializer {spec!r} must have exactly the fields 'kind' and {name!r}")
    value = spec[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name!r} of initializer {spec!r} must be a finite number")
    if name != "value" and value < 0:
        raise ValueError(f"{name!r} of initializer {spec!r} must not be negative")


def _check_pretrained(spec: Mapping[str, Any], usage: str) -> None:
    if set(spec) != {"kind", "file", "otherwise"}:
        raise ValueError(f"initializer {dict(spec)!r} must have exactly the fields 'kind', 'file' and 'otherwise'")
    if not isinstance(spec["file"], str) or not spec["file"]:
        raise ValueError(f"'file' of initializer {dict(spec)!r} must be the path of a safetensors file")
    otherwise = spec["otherwise"]
    if not isinstance(otherwise, Mapping) or otherwise.get("kind") == "pretrained":
        raise ValueError(f"'otherwise' of initializer {dict(spec)!r}, for ids not in the file, must be {usage}")
    check_initializer(otherwise)


@functools.cache
def quantile_table(kind: str) -> Tensor:
    """Return the quantiles float32 [65536] at (i + 1/2) / 65536 of the standard "normal" or "truncated_normal" law."""
    law = NormalDist()
    low, high = (law.cdf(-TRUNCATION), law.cdf(TRUNCATION)) if kind == "truncated_normal" else (0.0, 1.0)
    points = (low + (high - low) * (i + 0.5) / _QUANTILES for i in range(_QUANTILES))
    # Through numpy: torch factory functions obey ambient devices and dtypes (meta, zero.Init), this table must not.
    return torch.from_numpy(np.array([law.inv_cdf(p) for p in points], dtype=np.float32))


def row_init(spec: Mapping[str, Any], seed: int, init_key: str) -> RowInit:
    """Return what a kernel needs of an initializer (see TableConfig) for one table; "pretrained": its "otherwise"."""
    check_initializer(spec)
    if spec["kind"] == "pretrained":
        return row_init(spec["otherwise"], seed, init_key)
    kind, scale = spec["kind"], float(spec[INITIALIZERS[spec["kind"]]])
    key = keyed(seed, string_key(init_key))
    assert isinstance(key, int)
    if kind in ("normal", "truncated_normal"):
        return RowInit("quantile", key, scale, quantile_table(kind))
    return RowInit(kind, key, scale)


def initial_rows(init: RowInit, ids: Tensor, dim: int) -> Tensor:
    """Return the initial rows float32 [n, dim] of ids int64 [n] (on the CPU); see RowInit for the formulas."""
    assert ids.ndim == 1 and ids.device.type == "cpu"
    if init.kind == "constant":
        return torch.full((len(ids), dim), init.scale, dtype=torch.float32, device="cpu")
    columns = torch.arange(dim, dtype=torch.int64, device="cpu")
    bits = fold(fold(init.key, ids)[:, None], columns)  # type: ignore[index]
    assert isinstance(bits, Tensor)
    if init.kind == "quantile":
        assert init.quantiles is not None
        return init.quantiles[(bits >> 48) & 0xFFFF] * np.float32(init.scale).item()
    signed = ((bits >> 40) & 0xFFFFFF) - (1 << 23)
    return signed.to(torch.float32) * np.float32(init.scale * 2.0**-23).item()
