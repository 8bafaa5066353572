"""A step is applied to both sides or to neither: making DeepSpeed skip the step that the sparse side cannot take."""

from typing import Any

import torch
import torch.distributed as dist


def poison_dense_gradients(engine: Any) -> None:
    """Puts a NaN into one dense gradient, so that `engine.step()` skips its update and counts a skipped step.

    To be called on all ranks after the last backward of a step. DeepSpeed has no call that withholds a step; its own
    check of the gradients for finiteness does, in ZeRO 1, 2 and 3, and all ranks share its outcome.
    """
    from deepspeed.utils import safe_get_local_grad, safe_set_full_grad, safe_set_local_grad

    trainable = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    if not hasattr(trainable[0], "ds_id"):  # stages 1 and 2
        smallest = min(trainable, key=torch.Tensor.numel)
        safe_set_full_grad(smallest, torch.full_like(smallest, float("nan")))
    elif dist.get_rank(engine.data_parallel_group) == 0:
        # Only rank 0's first element: DeepSpeed never overwrites the padding of a stage 3 partition, and a NaN there
        # would skip all later steps too.
        gradient = safe_get_local_grad(trainable[0]).clone()
        gradient[0] = float("nan")
        safe_set_local_grad(trainable[0], gradient)
