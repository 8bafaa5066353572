"""The check before a kernel: it reads as many numbers as the sizes say, whatever lies there."""

from collections.abc import Sequence

from torch import Tensor


def check_shape(name: str, x: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError unless `x` has this shape."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)} to fit the other tensors; got {list(x.shape)}.")


def check_attention_shapes(query: Tensor, key: Tensor, value: Tensor, num_tokens: int) -> None:
    """Raise ValueError unless query and key are [T, H, d] and value [T, H, dv] with T = `num_tokens`."""
    if query.dim() != 3 or len(query) != num_tokens:
        raise ValueError(f"query must have shape [{num_tokens}, H, d], as the layout says; got {list(query.shape)}.")
    check_shape("key", key, query.shape)
    check_shape("value", value, (*query.shape[:2], value.shape[-1]))
