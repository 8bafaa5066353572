"""The cost of a sample in measured time: a throwaway model computes samples of a few lengths, forward and backward."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from grzoo.data import EventDataset, GenRecCollator
from grzoo.data.calibration import TimeCost, calibrate
from grzoo.embeddings import SparseSGD
from torch import Tensor

from .runtime import Runtime, user_errors

_SHARES = (1 / 16, 1 / 4, 1 / 2, 1.0)  # of the longest sample: the lengths that are timed
Collate = Callable[[EventDataset], GenRecCollator]


def measured_cost(
    make_model: Callable[[], Any], collate: Collate, item_ids: Any, longest: int, device: torch.device, runtime: Runtime
) -> TimeCost:
    """The cost that the main rank measures, on every rank: all must divide a step alike. Takes some seconds.

    Args:
        make_model: a model of the run's configuration; its tables stay those of this copy.
        collate: the run's collator of another data set.
        item_ids: int64 [N], the ids that samples are made of.
        longest: inputs of the longest sample.
    """

    def work() -> str:
        with user_errors():
            cost = measure(make_model().to(device), collate, item_ids, longest)
        return json.dumps([cost.linear, cost.quadratic])

    return TimeCost(*json.loads(runtime.main_first("calibration", work)))


def measure(model: Any, collate: Collate, item_ids: Any, longest: int) -> TimeCost:
    """Time forward and backward of `model` on samples of a few lengths up to `longest`, about as many tokens each."""
    lengths = sorted({max(1, round(share * max(2, longest))) for share in _SHARES})
    batches = {length: _batch(collate, item_ids, length, max(1, 2 * longest // length)) for length in lengths}
    device = next(model.parameters()).device
    model.train()
    rows = SparseSGD(model.embeddings, 0.1)  # tables compute no gradients without; it never steps

    def run(length: int) -> int:
        batch, samples = batches[length]
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        model(**inputs).loss.backward()
        model.zero_grad(set_to_none=True)
        rows.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return samples

    return calibrate(run, lengths)


def _batch(collate: Collate, item_ids: Any, length: int, samples: int) -> tuple[dict[str, Any], int]:
    generator = np.random.default_rng(0)
    events = samples * (length + 1)
    columns = {"item_id": generator.choice(item_ids, events), "timestamp": np.arange(events) * 60}
    dataset = EventDataset.from_arrays(columns, [length + 1] * samples)
    return dict(collate(dataset)(np.arange(samples))), samples
