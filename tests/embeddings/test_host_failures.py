"""Host kernels without memory or threads, and while another thread closes the table: nothing by halves, no crash."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from grzoo.embeddings.kernels import BackendUnavailable, RowInit, Slot, get_backend
from grzoo.embeddings.kernels.base import MAX_STEP
from grzoo.embeddings.kernels.host.library import library

try:
    get_backend("host")
except BackendUnavailable as reason:
    pytest.skip(f"no host kernels: {reason}", allow_module_level=True)

_BEGIN = """
import os, resource, torch
from grzoo.embeddings.kernels import RowInit, Slot, get_backend

def allow(mib):
    mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    soft = mapped + mib * 2**20 if mib else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))

def zeros(n):
    return torch.zeros(n, dtype=torch.int32)

backend = get_backend("host")
"""


def run(code: str, threads: int, *arguments: str) -> str:
    """Run a program that limits its own memory; a crash or a wrong result fails the test with what it printed."""
    environment = os.environ | {"GRZOO_NUM_THREADS": str(threads), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _BEGIN + code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_without_threads_the_caller_does_the_work_and_rows_are_born_whole() -> None:
    out = run(
        """
table = backend.create(4, [RowInit("constant", 1, 0.5)])
table.set_slots([Slot("sum", 4, 7.0)])
table.reserve(2000)
ids = torch.arange(1600)
allow(2)
handles, inserted = table.find_or_insert(zeros(1600), ids)
allow(0)
assert inserted == 1600 and bool((table.gather(handles) == 0.5).all())
assert bool((table.gather_slot("sum", handles) == 7.0).all())
print("whole")
""",
        threads=2,
    )
    assert out == "whole\n"


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@pytest.mark.parametrize("mib", ["150", "170", "190"])
def test_distinct_ids_without_memory_raise_and_the_next_call_works(mib: str) -> None:
    out = run(
        """
import sys
ids = torch.arange(3_000_000)
backend.unique(ids[:200_000])  # the threads start
allow(int(sys.argv[1]))
try:
    found = backend.unique(ids)
    print("fitted")
except (MemoryError, RuntimeError) as error:
    print(type(error).__name__)
allow(0)
assert torch.equal(backend.unique(ids % 1000).ids.sort().values, torch.arange(1000))
""",
        4,
        mib,
    )
    assert out in ("MemoryError\n", "RuntimeError\n", "fitted\n")


def test_room_for_more_rows_than_the_machine_holds_is_refused_at_once() -> None:
    table = get_backend("host").create(1 << 16, [RowInit("constant", 1, 0.5)])
    before = library().grzoo_mapped_bytes()
    with pytest.raises(MemoryError, match="evict rows, use more ranks"):
        table.reserve(1 << 28)  # 64 TiB, in chunks that would each fit
    assert library().grzoo_mapped_bytes() == before
    assert table.find_or_insert(torch.zeros(2, dtype=torch.int32), torch.arange(2))[1] == 2
    table.close()


def test_close_waits_for_calls_of_other_threads() -> None:
    tables, ids = torch.zeros(200_000, dtype=torch.int32), torch.arange(200_000)
    for _ in range(5):
        table = get_backend("host").create(4, [RowInit("constant", 1, 0.5)])
        table.find_or_insert(tables, ids)
        begun, ended = threading.Event(), []

        def look(table=table, begun=begun, ended=ended) -> None:  # type: ignore[no-untyped-def]
            try:
                while True:
                    handles = table.find(tables, ids)
                    assert int(handles.min()) >= 0
                    begun.set()
            except RuntimeError as error:
                ended.append(str(error))

        thread = threading.Thread(target=look)
        thread.start()
        assert begun.wait(30)
        table.close()
        thread.join(30)
        assert ended == ["this embedding table was closed"]


@pytest.mark.parametrize("backend", ["naive", "host"])
@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_the_count_of_updates_stays_at_its_largest(backend: str, rule: str) -> None:
    table = get_backend(backend).create(4, [RowInit("constant", 1, 0.5)])
    table.set_slots([Slot("exp_avg", 4), Slot("exp_avg_sq", 4), Slot("momentum_buffer", 4)])
    handles, _ = table.find_or_insert(torch.zeros(1, dtype=torch.int32), torch.arange(1))
    table.scatter(handles, None, {"step": torch.tensor([[MAX_STEP - 1]], dtype=torch.int32)})
    adam = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "step": 0.0}
    hyper = adam if rule == "adam" else {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}
    for _ in range(3):
        table.update(rule, handles, torch.ones(1, 4), **hyper)
    assert table.gather_slot("step", handles).item() == MAX_STEP
    assert bool(table.gather(handles).isfinite().all())


def test_a_number_of_threads_that_is_none_is_named() -> None:
    code = "from grzoo.embeddings.kernels.host.library import num_threads; num_threads()"
    environment = os.environ | {"GRZOO_NUM_THREADS": "two"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "GRZOO_NUM_THREADS='two' must be a number of threads" in done.stderr
