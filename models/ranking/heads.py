"""Several binary tasks on one vector per candidate: the head and its loss."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MultiTaskHead(nn.Module):
    """One small network per task: `logit_t = Linear_t(silu(Linear_t(x)))`."""

    def __init__(self, hidden_size: int, num_tasks: int) -> None:
        super().__init__()
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, 1))
            for _ in range(num_tasks)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """[C, D] -> float32 [C, tasks]."""
        return torch.cat([tower(hidden) for tower in self.towers], dim=-1).float()


def multi_task_loss(
    logits: Tensor,
    labels: Tensor,
    label_mask: Tensor | None = None,
    num_items_in_batch: int | Sequence[int] | Tensor | None = None,
) -> Tensor:
    """`sum_t (sum of binary cross-entropy over the known labels of task t) / n_t`.

    Args:
        logits: float32 [C, tasks].
        labels: [C, tasks] in [0, 1]; any finite value where it is masked.
        label_mask: bool [C, tasks], the label is known; None: all are.
        num_items_in_batch: n_t, the known labels of the whole step by task, over all micro-batches and ranks. None:
            those of this call.

    Raises:
        ValueError: for another number of denominators than tasks, and for one below 1.
    """
    tasks = logits.shape[1]
    mask = torch.ones_like(logits, dtype=torch.bool) if label_mask is None else label_mask.bool()
    if num_items_in_batch is None:
        counts = mask.sum(0).clamp(min=1)
    else:
        counts = torch.as_tensor(num_items_in_batch).reshape(-1)
        if counts.numel() != tasks:
            raise ValueError(
                f"num_items_in_batch holds {counts.numel()} denominators, the model has {tasks} tasks: give one per "
                "task."
            )
        if not bool((counts >= 1).all()):
            raise ValueError(
                f"num_items_in_batch is {counts.tolist()}: a denominator is at least 1, also for a task without "
                "a known label in the step."
            )
        counts = counts.to(logits.device, non_blocking=True)
    losses = F.binary_cross_entropy_with_logits(
        logits, labels.to(logits.dtype).masked_fill(~mask, 0.0), reduction="none"
    )
    return (losses.masked_fill(~mask, 0.0).sum(0) / counts).sum()
