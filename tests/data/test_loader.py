"""Law 1: ranks, micro-batches and workers share a global batch out; resume continues the same sequence of batches."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from grzoo.data import (
    EvalLoader,
    EventDataset,
    GenRecCollator,
    GlobalBatchSampler,
    GlobalStep,
    RankingCollator,
    RecentFirst,
    SharedNegatives,
    SlidingWindows,
    StepLoader,
    StochasticLength,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st


@pytest.fixture
def dataset() -> EventDataset:
    return events()


def events() -> EventDataset:
    """50 rows of 1 to 29 events."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 30, 50)
    events = np.arange(lengths.sum())
    columns = {"item_id": events % 97, "timestamp": events, "like": (events % 2).astype(np.int8)}
    return EventDataset.from_arrays(columns, lengths, generator.integers(0, 9, 50))


def loader(dataset: EventDataset, batch: int = 16, policy: str = "recent", **options: Any) -> StepLoader:
    """A loader of one of POLICIES."""
    if policy == "ranking":
        ranking = RankingCollator(dataset, max_length=12, max_candidates=4, num_recent=3, tasks=["like"], seed=4)
        return StepLoader(dataset, GlobalBatchSampler(len(ranking.windows), batch, seed=2), ranking, **options)
    negatives = SharedNegatives(np.arange(97), np.ones(97), 6)
    windows = POLICIES[policy.removesuffix(" in blocks")]
    collator = GenRecCollator(dataset, max_length=12, seed=4, negatives=negatives, windows=windows)
    block_size = 5 if policy.endswith("in blocks") else None
    sampler = GlobalBatchSampler(len(collator.windows), batch, seed=2, block_size=block_size)
    return StepLoader(dataset, sampler, collator, **options)


POLICIES: dict[str, Any] = {
    "recent": RecentFirst,
    "sliding": SlidingWindows,
    "stochastic": partial(StochasticLength, alpha=1.3, seed=9),
}
EVERY_ORDER = [*POLICIES, *(f"{name} in blocks" for name in POLICIES), "ranking"]


def content(steps: list[GlobalStep]) -> Any:
    """What a global step holds, whatever its split: denominators, negatives and tokens sorted by key."""
    first = steps[0]
    if "candidate_ids" in first.micro_batches[0]:
        exposed = [
            row
            for step in steps
            for batch in step.micro_batches
            for row in zip(*(batch[n][0].tolist() for n in ("candidate_keys", "candidate_ids", "labels")), strict=True)
        ]
        return first.step, first.end, first.num_items_in_batch, sorted(exposed)
    tokens = [
        row
        for step in steps
        for batch in step.micro_batches
        for row in zip(
            *(batch[n][0].tolist() for n in ("token_keys", "input_ids", "labels", "label_mask")), strict=True
        )
    ]
    numbers = (first.step, first.epoch, first.cursor, first.end, first.num_users, first.num_tokens)
    return numbers, first.num_items_in_batch, first.micro_batches[0]["negative_ids"].tolist(), sorted(tokens)


@pytest.mark.parametrize("world", [2, 3, 8, 20])
@pytest.mark.parametrize(("budget", "fixed"), [(None, None), (30, None), (None, 3)])
def test_all_world_sizes_form_the_same_steps(
    dataset: EventDataset, world: int, budget: int | None, fixed: int | None
) -> None:
    alone = list(loader(dataset))
    options = {"max_tokens_per_device": budget, "micro_batches": fixed}
    ranks = [list(loader(dataset, world_size=world, rank=rank, **options)) for rank in range(world)]
    for whole, parts in zip(alone, zip(*ranks, strict=True), strict=True):
        parts = list(parts)
        assert content([whole]) == content(parts)
        assert len({len(part.micro_batches) for part in parts}) == 1
        for batch in (batch for part in parts for batch in part.micro_batches):
            assert budget is None or batch["input_ids"].numel() <= budget


def test_the_denominator_counts_trained_positions_of_all_ranks(dataset: EventDataset) -> None:
    for parts in zip(*(loader(dataset, world_size=3, rank=rank) for rank in range(3)), strict=True):
        trained = sum(int(batch["label_mask"].sum()) for part in parts for batch in part.micro_batches)
        assert {part.num_items_in_batch for part in parts} == {trained}
        assert parts[0].num_tokens == sum(b["input_ids"].numel() for part in parts for b in part.micro_batches)


def test_workers_change_nothing(dataset: EventDataset) -> None:
    plain, parallel = (list(loader(dataset, num_workers=n, max_tokens_per_device=60)) for n in (0, 2))
    assert len(plain) == len(parallel) == 4
    for one, other in zip(plain, parallel, strict=True):
        assert content([one]) == content([other]) and len(one.micro_batches) == len(other.micro_batches)
        for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
            assert a.keys() == b.keys()
            for name, value in a.items():
                if isinstance(value, torch.Tensor):
                    assert value.dtype == b[name].dtype and torch.equal(value, b[name])
                else:
                    assert value == b[name]


def test_loading_leaves_the_global_generator_alone(dataset: EventDataset) -> None:
    before = torch.get_rng_state()
    list(loader(dataset, num_workers=1))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5])
def test_resume_at_another_world_size_repeats_and_loses_nobody(dataset: EventDataset, stop: int) -> None:
    def run(steps: StepLoader, count: int) -> list[Any]:
        served: list[Any] = []
        while len(served) < count:
            for step in steps:
                served.append((step.step, step.epoch, step.cursor, step.num_items_in_batch))
                if len(served) == count:
                    break
        return served

    whole = run(loader(dataset), 8)
    before = loader(dataset, world_size=2, rank=1)
    first = run(before, stop)
    after = loader(dataset, world_size=3, rank=0, num_workers=0)
    after.load_state_dict(before.state_dict())
    assert first + run(after, 8 - stop) == whole


@pytest.mark.parametrize("policy", EVERY_ORDER)
@settings(max_examples=5)
@given(
    stops=st.lists(st.integers(0, 5), max_size=3),
    places=st.lists(st.tuples(st.integers(1, 5), st.sampled_from([0, 0, 0, 1, 2])), min_size=4, max_size=4),
    batch=st.integers(7, 30),
)
def test_any_stops_ranks_and_workers_give_the_uninterrupted_sequence(
    policy: str, stops: list[int], places: list[tuple[int, int]], batch: int
) -> None:
    dataset = events()
    total = 9
    reference = loader(dataset, batch, policy)
    whole = [content([step]) for _ in range(total) for step in reference][:total]
    served: list[Any] = []
    state: dict[str, Any] | None = None
    for (world, workers), steps in zip(places, [*stops, *[total] * 4], strict=False):
        first = loader(dataset, batch, policy, world_size=world, rank=0, num_workers=workers)
        ranks = [first, *(loader(dataset, batch, policy, world_size=world, rank=rank) for rank in range(1, world))]
        for one in ranks:
            if state is not None:
                one.load_state_dict(json.loads(json.dumps(state)))
        end = min(total, len(served) + steps)
        while len(served) < end:
            for parts in zip(*ranks, strict=True):
                served.append(content(list(parts)))
                if len(served) == end:
                    break
        (state,) = {json.dumps(one.state_dict()): one.state_dict() for one in ranks}.values()
    assert served == whole[: len(served)] and len(served) >= min(total, sum(stops))


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    batch=st.integers(1, 12),
    world=st.integers(1, 6),
    budget=st.one_of(st.none(), st.integers(12, 60)),
    policy=st.sampled_from([name for name in EVERY_ORDER if name != "ranking"]),
    epoch=st.integers(0, 3),
)
def test_an_epoch_trains_each_event_at_most_once_whatever_the_lengths(
    lengths: list[int], batch: int, world: int, budget: int | None, policy: str, epoch: int
) -> None:
    """Over all ranks: no event twice, every user with a target, equal counts, budgets kept."""
    assume(policy.startswith(("recent", "stochastic")) or max(lengths) > 1)
    items = np.arange(sum(lengths))
    dataset = EventDataset.from_arrays({"item_id": items}, lengths)
    ranks = []
    for rank in range(world):
        made = loader(dataset, batch, policy, world_size=world, rank=rank, max_tokens_per_device=budget)
        made._position = (epoch, 0)
        ranks.append(list(made))
    served: list[int] = []
    for parts in zip(*ranks, strict=True):
        assert len({(len(part.micro_batches), part.num_items_in_batch) for part in parts}) == 1
        for micro_batch in (micro_batch for part in parts for micro_batch in part.micro_batches):
            assert budget is None or micro_batch["input_ids"].numel() <= budget
            served += micro_batch["labels"][micro_batch["label_mask"]].tolist()
    assert len(served) == len(set(served))
    starts = np.cumsum(lengths) - lengths
    every = {int(s + e) for s, n in zip(starts, lengths, strict=True) for e in range(1, n)}
    last = {int(s + n - 1) for s, n in zip(starts, lengths, strict=True) if n > 1}
    assert last <= set(served) <= every and (not policy.startswith("sliding") or set(served) == every)


def test_more_ranks_than_users_get_empty_micro_batches() -> None:
    dataset = EventDataset.from_arrays({"item_id": np.arange(9)}, [4, 5])
    ranks = [list(loader(dataset, 8, world_size=5, rank=rank)) for rank in range(5)]
    sizes = sorted(step.micro_batches[0]["input_ids"].numel() for (step,) in ranks)
    assert sizes == [0, 0, 0, 3, 4] and {step.num_items_in_batch for (step,) in ranks} == {7}


def test_start_continues_inside_an_epoch(dataset: EventDataset) -> None:
    steps = loader(dataset, start=(3, 32))
    assert len(steps) == 2 and [(s.epoch, s.cursor, s.step) for s in steps] == [(3, 32, 14), (3, 48, 15)]
    assert steps.state_dict()["epoch"] == 4 and steps.state_dict()["cursor"] == 0


def test_a_batch_without_targets_is_empty_with_denominator_one() -> None:
    dataset = EventDataset.from_arrays({"item_id": [1, 2]}, [1, 1])
    (step,) = StepLoader(dataset, GlobalBatchSampler(2, 2), GenRecCollator(dataset, max_length=3))
    assert step.num_items_in_batch == 1 and step.num_users == 2
    assert step.micro_batches[0]["input_ids"].shape == (1, 0)


def test_cost_decides_the_balance(split: Callable[..., EventDataset]) -> None:
    dataset = split([13, 7, 7, 7, 7])
    collator = GenRecCollator(dataset, max_length=12)

    def users(cost: Any) -> list[int]:
        steps = StepLoader(dataset, GlobalBatchSampler(5, 5), collator, world_size=2, rank=0, cost=cost)
        return sorted(steps.step_at(0, 0).micro_batches[0]["cu_seq_lens_q"].diff().tolist())

    assert users(lambda n: n.astype(float) ** 2) in ([12], [6, 6, 6, 6])  # 144 and 4 x 36
    assert users(None) in ([6, 12], [6, 6, 6])


def test_bad_arguments(dataset: EventDataset, split: Callable[..., EventDataset]) -> None:
    with pytest.raises(ValueError, match="max_tokens_per_device=11 is below the longest sequence of 12 tokens"):
        loader(dataset, max_tokens_per_device=11)
    with pytest.raises(ValueError, match="rank 2 is not in a world of 2 ranks"):
        loader(dataset, world_size=2, rank=2)
    collator = GenRecCollator(split([3]), max_length=3)
    with pytest.raises(ValueError, match="another dataset"):
        StepLoader(dataset, GlobalBatchSampler(50, 4), collator)
    with pytest.raises(ValueError, match="orders 51 rows, the split has 50 samples"):
        StepLoader(dataset, GlobalBatchSampler(51, 4), GenRecCollator(dataset, max_length=3))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_ranks_every_target_once(dataset: EventDataset, world: int) -> None:
    tested = EventDataset.from_arrays(
        {"item_id": np.arange(dataset.num_events)}, dataset.lengths, np.maximum(dataset.lengths // 2, 1)
    )
    counts, labels = set(), []
    for rank in range(world):
        part = EvalLoader(tested, batch_size=8, max_length=6, world_size=world, rank=rank, max_tokens_per_device=20)
        batches = list(part)
        counts.add(len(batches))
        labels += [batch["labels"][batch["label_mask"]] for batch in batches]
        assert part.num_targets == int(np.maximum(tested.lengths - tested.target_from, 0).sum())
        assert len(list(part)) == len(batches), "an evaluation can be repeated"
    starts = np.cumsum(tested.lengths) - tested.lengths
    expected = [s + e for s, n, f in zip(starts, tested.lengths, tested.target_from, strict=True) for e in range(f, n)]
    assert len(counts) == 1
    assert sorted(torch.cat(labels).tolist()) == expected


def test_evaluation_of_an_empty_split(split: Callable[..., EventDataset]) -> None:
    empty = EvalLoader(split([1]), batch_size=4, max_length=3)
    assert len(empty) == 0 and list(empty) == []
