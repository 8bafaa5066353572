"""What ranks run whose tables are on a simulated device. Needs TRITON_INTERPRET=1 before triton is imported."""

from typing import Any

import placement_cases as cases
import pytest
import torch
import torch.distributed as dist
from grzoo.embeddings import DynamicEmbeddingCollection
from grzoo.embeddings.exchange import Exchange
from simulated_device import DEVICE, OnDevice, simulated_device
from torch import Tensor


def train(rank: int, world_size: int, group_is_on_device: bool, on_device: list[str]) -> Any:
    """The steps of placement_cases.train, one micro-batch of two on each rank; returns this rank's rows."""
    assert world_size == 2
    with pytest.MonkeyPatch.context() as patch, simulated_device(patch):
        if group_is_on_device:
            _move_collectives(patch)
        collection, optimizer = cases.build(*on_device, process_group=dist.group.WORLD)
        for k in range(cases.STEPS):
            step = collection.prepare([cases.batch(2 * k + rank, DEVICE if rank else cases.HOST)]).fetch()
            (world_size * sum(rows.square().sum() for rows in step[0].values())).backward()
            optimizer.step()
        statistics = collection.statistics()
        rows = {name: {column: v.tolist() for column, v in table.items()} for name, table in _rows(collection).items()}
    return rows, statistics


def _rows(collection: DynamicEmbeddingCollection) -> dict[str, dict[str, Tensor]]:
    return {name: collection.export_rows(name) for name in collection.table_names}


def _move_collectives(patch: pytest.MonkeyPatch) -> None:
    """As with NCCL: tensors in host memory are refused."""
    patch.setattr(Exchange, "device", DEVICE)
    for name in ("all_to_all_single", "all_gather", "all_reduce"):
        patch.setattr(dist, name, _on_device(getattr(dist, name)))


def _on_device(collective: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> None:
        with torch._C._DisableTorchDispatch():
            collective(*map(_inner, args), **kwargs)

    return run


def _inner(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return [_inner(v) for v in value]
    if not isinstance(value, Tensor):
        return value
    assert isinstance(value, OnDevice), "a collective of the device got a tensor in host memory"
    return value.inner
