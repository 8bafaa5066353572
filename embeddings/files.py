"""Files that appear complete under their name: streamed, checksummed on the way, pushed to the disk, then renamed."""

import contextlib
import os
import queue
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import xxhash

_CHUNK = 1 << 22  # bytes read at a time
_WRITEBACK = 1 << 26  # bytes after which the system is told to begin writing to the disk
_PENDING = 3  # buffers that wait for the disk

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
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return {"size": file.stat().st_size, "xxh3_128": digest.hexdigest()}


def write_text(file: Path, text: str) -> Fingerprint:
    """Write a text file, as `FileWriter` does."""
    with FileWriter(file) as writer:
        writer.write((text + "\n").encode())
    return writer.fingerprint


class FileWriter:
    """Writes a file from its first byte to its last, under a temporary name until it is complete and on the disk.

    A thread computes the checksum and writes, while the caller makes the next buffer. Leaving the `with` block waits
    for the disk and gives the file its name; after an exception nothing is left.

    Raises:
        OSError: from `write` or at the end, when the system refuses (a full disk, say).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._descriptor = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._digest = xxhash.xxh3_128()
        self._size = 0
        self._problem: BaseException | None = None
        self._queue: queue.Queue[Any] = queue.Queue(_PENDING)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def write(self, buffer: Any) -> None:
        """Append a contiguous buffer of bytes, which must not change any more."""
        self._queue.put(memoryview(buffer))
        self._raise_problem()

    @property
    def fingerprint(self) -> Fingerprint:
        """Size and checksum of what was written; after the `with` block those of the file."""
        return {"size": self._size, "xxh3_128": self._digest.hexdigest()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """Finish the file as the end of a `with` block does; with an error, drop it."""
        self._queue.put(None)
        self._thread.join()
        try:
            if error is None:
                self._raise_problem()
                os.fsync(self._descriptor)
        except BaseException:
            self._discard()
            raise
        if error is not None:
            self._discard()
            return
        os.close(self._descriptor)
        self._temporary.replace(self.path)

    def _discard(self) -> None:
        os.close(self._descriptor)
        with contextlib.suppress(OSError):
            self._temporary.unlink()

    def _raise_problem(self) -> None:
        if self._problem is not None:
            raise self._problem

    def _work(self) -> None:
        while (buffer := self._queue.get()) is not None:
            if self._problem is None:  # after a failure the rest is only taken off the queue
                try:
                    self._append(buffer)
                except BaseException as problem:
                    self._problem = problem

    def _append(self, buffer: memoryview) -> None:
        self._digest.update(buffer)
        while len(buffer):
            written = os.write(self._descriptor, buffer[:_WRITEBACK])
            if (self._size + written) // _WRITEBACK > self._size // _WRITEBACK and hasattr(os, "posix_fadvise"):
                # Begins to write back, and keeps a large file from pushing everything else out of the cache.
                os.posix_fadvise(self._descriptor, 0, self._size + written, os.POSIX_FADV_DONTNEED)
            self._size += written
            buffer = buffer[written:]
