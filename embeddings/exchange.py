"""Collectives of the sparse side: errors that every rank hears of, and one fused all-to-all for all tables.

Without a process group (or with one rank) everything here is the identity and nothing is sent.
"""

import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .transfer import HOST, move

_HEADER = 64  # int64 words of a small gather that need one collective only
_MESSAGE = 2048  # bytes of an error message that travel


class Exchange:
    """The ranks of one process group, as the owners of buckets see each other. Every method is collective.

    Args:
        process_group: the data-parallel group, gloo or NCCL; None means this process alone, even if torch.distributed
            is initialised.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self.group = process_group
        self.world_size = 1 if process_group is None else dist.get_world_size(process_group)
        self.rank = 0 if process_group is None else dist.get_rank(process_group)
        self.bytes_sent = 0  # to other ranks, in all-to-alls, since construction

    @functools.cached_property
    def _backends(self) -> dict[str, str]:
        """Device type -> backend of the group for tensors there; a group may have one for each."""
        if self.group is None:
            return {}
        return dict(pair.split(":") for pair in dist.get_backend_config(self.group).split(","))

    @property
    def device(self) -> torch.device:
        """Where ids, rows and gradients are for a collective: the current GPU where the group has NCCL, else the CPU.

        It must not depend on where the tensors of one rank are: all ranks have to take the same way.
        """
        if self._backends.get("cuda", "gloo") == "gloo" or not torch.cuda.is_available():
            return HOST
        return torch.device("cuda", torch.cuda.current_device())

    @property
    def numbers_device(self) -> torch.device:
        """Where the few numbers that the host has and wants are: the CPU, unless the group has NCCL alone.

        Beside a GPU they need not wait for what it is doing.
        """
        return HOST if "cpu" in self._backends else self.device

    def agree(self, problem: Exception | None) -> None:
        """Raise on every rank when some rank has a problem; to be called before the next collective.

        A rank raises its own problem as it is; the others raise a ValueError or OSError (RuntimeError, if it was
        neither) with the message of the first rank that has one.
        """
        if self.world_size > 1 and any(any(status) for status in self.gather_ints([int(problem is not None)])):
            self._raise_everywhere(problem)
        if problem is not None:
            raise problem

    def _raise_everywhere(self, problem: Exception | None) -> None:
        text = str(problem).encode()[: _MESSAGE - 1] if problem is not None else b""
        kind = 0 if problem is None else 3 if isinstance(problem, OSError) else 1 + isinstance(problem, ValueError)
        payload = torch.zeros(_MESSAGE, dtype=torch.uint8, device="cpu")
        payload[: 1 + len(text)] = torch.tensor([kind, *text], dtype=torch.uint8)
        messages = self._all_gather(payload)
        if problem is not None:
            raise problem
        for rank, message in enumerate(messages):
            kind, *body = message.tolist()
            if kind:
                words = bytes(body).rstrip(b"\0").decode(errors="ignore")
                raise (RuntimeError, ValueError, OSError)[kind - 1](f"rank {rank} failed: {words}")
        raise AssertionError("some rank had a problem, but none told it")

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Tensors of one shape from all ranks, on the CPU."""
        (tensor,) = move([tensor], self.numbers_device)
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor, group=self.group)
        return move(gathered, HOST)  # one wait for all

    def gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        """Return the integers (int64, any number) of every rank; one collective up to 63 per rank, else two."""
        if self.world_size == 1:
            return [list(values)]
        head = torch.zeros(_HEADER, dtype=torch.int64, device="cpu")
        head[0] = len(values)
        head[1 : 1 + len(values)] = torch.tensor(values[: _HEADER - 1], dtype=torch.int64)
        gathered = self._all_gather(head)
        longest = max(int(g[0]) for g in gathered)
        if longest >= _HEADER:
            body = torch.zeros(1 + longest, dtype=torch.int64, device="cpu")
            body[0] = len(values)
            body[1 : 1 + len(values)] = torch.tensor(values, dtype=torch.int64)
            gathered = self._all_gather(body)
        return [g[1 : 1 + int(g[0])].tolist() for g in gathered]

    def sum_int(self, value: int) -> int:
        """Return the sum of one integer over all ranks."""
        return sum(v for (v,) in self.gather_ints([value]))

    def sum_tensor(self, values: Tensor) -> Tensor:
        """Return the sum of int64 tensors of one shape over all ranks."""
        if self.world_size == 1:
            return values
        total = values.to(self.numbers_device, copy=True)
        dist.all_reduce(total, group=self.group)
        return total.cpu()

    def sum_float(self, value: float) -> float:
        """Return the sum of one float64 over all ranks, added in rank order (the same bits everywhere)."""
        if self.world_size == 1:
            return value
        return sum(t.item() for t in self._all_gather(torch.tensor([value], dtype=torch.float64, device="cpu")))

    def sum_rows(self, values: Tensor) -> Tensor:
        """Return the sum of float32 tensors of one shape over all ranks, in rank order (the same bits everywhere)."""
        return values if self.world_size == 1 else functools.reduce(torch.add, self._all_gather(values))

    def all_to_all(self, buffer: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send slices of `buffer` [sum(sent)] to the ranks; return theirs [sum(received)] in rank order, where it is.

        `sent` and `received` are numbers of elements per rank.
        """
        return self._all_to_all(buffer, sent, received, self.device)

    def _all_to_all(self, buffer: Tensor, sent: Sequence[int], received: Sequence[int], device: torch.device) -> Tensor:
        if self.world_size == 1:
            return buffer
        self.bytes_sent += (sum(sent) - sent[self.rank]) * buffer.element_size()
        (outgoing,) = move([buffer], device)
        result = torch.empty(sum(received), dtype=buffer.dtype, device=device)
        dist.all_to_all_single(result, outgoing.contiguous(), list(received), list(sent), group=self.group)
        return move([result], buffer.device)[0]

    def swap_counts(self, counts: Tensor) -> Tensor:
        """Send row r of `counts` int64 [world, k] to rank r; row r of the result is what rank r sent here."""
        k = [counts.shape[1]] * self.world_size
        return self._all_to_all(counts.flatten(), k, k, self.numbers_device).view_as(counts)

    def swap(
        self,
        parts: Sequence[Tensor],
        sent: Tensor,
        received: Tensor,
        devices: torch.device | Sequence[torch.device] = HOST,
    ) -> list[Tensor]:
        """Exchange several tensors in one all-to-all.

        Args:
            parts: tensors of one dtype, anywhere; part p is [sum of sent[:, p], *shape_p], its rows ordered by
                destination.
            sent: int64 [world, len(parts)], rows of each part to each rank.
            received: int64 [world, len(parts)], rows of each part from each rank.
            devices: where the results go, each or all.

        Returns:
            For each part [sum of received[:, p], *shape_p], its rows ordered by source.
        """
        if self.world_size == 1 or not parts:
            return move(parts, devices)
        numels = [part[0:1].numel() if len(part) else _row_numel(part) for part in parts]
        widths = torch.tensor(numels, dtype=torch.int64, device=HOST)
        flat = move([part.reshape(-1) for part in parts], self.device)
        buffer = _to_rank_major(flat, sent * widths)
        received_elements = received * widths
        out = self.all_to_all(buffer, (sent * widths).sum(1).tolist(), received_elements.sum(1).tolist())
        split = _to_part_major(out, received_elements)
        return move([s.view(-1, *part.shape[1:]) for s, part in zip(split, parts, strict=True)], devices)


def _row_numel(part: Tensor) -> int:
    return int(torch.Size(part.shape[1:]).numel())


def _to_rank_major(flat: list[Tensor], counts: Tensor) -> Tensor:
    """Parts whose elements are ordered by rank -> one buffer ordered by (rank, part). counts [world, parts]."""
    if len(flat) == 1:
        return flat[0]
    pieces = [part.split(counts[:, p].tolist()) for p, part in enumerate(flat)]
    return torch.cat([piece for by_rank in zip(*pieces, strict=True) for piece in by_rank])


def _to_part_major(buffer: Tensor, counts: Tensor) -> list[Tensor]:
    """The inverse of `_to_rank_major`."""
    world_size, num_parts = counts.shape
    if num_parts == 1:
        return [buffer]
    pieces = buffer.split(counts.flatten().tolist())
    return [torch.cat([pieces[r * num_parts + p] for r in range(world_size)]) for p in range(num_parts)]
