"""A step on its way from a worker process: all its tensors in one buffer, so that one shared block travels."""

from dataclasses import dataclass, replace

import torch

from .collator import GlobalStep, MicroBatch

_ALIGNMENT = 64

Layout = dict[str, tuple[torch.dtype, torch.Size, int]]


@dataclass
class PackedStep:
    """A GlobalStep whose tensors lie in `buffer` (uint8), at the places that `layouts` tells for each micro-batch."""

    step: GlobalStep
    layouts: list[Layout]
    buffer: torch.Tensor

    def pin_memory(self) -> "PackedStep":
        """The step with its buffer in pinned memory (called by torch's DataLoader)."""
        return replace(self, buffer=self.buffer.pin_memory())


def pack(step: GlobalStep) -> PackedStep:
    """Copy the tensors of a step into one buffer."""
    layouts: list[Layout] = []
    numbers: list[MicroBatch] = []
    parts: list[tuple[int, torch.Tensor]] = []
    size = 0
    for batch in step.micro_batches:
        layout: Layout = {}
        for name, value in batch.items():
            if isinstance(value, torch.Tensor):
                layout[name] = (value.dtype, value.shape, size)
                parts.append((size, value))
                size += -(-value.numel() * value.element_size() // _ALIGNMENT) * _ALIGNMENT
        layouts.append(layout)
        numbers.append({name: value for name, value in batch.items() if not isinstance(value, torch.Tensor)})
    buffer = torch.empty(size, dtype=torch.uint8)
    for offset, value in parts:
        if not value.numel():
            continue  # no bytes, and torch refuses to view them
        flat = value.contiguous().view(-1).view(torch.uint8)
        buffer[offset : offset + len(flat)] = flat
    return PackedStep(replace(step, micro_batches=numbers), layouts, buffer)


def unpack(packed: PackedStep) -> GlobalStep:
    """The step, its tensors views of the buffer."""
    batches: list[MicroBatch] = []
    for layout, numbers in zip(packed.layouts, packed.step.micro_batches, strict=True):
        batch: MicroBatch = {}
        for name, (dtype, shape, offset) in layout.items():
            if not shape.numel():
                batch[name] = torch.empty(shape, dtype=dtype)
                continue
            length = shape.numel() * dtype.itemsize
            batch[name] = packed.buffer[offset : offset + length].view(dtype).view(shape)
        batches.append(batch | numbers)
    return replace(packed.step, micro_batches=batches)
