"""HSTU attention in C++ on the host: tiles of one sequence at a time, forward and backward, no padded work."""

import ctypes
from functools import cache

import torch
from grzoo.models.ops.host import AttentionCall, View, check_host_tensor, library
from grzoo.models.ops.shapes import check_shape
from grzoo.models.packing import JaggedLayout
from torch import Tensor

from .bias import MAX_BUCKETS, time_buckets


def hstu_attention_host(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: JaggedLayout,
    *,
    max_length: int,
    position_table: Tensor,
    time_table: Tensor | None = None,
) -> Tensor:
    """`hstu_attention_naive` (formula and shapes there) on CPU tensors, in float32, the same bits for any thread count.

    Memory beyond inputs and outputs: linear in the tokens of the sequences at work, one sequence per thread. The
    buckets are those of `time_buckets`.

    Raises:
        ValueError: for tensors that are not on the CPU, float64, a sequence longer than `max_length`, missing times,
            more than 160 time buckets, sizes that do not fit.
    """
    check_host_tensor(query)
    if layout.max_length > max_length:
        raise ValueError(
            f"A sequence has {layout.max_length} tokens, but max_length is {max_length}: "
            "truncate it or raise max_length."
        )
    times = (layout.timestamps, layout.target_timestamps) if time_table is not None else (None, None)
    if time_table is not None and (times[0] is None or times[1] is None):
        raise ValueError("A time table needs timestamps and target_timestamps; give them or leave the time bias out.")
    out: Tensor = _hstu_attention(
        query.float(),
        key.float(),
        value.float(),
        layout.cu_seq_lens,
        position_table.float(),
        None if time_table is None else time_table.float(),
        *times,
        max_length,
    )
    return out.to(value.dtype)


@torch.library.custom_op("grzoo::hstu_attention_host", mutates_args=(), device_types="cpu")
def _hstu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    position_table: Tensor,
    time_table: Tensor | None,
    timestamps: Tensor | None,
    target_timestamps: Tensor | None,
    max_length: int,
) -> Tensor:
    out = torch.empty(value.shape, dtype=torch.float32)
    call = _Call(query, key, value, cu_seq_lens, position_table, time_table, timestamps, target_timestamps, max_length)
    call.structure.out = out.data_ptr()
    call.run(backward=False)
    return out


@_hstu_attention.register_fake
def _(  # type: ignore[no-untyped-def]
    query, key, value, cu_seq_lens, position_table, time_table, timestamps, target_timestamps, max_length
) -> Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


@torch.library.custom_op("grzoo::hstu_attention_host_backward", mutates_args=(), device_types="cpu")
def _hstu_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    position_table: Tensor,
    time_table: Tensor | None,
    timestamps: Tensor | None,
    target_timestamps: Tensor | None,
    max_length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = _Call(query, key, value, cu_seq_lens, position_table, time_table, timestamps, target_timestamps, max_length)
    grads = tuple(torch.empty(x.shape, dtype=torch.float32) for x in (query, key, value, position_table))
    dtime = torch.empty(0 if time_table is None else time_table.numel(), dtype=torch.float32)
    check_shape("grad_out", grad_out, value.shape)
    call.structure.grad_out = call.view(grad_out)
    call.structure.grad_query, call.structure.grad_key, call.structure.grad_value = (g.data_ptr() for g in grads[:3])
    call.structure.grad_position, call.structure.grad_time = grads[3].data_ptr(), dtime.data_ptr()
    call.run(backward=True)
    return *grads, dtime  # type: ignore[return-value]


@_hstu_attention_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_out, query, key, value, cu_seq_lens, position_table, time_table, timestamps, target_timestamps, max_length
) -> tuple[Tensor, ...]:
    grads = tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value, position_table)
    )
    return *grads, position_table.new_empty(0) if time_table is None else torch.empty_like(time_table)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.max_length = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors  # once: checkpointing recomputes the layer for the first access and refuses a second
    dquery, dkey, dvalue, dposition, dtime = _hstu_attention_backward(grad_out, *saved, ctx.max_length)
    return dquery, dkey, dvalue, None, dposition, None if saved[5] is None else dtime, None, None, None


_hstu_attention.register_autograd(_backward, setup_context=_setup_context)


class _Structure(ctypes.Structure):  # GrzooAttention of host.cpp
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("num_sequences", "heads", "key_width", "value_width", "max_length", "num_buckets")
        ),
        *((name, ctypes.c_void_p) for name in ("cu_seq_lens", "timestamps", "target_timestamps", "thresholds")),
        *((name, ctypes.c_void_p) for name in ("position_table", "time_table")),
        *((name, View) for name in ("query", "key", "value", "grad_out")),
        *(
            (name, ctypes.c_void_p)
            for name in ("out", "grad_query", "grad_key", "grad_value", "grad_position", "grad_time")
        ),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
        ("level", ctypes.c_int32),
    ]


class _Call(AttentionCall):
    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_lens: Tensor,
        position_table: Tensor,
        time_table: Tensor | None,
        timestamps: Tensor | None,
        target_timestamps: Tensor | None,
        max_length: int,
    ) -> None:
        fields = _Structure()
        super().__init__(fields, query, key, value, cu_seq_lens, 1.0 / max_length)
        fields.max_length = max_length
        fields.position_table = self.dense("position_table", position_table, torch.float32, 2 * max_length - 1)
        if time_table is not None:
            assert timestamps is not None and target_timestamps is not None
            buckets = time_table.numel()
            if not 1 <= buckets <= MAX_BUCKETS:
                raise ValueError(
                    f"The host kernel takes 1 to {MAX_BUCKETS} time buckets, got {buckets}: differences of 64-bit "
                    "times reach 146."
                )
            fields.num_buckets = buckets
            fields.time_table = self.dense("time_table", time_table, torch.float32, buckets)
            fields.timestamps = self.dense("timestamps", timestamps, torch.int64, len(query))
            fields.target_timestamps = self.dense("target_timestamps", target_timestamps, torch.int64, len(query))
            fields.thresholds = self.dense("thresholds", bucket_thresholds(buckets), torch.int64, buckets - 1)

    def run(self, *, backward: bool) -> None:
        function = library().grzoo_hstu_attention
        code = function(ctypes.byref(self.structure), ctypes.c_int(backward))
        if code == 1:
            raise MemoryError("The HSTU attention on the host found no memory for its tiles.")
        if code:
            raise ValueError(
                f"A sequence is longer than max_length, {self.structure.max_length}: truncate it or raise max_length."
            )


@cache
def bucket_thresholds(num_buckets: int) -> Tensor:
    """int64 [num_buckets - 1]: least difference in bucket 1, 2, ... as `time_buckets` sees it; 2^63 - 1 if none."""
    low = torch.zeros(num_buckets - 1, dtype=torch.int64)
    high = torch.full_like(low, 2**63 - 1)
    wanted = torch.arange(1, num_buckets)
    for _ in range(64):
        middle = low + (high - low) // 2
        bucket = time_buckets(middle, torch.zeros(1, dtype=torch.int64), num_buckets).squeeze(-1)
        high = torch.where(bucket >= wanted, middle, high)
        low = torch.where(bucket >= wanted, low, middle + 1).clamp(max=high)
    return high
