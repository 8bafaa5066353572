"""What a table and a feature are: JSON-only, strictly checked descriptions."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from .kernels.base import ROUNDINGS
from .policies import check_initializer

UNKNOWN_POLICIES = ("zeros", "initial", "shared")
POOLINGS = ("none", "sum", "mean")
ROW_DTYPES = ("float32", "bfloat16")

_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def _default_initializer() -> dict[str, Any]:
    return {"kind": "truncated_normal", "std": 0.02}


def _check_name(what: str, name: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{what} {name!r} must be a non-empty string of letters, digits, '_', '.' and '-'")


class _JsonConfig:
    """to_dict / from_dict of a dataclass whose fields are JSON values."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from `to_dict()`. Raises ValueError for an unknown or a missing field."""
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{cls.__name__} has no field {unknown}: the fields are {sorted(known)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"{cls.__name__} from {dict(values)!r}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class TableConfig(_JsonConfig):
    """A logical table: 64-bit ids -> rows of numbers.

    Args:
        name: names the table in checkpoints, learning rates and statistics.
        embedding_dim: width of a row.
        initializer: value of a row before its first update, a function of (seed, init_key, id, column) alone:
            {"kind": "uniform", "scale": s} in [-s, s), {"kind": "normal", "std": s}, {"kind": "constant", "value": v},
            {"kind": "truncated_normal", "std": s} (cut at two std), or {"kind": "pretrained", "file": path,
            "otherwise": one of those}: vectors {"ids": int64 [n], "rows": float32 [n, dim]} of a safetensors file,
            which is read when a row is first inserted, and the other law for ids that it lacks.
        unknown: what a lookup returns for an id that gets no row: "zeros", the "initial" value, or a "shared" row,
            which is trained by the gradients of all such ids.
        init_key: names the stream of initial values (default: the table's name, so that renaming needs it).
        row_dtype: how rows are stored: "float32" or "bfloat16". Lookups give float32; optimizer state is float32.
        row_rounding: how updates are rounded to bfloat16 rows: "stochastic" (the default: small updates are not lost,
            the same bits on every rank and backend) or "nearest".

    Raises ValueError for values out of range.
    """

    name: str
    embedding_dim: int
    initializer: dict[str, Any] = field(default_factory=_default_initializer)
    unknown: str = "zeros"
    init_key: str | None = None
    row_dtype: str = "float32"
    row_rounding: str | None = None

    def __post_init__(self) -> None:
        _check_name("table name", self.name)
        dim = self.embedding_dim
        if not isinstance(dim, int) or isinstance(dim, bool) or dim <= 0:
            raise ValueError(f"embedding_dim of table {self.name!r} must be a positive integer, got {dim!r}")
        check_initializer(self.initializer)
        if self.unknown not in UNKNOWN_POLICIES:
            raise ValueError(f"unknown of table {self.name!r} must be one of {UNKNOWN_POLICIES}, got {self.unknown!r}")
        if self.init_key is None:
            object.__setattr__(self, "init_key", self.name)
        elif not isinstance(self.init_key, str):
            raise ValueError(f"init_key of table {self.name!r} must be a string, got {self.init_key!r}")
        self._check_precision()

    def _check_precision(self) -> None:
        if self.row_dtype not in ROW_DTYPES:
            raise ValueError(f"row_dtype of table {self.name!r} must be one of {ROW_DTYPES}, got {self.row_dtype!r}")
        if self.row_rounding is None:
            return
        if self.row_rounding not in ROUNDINGS:
            raise ValueError(
                f"row_rounding of table {self.name!r} must be one of {ROUNDINGS}, got {self.row_rounding!r}"
            )
        if self.row_dtype == "float32":
            warnings.warn(f"row_rounding of table {self.name!r} has no effect: its rows are float32", stacklevel=4)

    @property
    def rounding(self) -> str | None:
        """How updates are rounded to the rows: "stochastic" or "nearest", None for float32 rows."""
        return None if self.row_dtype == "float32" else self.row_rounding or "stochastic"


@dataclass(frozen=True, kw_only=True)
class FeatureConfig(_JsonConfig):
    """A feature (named ids in a batch) and the table it looks its ids up in. Features may share a table.

    Args:
        name: its key in batches.
        table: the table.
        pooling: "none": a row per id. "sum" or "mean": a row per bag of ids; a bag is the last dimension of dense ids,
            or a bag of a `Jagged`. An empty bag gives zeros; the mean is over all ids of a bag, known or not.

    Raises ValueError for values out of range.
    """

    name: str
    table: str
    pooling: str = "none"

    def __post_init__(self) -> None:
        _check_name("feature name", self.name)
        _check_name(f"table of feature {self.name!r}", self.table)
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling of feature {self.name!r} must be one of {POOLINGS}, got {self.pooling!r}")
