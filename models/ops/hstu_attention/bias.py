"""The two bias tables of HSTU: relative position and logarithm of the time difference."""

import torch
from torch import Tensor

TIME_BUCKET_WIDTH = 0.301  # ln(1.351): one bucket for each growth of the time difference by 35 %
MAX_BUCKETS = 160  # as in host_types.h; differences of 64-bit times reach 146


def time_buckets(query_times: Tensor, key_times: Tensor, num_buckets: int) -> Tensor:
    """`floor(ln(max(1, |query - key|)) / 0.301)` clamped to [0, num_buckets - 1], for every pair.

    In float64: with float32 the bucket of a difference near a boundary would depend on the device's logarithm.

    Args:
        query_times: int64 or float64 [..., R] seconds: time of the event to be predicted. Exact below 2^53.
        key_times: int64 or float64 [..., C] seconds: time of the event.

    Returns:
        float64 [..., R, C] holding whole numbers.
    """
    difference = query_times.double().unsqueeze(-1) - key_times.double().unsqueeze(-2)
    return difference.abs_().clamp_(min=1).log_().div_(TIME_BUCKET_WIDTH).floor_().clamp_(max=num_buckets - 1)


def position_bias(table: Tensor, first_row: int, num_rows: int, num_columns: int) -> Tensor:
    """[num_rows, num_columns]: `table[n - 1 + j - i]` for i = first_row + 0, 1, ... and j = 0, 1, ...

    Args:
        table: [2n - 1], entry n - 1 + d for a key d places after the query.
    """
    n = (table.numel() + 1) // 2
    lowest = n - first_row - num_rows
    windows = table[lowest : lowest + num_rows + num_columns - 1].unfold(0, num_columns, 1)
    return windows.flip(0)


def position_bias_gradient(grad: Tensor, first_row: int, table_grad: Tensor) -> None:
    """Add the sums over the diagonals of `grad` [R, C] to `table_grad` [2n - 1]: the transpose of `position_bias`.

    Skews the matrix by a reshape so that each diagonal becomes a column: deterministic on every device.
    """
    rows, columns = grad.shape
    width = rows + columns - 1
    skewed = torch.nn.functional.pad(grad.flip(0), (0, rows)).flatten()[: rows * width].view(rows, width)
    lowest = (table_grad.numel() + 1) // 2 - first_row - rows
    table_grad[lowest : lowest + width] += skewed.sum(0)


def time_bias_gradient(grad: Tensor, buckets: Tensor, table_grad: Tensor, *, atomic_free: bool | None = None) -> None:
    """Add the sums of `grad` [P] over equal `buckets` int64 [P] to `table_grad` [num_buckets], deterministically.

    Args:
        atomic_free: sum by a matrix product with one-hot rows, since atomic adds of a GPU come in any order; None:
            except on a CPU.
    """
    if not (grad.device.type != "cpu" if atomic_free is None else atomic_free):
        table_grad += torch.zeros_like(table_grad).scatter_add_(0, buckets, grad)
        return
    for part, part_buckets in zip(grad.split(1 << 20), buckets.split(1 << 20), strict=True):
        one_hot = torch.nn.functional.one_hot(part_buckets, table_grad.numel()).to(part.dtype)
        table_grad += part @ one_hot
