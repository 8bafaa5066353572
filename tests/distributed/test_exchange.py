"""S26: collectives of the sparse side are right on any number of ranks, the identity on one, and tell errors to all."""

import embedding_jobs as jobs
import pytest
import torch
from grzoo.embeddings.exchange import Exchange
from spawn import spawn


def test_every_collective_on_three_ranks() -> None:
    results = spawn(3, jobs.exchange_units)
    kinds = [told[0] for told, _ in results]
    assert kinds == ["ValueError", "ValueError", "RuntimeError"]  # own problem, that of rank 0, own problem
    assert results[1][0][1].startswith("rank 0 failed: zu lang: üü")
    assert all(calm == ["", ""] for _, calm in results)


def test_one_process_needs_no_torch_distributed() -> None:
    exchange = Exchange(None)
    assert (exchange.rank, exchange.world_size, exchange.device.type) == (0, 1, "cpu")
    assert exchange.gather_ints([1, 2]) == [[1, 2]] and exchange.sum_float(0.25) == 0.25
    parts = [torch.ones(2, 3), torch.ones(0)]
    assert exchange.swap(parts, torch.tensor([[2, 0]]), torch.tensor([[2, 0]])) == parts
    assert exchange.bytes_sent == 0
    exchange.agree(None)
    with pytest.raises(KeyError):
        exchange.agree(KeyError("mine"))
