"""Reading and writing large files past the page cache, where the file system can: the processor copies nothing."""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

ALIGNMENT = 4096  # of addresses, offsets and lengths
_AHEAD = 6  # pieces in memory: the one that is used and those that are read
_READERS = 2
_HUGE_PAGE = 2 << 20


def aligned_buffer(size: int) -> memoryview:
    """Return bytes that begin at a page, a huge one where the system has them; they take memory when written to.

    What a device copies to or from huge pages in one request takes many where pages are scattered.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE") or size < _HUGE_PAGE:
        return memoryview(mmap.mmap(-1, size))
    pages = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    begin = -ctypes.addressof(ctypes.c_char.from_buffer(pages)) % _HUGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE, begin, size // _HUGE_PAGE * _HUGE_PAGE)
    return memoryview(pages)[begin : begin + size]


def bypass_cache(descriptor: int, on: bool) -> bool:
    """Let an open file go past the page cache, or no longer; return whether it does."""
    flag = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | flag if on else flags & ~flag)
    except OSError:
        return False
    return on and flag != 0


def read_pieces(path: Path, pieces: Sequence[tuple[int, int]]) -> Generator[memoryview]:
    """Yield the bytes [begin, end) of a file, piece by piece, reading a few pieces ahead.

    What is yielded lasts until the next piece is asked for, and lies in memory as in the file: what is aligned there is
    aligned here. Raises OSError, or ValueError where the file ends before a piece does.
    """
    if not pieces:
        return
    room = max(end - begin for begin, end in pieces) + 2 * ALIGNMENT
    buffers = [aligned_buffer(room) for _ in range(min(_AHEAD, len(pieces)))]
    descriptor = os.open(path, os.O_RDONLY)
    try:
        bypass_cache(descriptor, True)
        with ThreadPoolExecutor(_READERS) as threads:

            def submit(number: int) -> Future[memoryview]:
                return threads.submit(_read, descriptor, path, *pieces[number], buffers[number % len(buffers)])

            pending = deque(submit(number) for number in range(len(buffers)))
            try:
                for number in range(len(pieces)):
                    yield pending.popleft().result()
                    if number + len(buffers) < len(pieces):
                        pending.append(submit(number + len(buffers)))
            finally:
                threads.shutdown(cancel_futures=True)
    finally:
        os.close(descriptor)


def _read(descriptor: int, path: Path, begin: int, end: int, buffer: memoryview) -> memoryview:
    first = begin // ALIGNMENT * ALIGNMENT
    wanted, done = -(-end // ALIGNMENT) * ALIGNMENT - first, 0
    while done < end - first:
        count = _pread(descriptor, buffer[done:wanted], first + done)
        if count == 0:
            raise ValueError(f"{path} is cut short")
        done += count
    return buffer[begin - first : end - first]


def _pread(descriptor: int, buffer: memoryview, at: int) -> int:
    try:
        return os.preadv(descriptor, [buffer], at)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    bypass_cache(descriptor, False)  # a file system with other rules than ours
    return os.preadv(descriptor, [buffer], at)
