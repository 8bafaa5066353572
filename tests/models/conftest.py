"""Micro models and hand-made micro-batches."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from grzoo.embeddings import SparseSGD
from grzoo.models import HSTUConfig, HSTUForRetrieval

Batch = dict[str, Any]


def make_batch(
    lengths: list[int], *, negatives: int = 3, shared: bool = False, seed: int = 0, trained: float = 0.8
) -> Batch:
    """A packed micro-batch of users with these numbers of events, ids of any sign, some labels masked."""
    generator = torch.Generator().manual_seed(seed)
    total, starts = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(-7, 12, (1, total), generator=generator) * 10**17
    mask = torch.rand(1, total, generator=generator) < trained
    labels = torch.randint(-7, 12, (1, total), generator=generator) * 10**17
    steps = torch.randint(0, 10**6, (total,), generator=generator)
    times = torch.cat([steps[a:b].cumsum(0) for a, b in zip(starts, starts[1:], strict=False)] or [steps]).unsqueeze(0)
    batch: Batch = {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(n) for n in lengths] or [torch.arange(0)]).unsqueeze(0),
        "cu_seq_lens_q": starts.int(),
        "max_length_q": max(lengths, default=0),
        "timestamps": times,
        "target_timestamps": times + torch.randint(0, 10**7, (1, total), generator=generator),
        "labels": labels.masked_fill(~mask, -(2**62)),
        "label_mask": mask,
        "token_keys": torch.randint(-(2**62), 2**62, (1, total), generator=generator),
        "user_ids": torch.arange(len(lengths)),
    }
    shape = (negatives,) if shared else (1, total, negatives)
    batch["negative_ids"] = torch.randint(-7, 12, shape, generator=generator) * 10**17
    if shared:
        batch["negative_log_q"] = -5 * torch.rand(negatives, generator=generator)
        batch["label_log_q"] = -5 * torch.rand(1, total, generator=generator)
    return batch


def take_users(batch: Batch, users: list[int]) -> Batch:
    """The micro-batch of some of the users."""
    starts = batch["cu_seq_lens_q"].tolist()
    tokens = torch.cat([torch.arange(starts[u], starts[u + 1]) for u in users] or [torch.arange(0)]).long()
    lengths = [starts[u + 1] - starts[u] for u in users]
    per_token = {
        name: x[:, tokens] for name, x in batch.items() if torch.is_tensor(x) and x.shape[:1] == (1,) and x.dim() > 1
    }
    others = {
        name: batch[name] for name in ("negative_ids", "negative_log_q") if name in batch and name not in per_token
    }
    starts_of = torch.tensor([0, *lengths]).cumsum(0).int()
    return per_token | others | {"cu_seq_lens_q": starts_of, "max_length_q": max(lengths, default=0)}


def pad(batch: Batch, *, left: bool) -> Batch:
    """The padded form [B, L], with junk at padded places."""
    starts = batch["cu_seq_lens_q"].tolist()
    lengths = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    width = max(lengths, default=0) + 2
    place = torch.arange(width)
    mask = torch.stack([(place >= width - n) if left else (place < n) for n in lengths])
    padded: Batch = {"attention_mask": mask.long()}
    for name, x in batch.items():
        if torch.is_tensor(x) and x.dim() > 1:
            junk = torch.full((*mask.shape, *x.shape[2:]), 1, dtype=x.dtype)
            padded[name] = junk.masked_scatter(mask.view(*mask.shape, *[1] * (x.dim() - 2)), x)
        elif name == "negative_ids" or name == "negative_log_q":
            padded[name] = x
    return padded


@pytest.fixture
def batches() -> Any:
    """Namespace of make_batch, take_users and pad."""
    return type("Batches", (), {f.__name__: staticmethod(f) for f in (make_batch, take_users, pad)})


@pytest.fixture
def micro_model() -> Iterator[Callable[..., HSTUForRetrieval]]:
    """Builds a small HSTU with an attached sparse optimizer, large random weights and initial vectors."""
    kept = []

    def build(*, dtype: torch.dtype = torch.float32, **fields: Any) -> HSTUForRetrieval:
        defaults = dict(
            hidden_size=6,
            num_hidden_layers=2,
            num_attention_heads=2,
            attention_head_dim=3,
            linear_head_dim=4,
            max_sequence_length=20,
            max_position_embeddings=23,
            num_negatives=3,
            hidden_dropout=0.2,
            item_initializer={"kind": "uniform", "scale": 1.0},
            initializer_range=0.5,
        )
        torch.manual_seed(0)
        model = HSTUForRetrieval(HSTUConfig(**defaults | fields), embedding_backend="naive").to(dtype).train()
        kept.append(SparseSGD(model.embeddings, lr=0.1))
        return model

    yield build
    kept.clear()
