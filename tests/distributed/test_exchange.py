"""S26: collectives of the sparse side are right on any number of ranks, the identity on one, and tell errors to all."""

import embedding_jobs as jobs
import pytest
import torch
import torch.distributed as dist
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


GPU, CPU = torch.device("cuda", 1), torch.device("cpu")


@pytest.mark.parametrize(
    ("backends", "rows", "numbers"),
    [
        ("cpu:gloo,cuda:gloo", CPU, CPU),  # of init_process_group("gloo")
        ("cuda:nccl", GPU, GPU),  # of init_process_group("nccl")
        ("cpu:gloo,cuda:nccl", GPU, CPU),  # of both, as the recipes open on GPUs
        ("cpu:gloo", CPU, CPU),
    ],
)
def test_rows_take_nccl_and_numbers_gloo_where_the_group_has_them(
    monkeypatch: pytest.MonkeyPatch, backends: str, rows: torch.device, numbers: torch.device
) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "get_rank", lambda group: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    exchange = Exchange(object())  # type: ignore[arg-type]
    assert (exchange.device, exchange.numbers_device) == (rows, numbers)


def test_torch_tells_the_backends_of_a_group_as_expected() -> None:
    """Of a group with two, `get_backend` names both: neither "gloo" nor "nccl" tells where tensors go."""
    spawn(1, jobs.backends_of_groups)
