"""Causal softmax attention by torch's flash attention over packed sequences, on a GPU."""

import torch
from grzoo.models.packing import JaggedLayout
from torch import Tensor


def softmax_attention_varlen(query: Tensor, key: Tensor, value: Tensor, layout: JaggedLayout) -> Tensor:
    """`softmax_attention_naive` (formula and shapes there) for bfloat16 or float16 tensors on a GPU.

    Raises:
        ValueError: for another device or dtype, and heads of another width than a multiple of 8 up to 256.
    """
    if not varlen_takes(value):
        raise ValueError(
            "Packed flash attention takes bfloat16 or float16 on a GPU, heads with a width of 8, 16, ... 256; "
            f"got {value.dtype} on {value.device}, width {value.shape[2]}: use attn_implementation='auto'."
        )
    from torch.nn.attention.varlen import varlen_attn

    starts = layout.cu_seq_lens.to(torch.int32)
    longest = layout.max_length
    out = varlen_attn(query, key, value, starts, starts, longest, longest, window_size=(-1, 0))
    assert isinstance(out, Tensor)
    return out


def varlen_takes(value: Tensor) -> bool:
    """Whether packed flash attention can be used on this tensor."""
    fits = value.numel() > 0 and value.shape[2] % 8 == 0 and value.shape[2] <= 256
    return fits and value.device.type == "cuda" and value.dtype in (torch.bfloat16, torch.float16)
