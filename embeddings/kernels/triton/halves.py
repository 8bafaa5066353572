"""bfloat16 rows on the device: packed in pairs into words of four bytes, which the kernels of float32 rows move."""

from collections.abc import Mapping

import torch
from grzoo.embeddings.kernels.base import STEP_SLOT
from grzoo.embeddings.kernels.rounding import round_nearest
from torch import Tensor

from . import updates
from .chunks import Chunks, shape_of
from .launch import blocks, on
from .row_kernels import round_kernel


class HalfChunks(Chunks):
    """Rows of `dim` bfloat16; given and returned as float32."""

    def __init__(self, dim: int, shift: int, device: torch.device) -> None:
        super().__init__((dim + 1) // 2, shift, torch.int32, device)
        self.dim = dim

    def gather(self, handles: Tensor, out: Tensor | None = None) -> Tensor:
        """Return float32 [n, dim], zeros where the handle is -1; in `out` when given."""
        rows = super().gather(handles).view(torch.bfloat16)[:, : self.dim]
        return rows.float() if out is None else out.copy_(rows)

    def scatter(self, handles: Tensor, values: Tensor) -> None:
        """Overwrite rows with the nearest values of float32 or bfloat16 [n, dim]. Handles are distinct."""
        packed = round_nearest(values)
        if self.dim % 2:
            packed = torch.nn.functional.pad(packed, (0, 1))
        super().scatter(handles, packed.contiguous().view(torch.int32))


def apply(
    rule: str,
    rows: HalfChunks,
    slots: Mapping[str, Chunks],
    handles: Tensor,
    grads: Tensor,
    keys: Tensor | None,
    **hyper: float,
) -> None:
    """Apply one optimizer step to bfloat16 rows: on float32 copies of rows and state, which are then written back.

    keys int64 [n] of the rows round stochastically, None to the nearest. A number of launches that does not depend on
    n; nothing waits for the device.
    """
    copies = {name: Chunks.holding(array.gather(handles)) for name, array in slots.items()}
    values = rows.gather(handles)
    places = torch.arange(len(handles), dtype=torch.int64, device=rows.device)
    updates.apply(rule, Chunks.holding(values), copies, places, grads, **hyper)
    for name, copy in copies.items():
        slots[name].scatter(handles, copy.chunks[0])
    if keys is not None:
        values = round_rows(values, keys, copies[STEP_SLOT].chunks[0].flatten().long())
    rows.scatter(handles, values)


def round_rows(values: Tensor, keys: Tensor, steps: Tensor) -> Tensor:
    """`round_stochastic` (formula and shapes there), bit for bit. One launch."""
    n, width = values.shape
    out = torch.empty(n, width, dtype=torch.int16, device=values.device)
    if n:
        shape = shape_of(width, 0)
        del shape["SHIFT"]
        with on(values.device):
            words = values.contiguous().view(torch.int32)
            round_kernel[blocks(n, shape["ROWS"])](words, keys.contiguous(), steps, out, n, **shape)
    return out.view(torch.bfloat16)
