"""Files past the page cache hold the bytes that were given, or do not exist; where that way is closed, all the same."""

import ctypes
import errno
import fcntl
import mmap
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from grzoo.embeddings import direct_io, files
from grzoo.embeddings.direct_io import ALIGNMENT, aligned_buffer, read_pieces
from grzoo.embeddings.files import DamagedFile, FileWriter, check_pieces, fingerprint

KILOBYTE = 1 << 10


@pytest.fixture(params=["direct", "refused when asked for", "refused by the first call"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the file system says to O_DIRECT. Blocks are small, so that a file has many."""
    monkeypatch.setattr(files, "BLOCK", 2 * ALIGNMENT)
    if request.param == "refused when asked for":
        monkeypatch.setattr(files, "bypass_cache", lambda descriptor, on: False)
        monkeypatch.setattr(direct_io, "bypass_cache", lambda descriptor, on: False)
    if request.param == "refused by the first call":
        for name in ("pwrite", "preadv"):
            monkeypatch.setattr(os, name, refusing_direct(getattr(os, name)))
    return str(request.param)


def refusing_direct(call: Any) -> Any:
    def refuse(descriptor: int, *arguments: Any) -> Any:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            time.sleep(0.002)  # so that several threads are refused at once
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return call(descriptor, *arguments)

    return refuse


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 8192, 8193, 12288, 300 * KILOBYTE + 7])
def test_the_file_has_the_bytes_in_their_order(tmp_path: Path, way: str, size: int) -> None:
    content, rng, path = random.Random(size).randbytes(size), random.Random(1), tmp_path / "file"
    with FileWriter(path) as writer:
        at = 0
        while at < size:
            count = min(rng.choice([1, 3, 4096, 5000, 8192]), size - at)
            if rng.random() < 0.5:
                writer.write(content[at : at + count])
            else:
                writer.reserve(count)[:] = content[at : at + count]
            at += count
        assert not path.exists()
    assert path.read_bytes() == content and writer.fingerprint == fingerprint(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    edges = sorted({0, size, *(rng.randrange(size + 1) for _ in range(40))})
    pieces = list(zip(edges, edges[1:], strict=False))
    assert b"".join(map(bytes, read_pieces(path, pieces))) == content
    pieces = [piece for piece in pieces if rng.random() < 0.5]
    assert list(map(bytes, read_pieces(path, pieces))) == [content[begin:end] for begin, end in pieces]


@pytest.mark.parametrize("huge", [True, False])
@pytest.mark.parametrize("size", [1, ALIGNMENT, 2 << 20, (4 << 20) + ALIGNMENT])
def test_a_buffer_begins_at_a_page_and_a_large_one_at_a_huge_page(
    size: int, huge: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not huge:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    has_huge = hasattr(mmap, "MADV_HUGEPAGE")
    buffer = aligned_buffer(size)
    assert len(buffer) == size and not any(buffer[:: ALIGNMENT // 2])
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    assert address % (2 << 20 if has_huge and size >= 2 << 20 else ALIGNMENT) == 0
    buffer[-1:] = b"x"
    assert bytes(buffer[-2:]).endswith(b"x")


@pytest.mark.parametrize("good_writes", [0, 1, 5])
def test_a_full_disk_is_an_error_and_leaves_nothing(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch, good_writes: int
) -> None:
    original, calls = os.pwrite, 0

    def full(*arguments: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > good_writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"), FileWriter(tmp_path / "file") as writer:
        for _ in range(40):
            writer.write(bytes(8192))
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_the_older_file(tmp_path: Path, way: str) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(KeyError), FileWriter(tmp_path / "file") as writer:
        writer.write(bytes(100_000))
        raise KeyError
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


def test_a_file_that_ends_early_is_an_error(tmp_path: Path, way: str) -> None:
    (tmp_path / "file").write_bytes(bytes(10_000))
    with pytest.raises(ValueError, match="cut short"):
        list(read_pieces(tmp_path / "file", [(0, 5000), (5000, 10_001)]))


def test_reading_can_be_left_early(tmp_path: Path, way: str) -> None:
    (tmp_path / "file").write_bytes(bytes(100_000))
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    pieces = read_pieces(tmp_path / "file", [(at, at + 1000) for at in range(0, 100_000, 1000)])
    assert len(next(pieces)) == 1000
    pieces.close()
    assert threading.active_count() == threads and len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("damage", ["none", "a bit", "size"])
def test_a_checksum_is_compared_while_pieces_pass(tmp_path: Path, way: str, damage: str) -> None:
    path, content = tmp_path / "file", bytearray(random.Random(0).randbytes(50_000))
    path.write_bytes(content)
    expected = fingerprint(path)
    if damage == "a bit":
        content[31_000] ^= 4
        path.write_bytes(content)
    if damage == "size":
        expected = expected | {"size": 50_001}
    pieces = check_pieces(path, read_pieces(path, [(0, 20_000), (20_000, 50_000)]), expected)
    if damage == "none":
        assert b"".join(map(bytes, pieces)) == content
    else:
        with pytest.raises(DamagedFile, match="checksum of file is wrong"):
            list(pieces)
