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
from torch.utils._pytree import tree_leaves, tree_map


def train(rank: int, world_size: int, backends: str, on_device: list[str]) -> Any:
    """The steps of placement_cases.train, one micro-batch of two on each rank; returns this rank's rows.

    backends: of the group, "gloo", "nccl", or "both": one for tensors in host memory and one for those on a GPU.
    """
    assert world_size == 2
    with pytest.MonkeyPatch.context() as patch, simulated_device(patch):
        if backends != "gloo":
            _move_collectives(patch, takes_host=backends == "both")
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


def _move_collectives(patch: pytest.MonkeyPatch, *, takes_host: bool) -> None:
    """As with NCCL: tensors in host memory are refused, unless the group has gloo for them."""
    patch.setattr(Exchange, "device", DEVICE)
    patch.setattr(Exchange, "numbers_device", cases.HOST if takes_host else DEVICE)
    for name in ("all_to_all_single", "all_gather", "all_reduce"):
        patch.setattr(dist, name, _on_device(getattr(dist, name), takes_host))


def _on_device(collective: Any, takes_host: bool) -> Any:
    def run(*args: Any, **kwargs: Any) -> None:
        tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        here = [isinstance(t, OnDevice) for t in tensors]
        assert all(here) or (takes_host and not any(here)), "a collective of the device got a tensor in host memory"
        is_exchange = collective.__name__ == "all_to_all_single"
        assert all(here) or not (is_exchange and tensors[0].is_floating_point()), "rows went by way of host memory"
        with torch._C._DisableTorchDispatch():
            collective(*map(_inner, args), **kwargs)

    return run


def _inner(value: Any) -> Any:
    return tree_map(lambda t: t.inner if isinstance(t, OnDevice) else t, value)
