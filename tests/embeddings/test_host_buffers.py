"""Memory of large tensors on the host: used again, and never while something still reads it."""

import gc
from collections.abc import Callable

import pytest
import torch
from grzoo.embeddings.kernels import BackendUnavailable, get_backend
from torch import Tensor

try:
    get_backend("host")
except BackendUnavailable as reason:
    pytest.skip(str(reason), allow_module_level=True)

from grzoo.embeddings.kernels.host import buffers  # noqa: E402

N, DIM = 20_000, 64  # 5 MB


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_waiting", {})


def waiting() -> int:
    gc.collect()
    return sum(len(blocks) for blocks in buffers._waiting.values())


def test_the_memory_of_a_dead_tensor_serves_the_next_of_about_its_size() -> None:
    rows = buffers.empty_rows(N, DIM)
    place = rows.data_ptr()
    assert rows.shape == (N, DIM) and rows.dtype == torch.float32 and place % 4096 == 0
    assert buffers.empty_rows(N, DIM).data_ptr() != place
    del rows
    assert waiting() == 2
    assert place in [buffers.empty_rows(N + k, DIM).data_ptr() for k in (0, 1)]


HOLDERS: dict[str, Callable[[Tensor], object]] = {
    "view": lambda rows: rows[5:7].t(),
    "numpy": lambda rows: rows.numpy(),
    "autograd": lambda rows: (rows * torch.ones(DIM, requires_grad=True)).grad_fn,
    "storage": lambda rows: rows.untyped_storage(),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_that_something_still_reads_is_not_given_away(holder: str) -> None:
    rows = buffers.empty_rows(N, DIM).fill_(3)
    held = HOLDERS[holder](rows)
    place = rows.data_ptr()
    del rows
    assert waiting() == 0 and buffers.empty_rows(N, DIM).data_ptr() != place
    del held
    assert waiting() == 2


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_MAX_WAITING", 20 << 20)
    tensors = [buffers.empty_rows(N, DIM) for _ in range(8)]
    del tensors
    assert 1 <= waiting() <= 2
    larger_than_the_bound = buffers.empty_rows(5 * N, DIM)
    del larger_than_the_bound
    assert waiting() <= 2 and all(length <= 20 << 20 for length in buffers._waiting)


def test_small_tensors_and_empty_ones_are_left_to_torch() -> None:
    del_me = [buffers.empty_rows(10, 4), buffers.empty_rows(0, 64)]
    assert [t.shape for t in del_me] == [(10, 4), (0, 64)]
    del del_me
    assert waiting() == 0
