"""Initial values from a file: {"ids": int64 [n], "rows": float32 [n, dim]} in safetensors."""

import os
import weakref
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# By (path, time, size): tables that start from one file share its vectors for as long as one of them holds them.
_loaded: "weakref.WeakValueDictionary[tuple[str, int, int], PretrainedRows]" = weakref.WeakValueDictionary()


class PretrainedRows:
    """Vectors by id: `find` says where, `rows` float32 [n, dim] holds them."""

    def __init__(self, ids: Tensor, rows: Tensor) -> None:
        self._sorted, self._order = torch.sort(ids)
        self.rows = rows

    def find(self, ids: Tensor) -> Tensor:
        """Return the position int64 [n] of each id int64 [n] in `rows`; -1 where the file does not have it."""
        if len(self._sorted) == 0:
            return torch.full_like(ids, -1)
        place = torch.searchsorted(self._sorted, ids).clamp_(max=len(self._sorted) - 1)
        return torch.where(self._sorted[place] == ids, self._order[place], -1)


def load_pretrained(file: str, dim: int, table: str) -> PretrainedRows:
    """Return the vectors of a file for a table of width `dim`; those that another table holds, if the file is the same.

    Raises ValueError when it is missing, no safetensors file, lacks "ids" or "rows" of their dtypes and shapes, has
    rows of another width or values that are not finite, or repeats an id.
    """
    where = f"pretrained rows of table {table!r} in {file}"
    try:
        status = os.stat(file)
        key = str(Path(file).resolve()), status.st_mtime_ns, status.st_size
        pretrained = _loaded.get(key) or _load(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    if pretrained.rows.shape[1] != dim:
        raise ValueError(f"{where} have width {pretrained.rows.shape[1]}, embedding_dim is {dim}")
    _loaded[key] = pretrained
    return pretrained


def _load(file: str) -> PretrainedRows:
    tensors = load_file(file)
    if missing := {"ids", "rows"} - set(tensors):
        raise ValueError(f"the file lacks {sorted(missing)}: it holds {sorted(tensors)}")
    ids, rows = tensors["ids"], tensors["rows"]
    if ids.dtype != torch.int64 or ids.ndim != 1:
        raise ValueError(f"ids must be int64 [n], got {ids.dtype} {list(ids.shape)}")
    if rows.dtype != torch.float32 or rows.ndim != 2 or len(rows) != len(ids):
        raise ValueError(f"rows must be float32 [{len(ids)}, dim], got {rows.dtype} {list(rows.shape)}")
    if not rows.isfinite().all():
        raise ValueError("rows hold values that are not finite")
    found = PretrainedRows(ids, rows)
    if (again := found._sorted[1:][found._sorted.diff() == 0]).numel():
        raise ValueError(f"ids are not distinct: {int(again[0])} is there more than once")
    return found
