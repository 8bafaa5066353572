"""Law: a ranking sample holds every exposure once, and its long-term part precedes all its candidates."""

import numpy as np
import pytest
import torch
from grzoo.data import EventDataset, ExposureWindows, GlobalBatchSampler, RankingCollator, StepLoader

LENGTHS, TARGETS = [30, 1, 7, 0, 55], [1, 1, 3, 0, 20]


@pytest.fixture
def dataset():
    rng = np.random.default_rng(0)
    times = np.concatenate([np.sort(rng.integers(0, n, n)) for n in LENGTHS])
    total = sum(LENGTHS)
    columns = {
        "item_id": rng.integers(-5, 50, total),
        "timestamp": times,
        "age": np.repeat(np.arange(5), LENGTHS),
        "action": rng.integers(0, 5, total),
        "genres": rng.integers(0, 8, total),
        "mean": rng.normal(size=total).astype(np.float32),
        "like": rng.integers(-1, 2, total).astype(np.int8),
        "love": rng.integers(0, 2, total).astype(np.int8),
    }
    return EventDataset.from_arrays(columns, LENGTHS, TARGETS)


def collator_of(dataset, **options):
    fields = dict(user_features=["age"], event_features=["action"], item_features=["genres"], cross_features=["mean"])
    return RankingCollator(
        dataset, tasks=["like", "love"], **{"max_length": 30, "max_candidates": 8, "num_recent": 4, **fields, **options}
    )


def test_every_exposure_is_a_candidate_once(dataset):
    windows = collator_of(dataset).windows
    samples = windows.select(np.arange(len(windows)))
    seen = sorted(
        (r, e) for r, a, b in zip(samples.rows, samples.target_from, samples.end, strict=True) for e in range(a, b)
    )
    assert seen == [(r, e) for r, n in enumerate(LENGTHS) for e in range(TARGETS[r], n)]
    assert samples.num_labels.max() == 8 and samples.num_history.max() == 30
    assert (samples.num_inputs == 1 + samples.num_history + samples.num_labels).all()


def test_the_long_term_part_precedes_all_candidates(dataset):
    batch = collator_of(dataset)(np.arange(10))
    history, exposed = batch["cu_seq_lens_q"].tolist(), batch["cu_seq_lens_candidates"].tolist()
    for user in range(len(history) - 1):
        static_end = history[user + 1] - int(batch["num_recent"][user])
        static = batch["timestamps"][0, history[user] : static_end]
        times = batch["candidate_timestamps"][0, exposed[user] : exposed[user + 1]]
        assert not len(static) or static.max() < times.min()
        assert int(batch["num_recent"][user]) <= history[user + 1] - history[user]


def test_fields_are_those_of_the_events(dataset):
    collator = collator_of(dataset)
    batch, samples = collator([3]), collator.windows.select([3])
    row, a, b, begin = (int(x[0]) for x in (samples.rows, samples.target_from, samples.end, samples.begin))
    rows = dataset.rows([row])
    assert batch["candidate_ids"][0].tolist() == rows["item_id"][a:b].tolist()
    assert batch["input_ids"][0].tolist() == rows["item_id"][begin : b - 1].tolist()
    assert batch["cross_features"][0, :, 0].tolist() == rows["mean"][a:b].tolist()
    assert batch["labels"][0, :, 0].tolist() == rows["like"][a:b].tolist()
    assert torch.equal(batch["label_mask"], batch["labels"] >= 0)
    assert batch["user_features"].tolist() == [[int(rows["age"][0])]]


@pytest.mark.parametrize("world", [1, 3])
def test_a_step_does_not_depend_on_ranks_or_workers(dataset, world):
    """Law 1: the same candidates with the same keys, and one denominator per task, for any split of the work."""

    def steps(world, workers=0, **options):
        collator = collator_of(dataset, seed=3)
        sampler = GlobalBatchSampler(len(collator.windows), 6, seed=3)
        of_rank = []
        for rank in range(world):
            loader = StepLoader(dataset, sampler, collator, world_size=world, rank=rank, num_workers=workers, **options)
            of_rank.append([(s.num_items_in_batch, [dict(b) for b in s.micro_batches]) for s in loader])
        found = []
        for step in zip(*of_rank, strict=True):
            exposed = [
                tuple(map(int, x))
                for _, batches in step
                for b in batches
                for x in zip(b["candidate_ids"][0], b["candidate_keys"][0], b["candidate_timestamps"][0], strict=True)
            ]
            found.append((step[0][0], sorted(exposed)))
            assert len({items for items, _ in step}) == 1
        return found

    want = steps(1)
    assert steps(world, max_tokens_per_device=60) == want
    if world == 1:
        assert steps(1, workers=1) == want
    assert all(len(items) == 2 and min(items) >= 1 for items, _ in want)


def test_bad_input_is_named(dataset):
    with pytest.raises(ValueError, match=r"no columns \['click'\].*--ranking"):
        RankingCollator(dataset, max_length=60, tasks=["click"])
    with pytest.raises(ValueError, match="max_length=10 holds neither"):
        collator_of(dataset, max_length=10)
    without = EventDataset.from_arrays({"item_id": np.arange(4)}, [4])
    with pytest.raises(ValueError, match="ranking needs timestamps"):
        ExposureWindows(without, 100)
    sampler = GlobalBatchSampler(len(collator_of(dataset).windows), 6)
    with pytest.raises(ValueError, match="max_tokens_per_device=20 is below the longest"):
        collator = collator_of(dataset)
        StepLoader(dataset, sampler, collator, max_tokens_per_device=20)
