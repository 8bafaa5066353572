"""Micro models and hand-made micro-batches."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from grzoo.embeddings import SparseSGD
from grzoo.models import HSTUConfig, HSTUForRetrieval, SASRecConfig, SASRecForRetrieval

Batch = dict[str, Any]


def make_batch(
    lengths: list[int], *, negatives: int = 3, sampling: str = "uniform", seed: int = 0, trained: float = 0.8
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
    shape = (negatives,) if sampling == "shared" else (1, total, negatives)
    batch["negative_ids"] = torch.randint(-7, 12, shape, generator=generator) * 10**17
    if sampling == "all":
        batch["negative_ids"] = torch.randperm(19, generator=generator) * 10**17 - 7 * 10**17
    if sampling == "shared":
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


def by_id(model, batches):
    """Loss, dense gradients by name and row gradients by item id, of micro-batches that were prepared as one step."""
    model.zero_grad()
    step = model.embeddings.prepare([model.embedding_ids(batch) for batch in batches]).fetch()
    total = sum(model.embedding_ids(batch)["labels"].numel() for batch in batches)
    loss, rows = torch.zeros(()), {}
    for k, batch in enumerate(batches):
        part = model(**batch, embeddings=step[k], num_items_in_batch=total).loss
        part.backward()
        loss = loss + part.detach()
    for k, batch in enumerate(batches):
        for name, ids in model.embedding_ids(batch).items():
            leaf, index = step[k].rows(name)
            rows |= dict(zip(ids.flatten().tolist(), step.shares[0].leaf.grad[index.flatten()], strict=True))
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}, rows


def assert_same(got, want, atol=1e-6):
    torch.testing.assert_close(got[0], want[0], atol=atol, rtol=1e-5)
    assert got[1].keys() == want[1].keys() and got[2].keys() == want[2].keys()
    for name in want[1]:
        torch.testing.assert_close(got[1][name], want[1][name], atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for item in want[2]:
        torch.testing.assert_close(got[2][item], want[2][item], atol=atol, rtol=1e-4)


@pytest.fixture
def batches() -> Any:
    """Namespace of the functions above."""
    functions = (make_batch, take_users, pad, by_id, assert_same)
    return type("Batches", (), {f.__name__: staticmethod(f) for f in functions})


@pytest.fixture
def micro_sasrec() -> Iterator[Callable[..., SASRecForRetrieval]]:
    """Builds a small SASRec with an attached sparse optimizer, large random weights and initial vectors."""
    kept = []

    def build(*, dtype: torch.dtype = torch.float32, **fields: Any) -> SASRecForRetrieval:
        defaults = dict(
            hidden_size=6,
            num_attention_heads=2,
            max_sequence_length=20,
            num_negatives=3,
            item_initializer={"kind": "uniform", "scale": 1.0},
            initializer_range=0.5,
        )
        torch.manual_seed(0)
        model = SASRecForRetrieval(SASRecConfig(**defaults | fields), embedding_backend="naive").to(dtype).train()
        kept.append(SparseSGD(model.embeddings, lr=0.1))
        return model

    yield build
    kept.clear()


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


RANKING = dict(
    hidden_size=8,
    embedding_dim=5,
    user_features=["age", "gender"],
    event_features=["action"],
    item_features={"genres": 4},
    cross_features=["count", "mean"],
    tasks=["like", "love"],
    max_sequence_length=20,
    hidden_dropout=0.2,
    initializer={"kind": "uniform", "scale": 1.0},
)
_EVENTS = ("input_ids", "timestamps", "event_features", "item_features", "token_keys")
_CANDIDATES = (
    "candidate_ids",
    "candidate_timestamps",
    "candidate_features",
    "cross_features",
    "labels",
    "label_mask",
    "candidate_keys",
)
_STARTS = {"cu_seq_lens_q": _EVENTS, "cu_seq_lens_candidates": _CANDIDATES}


def make_ranking_batch(histories: list[int], candidates: list[int], *, seed: int = 0) -> Batch:
    """A packed ranking micro-batch: times with ties, real-time parts that overlap the candidates in time."""
    g = torch.Generator().manual_seed(seed)
    users, total, exposed = len(histories), sum(histories), sum(candidates)

    def ints(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=g)

    def times(counts: list[int], low: int) -> torch.Tensor:
        parts = [torch.sort(ints(low, 30, n)).values for n in counts]
        return torch.cat([ints(0, 1, 0), *parts])[None]

    recent = torch.tensor([min(n, 4) for n in histories], dtype=torch.int64)
    event_times = times(histories, 10)
    starts = torch.tensor([0, *histories]).cumsum(0)
    for user in range(users):  # the long-term part precedes all candidates
        event_times[0, starts[user] : starts[user + 1] - recent[user]] = 5
    return {
        "input_ids": ints(-7, 12, 1, total) * 10**17,
        "timestamps": event_times,
        "event_features": ints(0, 3, 1, total, 1),
        "item_features": ints(0, 16, 1, total, 1),
        "token_keys": ints(-(2**62), 2**62, 1, total),
        "cu_seq_lens_q": starts.int(),
        "num_recent": recent,
        "user_features": ints(0, 4, users, 2),
        "user_keys": ints(-(2**62), 2**62, users),
        "candidate_ids": ints(-7, 12, 1, exposed) * 10**17,
        "candidate_timestamps": times(candidates, 10),
        "candidate_features": ints(0, 16, 1, exposed, 1),
        "cross_features": torch.randn(1, exposed, 2, generator=g),
        "labels": ints(0, 2, 1, exposed, 2).float(),
        "label_mask": torch.rand(1, exposed, 2, generator=g) < 0.8,
        "candidate_keys": ints(-(2**62), 2**62, 1, exposed),
        "cu_seq_lens_candidates": torch.tensor([0, *candidates]).cumsum(0).int(),
    }


def take_ranking_users(batch: Batch, users: list[int]) -> Batch:
    """The ranking micro-batch of some of the users."""
    taken: Batch = {name: batch[name][users] for name in ("num_recent", "user_features", "user_keys")}
    for starts_name, names in _STARTS.items():
        starts = batch[starts_name].tolist()
        tokens = torch.cat([torch.arange(0), *(torch.arange(starts[u], starts[u + 1]) for u in users)])
        taken |= {name: batch[name][:, tokens] for name in names}
        taken[starts_name] = torch.tensor([0, *(starts[u + 1] - starts[u] for u in users)]).cumsum(0).int()
    return taken


def pad_ranking(batch: Batch, *, left: bool) -> Batch:
    """The padded form, with junk at padded places."""
    padded: Batch = {name: batch[name] for name in ("num_recent", "user_features", "user_keys")}
    masks = {"cu_seq_lens_q": "attention_mask", "cu_seq_lens_candidates": "candidate_mask"}
    for starts_name, names in _STARTS.items():
        lengths = batch[starts_name].diff().tolist()
        width = max(lengths, default=0) + 2
        place = torch.arange(width)
        mask = torch.stack([(place >= width - n) if left else (place < n) for n in lengths])
        padded[masks[starts_name]] = mask.long()
        for name in names:
            x = batch[name]
            junk = torch.full((*mask.shape, *x.shape[2:]), 1, dtype=x.dtype)
            padded[name] = junk.masked_scatter(mask.view(*mask.shape, *[1] * (x.dim() - 2)), x)
    return padded


def ranking_step(
    model: Any, parts: list[Batch]
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[Any, torch.Tensor]]:
    """Loss, dense gradients by name and row gradients by (table, id), of micro-batches prepared as one step."""
    model.zero_grad()
    step = model.embeddings.prepare([model.embedding_ids(batch) for batch in parts]).fetch()
    known = [
        (b["label_mask"] & (b["candidate_mask"].bool()[..., None] if "candidate_mask" in b else True)) for b in parts
    ]
    counts = [max(1, int(n)) for n in sum(mask.flatten(0, 1).sum(0) for mask in known)]
    loss, rows = torch.zeros(()), {}
    for k, batch in enumerate(parts):
        part = model(**batch, embeddings=step[k], num_items_in_batch=counts).loss
        part.backward()
        loss = loss + part.detach()
    for k, batch in enumerate(parts):
        for name, ids in model.embedding_ids(batch).items():
            leaf_grad = {id(share): share.leaf.grad for share in step.shares}
            table = model.embeddings.features[name].table
            share, _, index = step[k]._use(name)
            rows |= {(table, i): leaf_grad[id(share)][r] for i, r in zip(ids.tolist(), index.tolist(), strict=True)}
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}, rows


def assert_same_step(got: Any, want: Any, atol: float = 1e-6) -> None:
    """Two results of `ranking_step` are equal up to rounding."""
    torch.testing.assert_close(got[0], want[0], atol=atol, rtol=1e-5)
    assert got[1].keys() == want[1].keys() and got[2].keys() == want[2].keys()
    for name in want[1]:
        torch.testing.assert_close(got[1][name], want[1][name], atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for key in want[2]:
        torch.testing.assert_close(got[2][key], want[2][key], atol=atol, rtol=1e-4)


@pytest.fixture
def ranking() -> Any:
    """Namespace of the helpers above; `ranking.fields` are those of a small configuration."""
    functions = (make_ranking_batch, take_ranking_users, pad_ranking, ranking_step, assert_same_step)
    return type("Ranking", (), {f.__name__: staticmethod(f) for f in functions} | {"fields": RANKING})


@pytest.fixture
def ranking_model() -> Iterator[Callable[..., Any]]:
    """Builds a small ranking model of a class, with an attached sparse optimizer."""
    kept = []

    def build(model_class: Any, config_class: Any, *, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
        torch.manual_seed(0)
        model = model_class(config_class(**RANKING | fields), embedding_backend="naive").to(dtype).train()
        kept.append(SparseSGD(model.embeddings, lr=0.1))
        return model

    yield build
    kept.clear()
