"""safetensors files in pieces: written tensor by tensor as a stream, read by ranges of rows, mapped into memory."""

import contextlib
import json
import math
import mmap
import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from .direct_io import read_pieces
from .files import BLOCK, FileWriter, Fingerprint, check_pieces

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> dtype and shape

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()} | {
    "F64": torch.float64, "F16": torch.float16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library


def file_order(layout: Layout) -> list[str]:
    """Return the names in the order of the safetensors library: wide items first, so that all are aligned."""
    return sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))


def as_bytes(values: Tensor) -> Tensor:
    """Return the bytes of a contiguous tensor, uint8 [n], without a copy."""
    return values.reshape(-1).view(torch.uint8)


def bytes_of(buffer: memoryview) -> Tensor:
    """Return a buffer as a tensor, uint8 [n], without a copy."""
    return torch.frombuffer(buffer, dtype=torch.uint8) if len(buffer) else torch.empty(0, dtype=torch.uint8)


def _cut(begin: int, end: int, size: int) -> list[tuple[int, int]]:
    """[begin, end) in pieces of `size`."""
    return [(at, min(at + size, end)) for at in range(begin, end, size)]


class TensorFileWriter:
    """Writes a safetensors file of a known layout; the bytes of its tensors come in `file_order`, in any pieces.

    Example:
        with TensorFileWriter(path, {"ids": (torch.int64, (n,))}) as writer:
            writer.write(as_bytes(ids))
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in file_order(layout):
            dtype, shape = layout[name]
            begin, end = end, end + dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = FileWriter(path)
        self._missing = end
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, values: Tensor) -> None:
        """Append bytes, uint8 [n] in host memory."""
        self._missing -= len(values)
        self._file.write(values.numpy())

    def reserve(self, size: int) -> Tensor:
        """Append bytes, uint8 [size], that the caller puts there before the next call; BLOCK of them at most."""
        self._missing -= size
        return bytes_of(self._file.reserve(size))

    @property
    def fingerprint(self) -> Fingerprint:
        """Size and checksum of the file, after the `with` block."""
        return self._file.fingerprint

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """Finish the file as the end of a `with` block does; with an error, drop it."""
        assert error is not None or self._missing == 0, "the bytes are not those of the layout"
        self._file.close(error)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Fingerprint:
    """Write tensors that are in memory into a safetensors file; see `FileWriter`."""
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with TensorFileWriter(path, layout) as writer:
        for name in file_order(layout):
            writer.write(as_bytes(tensors[name].detach().cpu().contiguous()))
    return writer.fingerprint


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # byte of the file


class MappedTensor:
    """A tensor of a file whose pages are read when they are first touched. `values` must not be written to.

    Args:
        descriptor: of the open file, which may be closed afterwards.
        stored: the tensor.
    """

    def __init__(self, descriptor: int, stored: StoredTensor) -> None:
        self._begin, self._bytes = stored.begin, stored.dtype.itemsize * math.prod(stored.shape)
        self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)  # private: torch wants a buffer it could write
        if hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM)
        if self._bytes == 0:
            self.values = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
        else:
            count = math.prod(stored.shape)
            flat = torch.frombuffer(self._map, dtype=stored.dtype, count=count, offset=stored.begin)
            self.values = flat.view(stored.shape)

    def read_ahead(self) -> None:
        """Tell the system that all of it will be read soon."""
        if hasattr(mmap, "MADV_WILLNEED") and self._bytes:
            first = self._begin // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, first, self._begin + self._bytes - first)


class TensorFile:
    """A safetensors file that is open for reading; its header is checked against the file.

    Raises:
        ValueError: the file is cut short, or its header is not one. OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        try:
            self.tensors: dict[str, StoredTensor] = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def __getitem__(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise ValueError(f"{self.path} has no tensor {name!r}")
        return self.tensors[name]

    def read(self, name: str, start: int = 0, stop: int | None = None, out: Tensor | None = None) -> Tensor:
        """Return rows [start, stop) of a tensor (of its first axis), read from the disk, in `out` when it is given."""
        stored = self[name]
        rows = stored.shape[0] if stored.shape else 1
        stop = rows if stop is None else stop
        assert 0 <= start <= stop <= rows
        shape = (stop - start, *stored.shape[1:]) if stored.shape else ()
        values = torch.empty(shape, dtype=stored.dtype, device="cpu") if out is None else out
        assert values.shape == shape and values.dtype == stored.dtype
        row_bytes = stored.dtype.itemsize * math.prod(stored.shape[1:])
        self._read_into(as_bytes(values), stored.begin + start * row_bytes)
        return values

    def stream(
        self, ranges: Mapping[str, tuple[int, int]], expected: Fingerprint | None = None
    ) -> Generator[tuple[str, int, Tensor]]:
        """Read rows [start, stop) of tensors in the order of the file: yield name, first row, values, in pieces.

        Values last until the next piece is asked for. With `expected`, the whole file is read and must have that
        fingerprint. Raises ValueError when it has not, or is cut short.
        """
        parts: list[tuple[str, int, tuple[int, int]]] = []  # name ("": not wanted), first row, bytes
        at = 0
        for name, (start, stop) in sorted(ranges.items(), key=lambda item: self[item[0]].begin):
            stored = self[name]
            width = stored.dtype.itemsize * math.prod(stored.shape[1:])
            begin, end = stored.begin + start * width, stored.begin + stop * width
            parts += [("", 0, gap) for gap in _cut(at, begin, BLOCK)] if expected else []
            rows = max(BLOCK // width, 1)
            parts += [(name, start + (b - begin) // width, (b, e)) for b, e in _cut(begin, end, rows * width)]
            at = max(at, end)  # an empty tensor begins where another one does
        parts += [("", 0, gap) for gap in _cut(at, expected["size"], BLOCK)] if expected else []
        views = read_pieces(self.path, [part[-1] for part in parts])
        checked = views if expected is None else check_pieces(self.path, views, expected)
        with contextlib.closing(checked):
            for (name, row, _), view in zip(parts, checked, strict=True):
                if name:
                    stored = self[name]
                    buffer = view if stored.begin % stored.dtype.itemsize == 0 else memoryview(bytearray(view))
                    yield name, row, bytes_of(buffer).view(stored.dtype).view(-1, *stored.shape[1:])

    def map(self, name: str) -> MappedTensor:
        """Map a tensor; the mapping outlives this object."""
        stored = self[name]
        if stored.begin % stored.dtype.itemsize:
            raise ValueError(f"{name!r} in {self.path} is not aligned and cannot be mapped: save the file again")
        return MappedTensor(self._descriptor, stored)

    def _read_into(self, target: Tensor, at: int) -> None:
        view = memoryview(target.numpy().data)
        while len(view):
            count = os.preadv(self._descriptor, [view], at)
            if count == 0:
                raise ValueError(f"{self.path} is cut short")
            view, at = view[count:], at + count

    def _read_header(self) -> dict[str, StoredTensor]:
        size = os.fstat(self._descriptor).st_size
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise ValueError(f"{self.path} is cut short or no safetensors file: {size} bytes, a header of {length}")
        try:
            header = json.loads(os.pread(self._descriptor, length, 8))
            header.pop("__metadata__", None)
            entries = {name: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the header of {self.path} is damaged ({error!r})") from error
        end, tensors = 0, {}
        for name, (dtype, shape, first, last) in sorted(entries.items(), key=lambda item: item[1][2:]):
            numbers = (*shape, first, last)
            if dtype not in _DTYPES or not all(type(n) is int and n >= 0 for n in numbers) or first != end:
                raise ValueError(f"the header of {self.path} is damaged at {name!r}")
            end = first + _DTYPES[dtype].itemsize * math.prod(shape)
            if last != end:
                raise ValueError(
                    f"{name!r} in {self.path} has {last - first} bytes, not those of {dtype} {list(shape)}"
                )
            tensors[name] = StoredTensor(_DTYPES[dtype], shape, 8 + length + first)
        if 8 + length + end != size:
            raise ValueError(f"{self.path} has {size} bytes, its header describes {8 + length + end}")
        return tensors
