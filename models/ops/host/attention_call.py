"""What the attention ops hand to C: strided views, dense arrays, and the tensors that must stay alive meanwhile."""

import ctypes

import torch
from grzoo.models.ops.shapes import check_attention_shapes, check_shape
from torch import Tensor

from .library import HIGHEST_LEVEL


class View(ctypes.Structure):
    """float32 [T, H, D] whose numbers of one head lie together; strides in numbers."""

    _fields_ = [("data", ctypes.c_void_p), ("token", ctypes.c_int64), ("head", ctypes.c_int64)]


def check_host_tensor(query: Tensor) -> None:
    """Raise ValueError for a tensor that is not on the CPU, or float64."""
    if query.device.type != "cpu" or query.dtype == torch.float64:
        raise ValueError(
            f"The host kernel takes CPU tensors of at most 32 bits, got {query.dtype} on {query.device}: "
            "choose another attn_implementation."
        )


class AttentionCall:
    """The arguments of one call: `structure` has the fields of an op; those that every attention has are set here.

    Raises:
        ValueError: for tensors whose sizes do not fit each other.
    """

    def __init__(
        self, structure: ctypes.Structure, query: Tensor, key: Tensor, value: Tensor, cu_seq_lens: Tensor, scale: float
    ) -> None:
        check_attention_shapes(query, key, value, int(cu_seq_lens[-1]))
        self.alive: list[Tensor] = []
        self.structure = structure
        structure.num_sequences = cu_seq_lens.numel() - 1
        _, structure.heads, structure.key_width = query.shape
        structure.value_width = value.shape[2]
        structure.query, structure.key, structure.value = (self.view(x) for x in (query, key, value))
        structure.cu_seq_lens = self.dense("cu_seq_lens", cu_seq_lens, torch.int64, cu_seq_lens.numel())
        structure.scale, structure.threads, structure.level = scale, torch.get_num_threads(), HIGHEST_LEVEL

    def dense(self, name: str, x: Tensor, dtype: torch.dtype, count: int) -> int:
        """The address of `count` numbers one after the other, as many as C reads."""
        check_shape(name, x, (count,))
        self.alive.append(x.to(dtype).contiguous())
        return self.alive[-1].data_ptr()

    def view(self, x: Tensor) -> View:
        """The tensor where it lies, copied only when a head is scattered."""
        assert x.dtype == torch.float32
        if x.stride(2) != 1 and x.shape[2] > 1:
            x = x.contiguous()
        self.alive.append(x)
        return View(x.data_ptr(), x.stride(0), x.stride(1))
