"""What a table and a feature are: JSON-only, strictly checked descriptions."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from .kernels import PLACEMENTS
from .kernels.base import ROUNDINGS
from .policies import check_initializer
from .policy_config import check_admission, check_eviction, check_positive

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
            which is trained by the gradients of all such ids (those that `admission` makes wait).
        init_key: names the stream of initial values (default: the table's name, so that renaming needs it).
        row_dtype: how rows are stored: "float32" or "bfloat16". Lookups give float32; optimizer state is float32.
        row_rounding: how updates are rounded to bfloat16 rows: "stochastic" (the default: small updates are not lost,
            the same bits on every rank and backend) or "nearest".
        admission: {"min_count": k, "forget_after": steps}: an id gets a row when training has met it k times; until
            then it is unknown. A counter is dropped when its id was not met for forget_after (default 10,000) steps.
        eviction: which rows go at each optimizer step that is a multiple of "every" (default 100), at most
            "max_evictions" of them: {"kind": "lru"} and {"kind": "lfu", "half_life": steps} bring the table back to
            max_rows, {"kind": "ttl", "steps": s, "min_rows": m} also drops rows that were not used for s steps.
        max_rows: the most rows on all ranks. With eviction it holds after each eviction; without, training that would
            exceed it raises.
        track_use: keep the last use and the count of each row although no policy needs them.
        placement: where index, rows and state are: "host" memory, or "device", the memory of the current CUDA or HIP
            device; whatever the model runs on. Files do not depend on it.

    Policies are described in README.md. Raises ValueError for values out of range; warns of what has no effect.
    """

    name: str
    embedding_dim: int
    initializer: dict[str, Any] = field(default_factory=_default_initializer)
    unknown: str = "zeros"
    init_key: str | None = None
    row_dtype: str = "float32"
    row_rounding: str | None = None
    admission: dict[str, Any] | None = None
    eviction: dict[str, Any] | None = None
    max_rows: int | None = None
    track_use: bool = False
    placement: str = "host"

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
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement of table {self.name!r} must be one of {PLACEMENTS}, got {self.placement!r}")
        self._check_precision()
        self._check_policies()

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

    def _check_policies(self) -> None:
        if self.max_rows is not None:
            check_positive(f"max_rows of table {self.name!r}", self.max_rows)
        if not isinstance(self.track_use, bool):
            raise ValueError(f"track_use of table {self.name!r} must be true or false, got {self.track_use!r}")
        if self.admission is not None:
            object.__setattr__(self, "admission", check_admission(self.name, self.admission))
        if self.eviction is not None:
            object.__setattr__(self, "eviction", check_eviction(self.name, self.eviction, self.max_rows))
        if self.unknown == "shared" and self.min_count == 1:
            warnings.warn(
                f"the shared row of table {self.name!r} stays as it is: without admission every id that training"
                ' inserts has a row of its own; give it admission={"min_count": ...}',
                stacklevel=4,
            )

    @property
    def tracks_use(self) -> bool:
        """Whether rows of this table carry their last use and count."""
        return self.track_use or self.eviction is not None

    @property
    def has_hard_ceiling(self) -> bool:
        """Whether an insertion beyond max_rows raises, because nothing is ever evicted."""
        return self.max_rows is not None and self.eviction is None

    @property
    def has_policy(self) -> bool:
        """Whether a lookup does more than find or insert."""
        return self.tracks_use or self.min_count > 1 or self.has_hard_ceiling

    @property
    def min_count(self) -> int:
        """Occurrences from which an id has a row."""
        return 1 if self.admission is None else int(self.admission["min_count"])


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
