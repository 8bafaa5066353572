"""Files that appear complete under their name: streamed, checksummed on the way, pushed to the disk, then renamed."""

import contextlib
import errno
import os
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import xxhash

from .direct_io import ALIGNMENT, aligned_buffer, bypass_cache

BLOCK = 4 << 20  # bytes that are read or written at a time
_BLOCKS = 8  # one that is filled, the others on their way to the disk
_WRITERS = 2

Fingerprint = dict[str, Any]  # {"size": bytes, "xxh3_128": hexadecimal}


def obey_umask(file: Path) -> None:
    """Give a file the permissions that the process's umask asks for; safetensors makes files for their owner only."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_link(file: Path) -> None:
    """Raise ValueError when a file is a link out of its folder; the snapshots of a hub cache link to its blobs."""
    if not file.is_symlink():
        return
    folder = file.parent.resolve()
    root = folder.parents[1] if folder.parent.name == "snapshots" else folder
    if not file.resolve().is_relative_to(root):
        raise ValueError(f"{file} is a link to {file.resolve()}, outside of {root}: put the file itself there")


def fingerprint(file: Path) -> Fingerprint:
    """Return size in bytes and checksum (xxHash3, 128 bits, hexadecimal) of a file."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while chunk := stream.read(BLOCK):
            digest.update(chunk)
    return {"size": file.stat().st_size, "xxh3_128": digest.hexdigest()}


class DamagedFile(ValueError):
    """A file is not what was written."""


def check_pieces(file: Path, pieces: Generator[memoryview], expected: Fingerprint) -> Generator[memoryview]:
    """Pass all bytes of a file on, piece by piece, while a thread computes the checksum.

    Raises DamagedFile after the last piece when the checksum is another one.
    """
    digest, size = xxhash.xxh3_128(), 0
    with contextlib.closing(pieces), ThreadPoolExecutor(1) as thread:
        for piece in pieces:
            hashed = thread.submit(digest.update, piece)
            try:
                yield piece
            finally:
                hashed.result()
            size += len(piece)
    if {"size": size, "xxh3_128": digest.hexdigest()} != expected:
        raise DamagedFile(f"{file.parent} is damaged: the checksum of {file.name} is wrong")


def write_text(file: Path, text: str) -> Fingerprint:
    """Write a text file, as `FileWriter` does."""
    with FileWriter(file) as writer:
        writer.write((text + "\n").encode())
    return writer.fingerprint


class _Block:
    """A part of a file in memory that is page-aligned, as the file from `begin`; and the work that still reads it."""

    def __init__(self) -> None:
        self.bytes = aligned_buffer(BLOCK + ALIGNMENT)
        self.work: list[Future[None]] = []

    def wait(self) -> None:
        """Until it may be filled again. Raises what went wrong."""
        while self.work:
            self.work.pop().result()


class FileWriter:
    """Writes a file from its first byte to its last, under a temporary name until it is complete and on the disk.

    Threads compute the checksum and write, past the page cache where the file system allows it, while the caller fills
    the next of a few blocks. Leaving the `with` block waits for the disk and gives the file its name; after an
    exception nothing is left.

    Raises:
        OSError: from `write`, `reserve` or at the end, when the system refuses (a full disk, say).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._descriptor = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._digest = xxhash.xxh3_128()
        self._size = 0  # that was handed over
        self._block, self._filled = _Block(), 0
        self._busy: deque[_Block] = deque()
        self._threads: tuple[ThreadPoolExecutor, ThreadPoolExecutor] | None = None  # a small file needs none
        self._is_direct = False

    def write(self, buffer: Any) -> None:
        """Append a contiguous buffer of bytes."""
        view = memoryview(buffer).cast("B")
        while len(view):
            part = view[:BLOCK]
            self.reserve(len(part))[:] = part
            view = view[len(part) :]

    def reserve(self, size: int) -> memoryview:
        """Append `size` bytes, BLOCK at most, that the caller puts there before the next call.

        They lie in memory as in the file: what is aligned there is aligned here.
        """
        assert size <= BLOCK
        if self._filled + size > len(self._block.bytes):
            self._next_block()
        begin, self._filled = self._filled, self._filled + size
        return self._block.bytes[begin : self._filled]

    @property
    def fingerprint(self) -> Fingerprint:
        """Size and checksum of the file, after the `with` block."""
        return {"size": self._size, "xxh3_128": self._digest.hexdigest()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """Finish the file as the end of a `with` block does; with an error, drop it."""
        try:
            try:
                if error is None:
                    self._finish()
            finally:
                for thread in self._threads or ():
                    thread.shutdown(cancel_futures=error is not None)
        except BaseException:
            self._discard()
            raise
        if error is not None:
            self._discard()
            return
        os.close(self._descriptor)
        self._temporary.replace(self.path)

    def _finish(self) -> None:
        while self._busy:
            self._busy.popleft().wait()
        if self._is_direct:
            bypass_cache(self._descriptor, False)  # what is left does not fill pages
        rest = self._block.bytes[: self._filled]
        self._digest.update(rest)
        self._write(rest, self._size)
        self._size += len(rest)
        os.fsync(self._descriptor)

    def _discard(self) -> None:
        os.close(self._descriptor)
        with contextlib.suppress(OSError):
            self._temporary.unlink()

    def _next_block(self) -> None:
        """Hand the whole pages of the block over, and go on in a free block with what is left of it."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1), ThreadPoolExecutor(_WRITERS)
            self._is_direct = bypass_cache(self._descriptor, True)
        full, whole = self._block, self._filled // ALIGNMENT * ALIGNMENT
        pages = full.bytes[:whole]
        hashing, writing = self._threads
        full.work = [hashing.submit(self._digest.update, pages), writing.submit(self._write, pages, self._size)]
        self._size += whole
        self._busy.append(full)
        if len(self._busy) < _BLOCKS:
            self._block = _Block()
        else:
            self._block = self._busy.popleft()
            self._block.wait()
        rest = self._filled - whole
        self._block.bytes[:rest] = full.bytes[whole : self._filled]
        self._filled = rest

    def _write(self, buffer: memoryview, at: int) -> None:
        end = at + len(buffer)
        while len(buffer):
            written = self._write_some(buffer, end - len(buffer))
            buffer = buffer[written:]
        if not self._is_direct and hasattr(os, "posix_fadvise") and end - at >= BLOCK // 2:
            # Begins to write back, and keeps a large file from pushing everything else out of the cache.
            os.posix_fadvise(self._descriptor, 0, end, os.POSIX_FADV_DONTNEED)

    def _write_some(self, buffer: memoryview, at: int) -> int:
        try:
            return os.pwrite(self._descriptor, buffer, at)
        except OSError as error:
            if self._threads is None or error.errno != errno.EINVAL:  # another thread may just have turned it off
                raise
        self._is_direct = bypass_cache(self._descriptor, False)  # a file system with other rules than ours
        return os.pwrite(self._descriptor, buffer, at)
