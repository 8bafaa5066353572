"""Admission, eviction and max_rows of a table as JSON values: what is allowed, the defaults, what has no effect."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

EVERY = 100  # optimizer steps from one eviction to the next
FORGET_AFTER = 10_000  # steps after which the counter of an id that waits for admission is dropped
HALF_LIFE = 10_000  # steps after which a frequency counts half

_ADMISSION: dict[str, Any] = {"forget_after": FORGET_AFTER}
_EVICTION: dict[str, dict[str, Any]] = {  # kind -> optional fields with their defaults
    "lru": {"every": EVERY, "max_evictions": None},
    "lfu": {"every": EVERY, "max_evictions": None, "half_life": HALF_LIFE},
    "ttl": {"every": EVERY, "max_evictions": None, "min_rows": 0},
}
_REQUIRED = {"lru": (), "lfu": (), "ttl": ("steps",)}


FIELDS = ("admission", "eviction", "max_rows", "track_use", "placement")  # of a TableConfig


def policies_by_table(policies: object, tables: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return for each table the policy fields and placement of its TableConfig, from {table: {field: value}} or None.

    Raises ValueError for a table that is not one of `tables`, and for a field that is no policy.
    """
    given = {} if policies is None else policies
    if not isinstance(given, Mapping) or not all(isinstance(fields, Mapping) for fields in given.values()):
        raise ValueError(f"table policies must be {{table: {{field: value}}}}, got {policies!r}")
    if unknown := sorted(set(given) - set(tables)):
        raise ValueError(f"table policies name {unknown}: the tables are {sorted(tables)}")
    for table, fields in given.items():
        if unknown := sorted(set(fields) - set(FIELDS)):
            raise ValueError(f"policies of table {table!r} have no field {unknown}: the fields are {FIELDS}")
    return {table: dict(given.get(table, {})) for table in tables}


def check_positive(what: str, value: object) -> None:
    """Raise ValueError unless value is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} must be a positive integer, got {value!r}")


def check_admission(table: str, spec: object) -> dict[str, Any]:
    """Return {"min_count", "forget_after"} with defaults filled in. Raises ValueError for anything else."""
    where = f"admission of table {table!r}"
    values = _fill(where, spec, ("min_count",), _ADMISSION)
    for name, value in values.items():
        check_positive(f"{name!r} of {where}", value)
    if values["min_count"] == 1:
        warnings.warn(f"{where} has min_count 1 and no effect: every id is admitted at first sight", stacklevel=5)
    return values


def check_eviction(table: str, spec: object, max_rows: int | None) -> dict[str, Any]:
    """Return an eviction policy with defaults filled in. Raises ValueError for an unknown kind, field or value."""
    where = f"eviction of table {table!r}"
    if not isinstance(spec, Mapping) or spec.get("kind") not in _EVICTION:
        raise ValueError(f'{where} must be {{"kind": one of {sorted(_EVICTION)}, ...}} or None, got {spec!r}')
    kind = spec["kind"]
    values = _fill(where, spec, ("kind", *_REQUIRED[kind]), _EVICTION[kind])
    for name, value in values.items():
        if name == "kind" or (name == "max_evictions" and value is None) or (name == "min_rows" and value == 0):
            continue
        check_positive(f"{name!r} of {where}", value)
    if max_rows is not None and values.get("min_rows", 0) > max_rows:
        raise ValueError(f"{where}: min_rows {values['min_rows']} is more than max_rows {max_rows}")
    if kind != "ttl" and max_rows is None:
        warnings.warn(f"{where} has no effect without max_rows: {kind} evicts what is above max_rows", stacklevel=5)
    return values


def _fill(where: str, spec: object, required: tuple[str, ...], optional: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(spec, Mapping):
        raise ValueError(f"{where} must be a mapping or None, got {spec!r}")
    if missing := [name for name in required if name not in spec]:
        raise ValueError(f"{where} needs {missing}, got {dict(spec)!r}")
    if unknown := sorted(set(spec) - {*required, *optional}):
        raise ValueError(f"{where} has no field {unknown}: the fields are {sorted({*required, *optional})}")
    return {name: spec[name] for name in required} | {n: spec.get(n, default) for n, default in optional.items()}
