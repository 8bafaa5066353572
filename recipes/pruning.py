"""Rows that an export leaves out: those that training met too seldom, or not for too long."""

from pathlib import Path
from typing import Any

import torch
from grzoo.embeddings.index import read_index
from grzoo.embeddings.tensor_file import TensorFile
from grzoo.embeddings.use import COUNT, LAST_USE
from torch import Tensor

from .runtime import UserError


def prune(model: Any, checkpoint: Path, *, min_count: int | None, used_since: int | None) -> dict[str, str]:
    """Delete rows of a model that was loaded from a checkpoint; return for each table how many are left, in words.

    Args:
        min_count: keep rows whose id occurred so often in training (as the table counts: an lfu policy halves).
        used_since: keep rows that this optimizer step or a later one used. With both, a row must satisfy both.

    Raises:
        UserError: a number is not positive, or the checkpoint does not say how its rows were used.
    """
    limits = {column: n for column, n in ((COUNT, min_count), (LAST_USE, used_since)) if n is not None}
    for option, value in (("--min_count", min_count), ("--used_since", used_since)):
        if value is not None and value < 1:
            raise UserError(f"{option} takes a number from 1, got {value}")
    metadata = read_index(checkpoint)["metadata"]
    found: dict[str, str] = {}
    for table in metadata["rows"]:
        stale, rows = _stale(checkpoint, metadata, table, limits)
        model.embeddings.erase(table, stale)
        found[table] = f"{rows - len(stale):,} of {rows:,} rows"
    return found


def _stale(checkpoint: Path, metadata: Any, table: str, limits: dict[str, int]) -> tuple[Tensor, int]:
    """Ids int64 [n] of the rows below a limit, and the number of all rows."""
    stale, rows = [torch.empty(0, dtype=torch.int64)], 0
    for shard in metadata["shards"]:
        with TensorFile(checkpoint / shard["file"]) as file:
            for column in limits:
                if f"{table}.{column}" not in file.tensors:
                    raise UserError(
                        f"table {table!r} of {checkpoint} does not keep the last use and the count of its rows: train "
                        f"with model.table_policies={{{table!r}: {{'track_use': True}}}}, or export all rows"
                    )
            ids = file.read(f"{table}.ids")
            keep = torch.ones(len(ids), dtype=torch.bool)
            for column, limit in limits.items():
                keep &= file.read(f"{table}.{column}") >= limit
            stale.append(ids[~keep])
            rows += len(ids)
    return torch.cat(stale), rows
