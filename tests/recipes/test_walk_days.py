"""Law: a period is ranked, then trained; every event is trained once; a resumed walk is the uninterrupted one."""

import json
from pathlib import Path

import numpy as np
import pytest
from grzoo.data import Catalogue, EventDataset, SlidingWindows
from grzoo.data.prepare import days, read_log
from grzoo.data.windows import trained_positions
from grzoo.recipes.runtime import Runtime, UserError
from grzoo.recipes.walk_days import main

MICRO = (
    "--data.num_users 60 --data.num_items 40 --data.mean_length 8 --max_length 12 --windows sliding "
    "--global_batch_size 20 --num_negatives 8 --model.hidden_size 8 --model.attention_head_dim 4 "
    "--model.linear_head_dim 4 --model.num_hidden_layers 1 --logging_steps 1 --use_cpu --backend naive "
    "--num_train_epochs 1 --top_k 5 10"
).split()


def walk(folder: Path, *arguments: object) -> None:
    main(Runtime(0, 0, 1, 1), [*MICRO, "--output_dir", str(folder), *map(str, arguments)])


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("walk") / "out"
    walk(folder, "--walk_periods", 4)
    return folder


def test_each_period_is_ranked_and_then_trained(walked: Path) -> None:
    periods = [line for line in lines(walked) if "period" in line]
    assert [line["period"] for line in periods] == ["2020-10", "2020-11", "2020-12", "2021-01"]
    kinds = ["period" if "period" in line else "train" for line in lines(walked)]
    assert kinds == ["train"] * 2 + ["period", "train"] * 4, "two steps of what came before, then a step per period"
    for number, line in enumerate(periods):
        dataset = EventDataset.from_folder(walked / "dataset", f"day_{number + 1:05d}")
        targets = np.maximum(dataset.lengths - dataset.target_from, 0).sum()
        assert line["period/targets"] == targets > 0 and 0 <= line["eval/hr@10"] <= 1
    assert len((walked / "periods.csv").read_text().splitlines()) == 5
    assert {"report.md", "periods.png", "export", "dataset"} <= {path.name for path in walked.iterdir()}
    report = (walked / "report.md").read_text()
    assert "| 2021-01 |" in report and "popularity ndcg@10" in report


def test_every_event_with_context_is_trained_once(walked: Path) -> None:
    log = read_log("synthetic", num_users=60, num_items=40, mean_length=8)
    trained: list[tuple[int, int]] = []
    for name in ("train", *days(walked / "dataset")):
        dataset = EventDataset.from_folder(walked / "dataset", name)
        windows = SlidingWindows(dataset, 12)
        samples = windows.select(np.arange(len(windows)))
        sample, event = trained_positions(samples)
        users = np.array(dataset.user_ids().to_pylist())
        trained += zip(users[samples.rows[sample]].tolist(), event.tolist(), strict=True)
    ends = log.timestamps < np.datetime64("2021-02", "s").astype(np.int64)
    users, counts = np.unique(log.users.to_numpy()[ends], return_counts=True)
    assert sorted(trained) == [(u, e) for u, n in zip(users.tolist(), counts, strict=True) for e in range(1, n)]


def test_popularity_is_that_of_the_past(walked: Path) -> None:
    """HR@5 of the first period by brute force: the most frequent items of the events before it, seen ones left out."""
    train = EventDataset.from_folder(walked / "dataset", "train")
    counts = np.bincount(train.rows(np.arange(len(train)))["item_id"], minlength=200)
    day, catalogue = (
        EventDataset.from_folder(walked / "dataset", "day_00001"),
        Catalogue.from_folder(walked / "dataset"),
    )
    grown = [line["period/catalogue"] for line in lines(walked) if "period" in line]
    appeared = {
        item
        for name in days(walked / "dataset")[:1]
        for item in EventDataset.from_folder(walked / "dataset", name).rows(np.arange(len(day)))["item_id"].tolist()
    }
    known = sorted(appeared | set(np.flatnonzero(counts).tolist()), key=lambda item: (-counts[item], item))
    assert grown[0] == len(known) <= len(catalogue)
    hits = []
    for row in range(len(day)):
        items = day.rows([row])["item_id"].tolist()
        for event in range(int(day.target_from[row]), len(items)):
            seen = set(items[:event]) - {items[event]}
            hits.append(items[event] in [item for item in known if item not in seen][:5])
    first = next(line for line in lines(walked) if "period" in line)
    assert first["popularity/hr@5"] == pytest.approx(np.mean(hits), abs=1e-6)


def test_a_resumed_walk_is_the_uninterrupted_one(walked: Path, tmp_path: Path) -> None:
    walk(tmp_path / "out", "--walk_periods", 2)
    walk(tmp_path / "out", "--walk_periods", 4, "--resume_from_checkpoint", "last")
    volatile = ("seconds", "per_second", "bytes")
    for one, other in zip(lines(walked), lines(tmp_path / "out"), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if not any(part in name for part in volatile):
                assert other[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name


def test_an_older_checkpoint_is_not_resumed_with_later_periods(tmp_path: Path) -> None:
    """Its model would be ranked and trained among items of the future. The metrics of the walk are left as they are."""
    out = tmp_path / "out"
    walk(out, "--walk_periods", 2, "--save_total_limit", 0)
    older = out / "checkpoint-2"
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3", "checkpoint-4"}
    before = lines(out)
    later = "dataset holds later periods than the checkpoint that is resumed.*walk anew"
    with pytest.raises(UserError, match=later):
        walk(out, "--walk_periods", 2, "--resume_from_checkpoint", older)
    assert lines(out) == before
    (out / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=later):
        walk(out, "--walk_periods", 2, "--resume_from_checkpoint", older)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr_scheduler_type", "cosine"], "lr_scheduler_type cosine needs the end of the run"),
        (["--negative_sampling", "all"], "needs a fixed catalogue"),
        (["--max_steps", "3"], "are for train.py"),
        (["--load_best_model_at_end", "true"], "--load_best_model_at_end has no effect on a walk"),
        (["--early_stopping_patience", "2"], "--early_stopping_patience has no effect on a walk"),
        (["--metric_for_best_model", "mrr"], "--metric_for_best_model has no effect on a walk"),
        (["--calibrate_cost", "true"], "--calibrate_cost has no effect on a walk"),
        (["--data.bogus", "1"], "unknown data option 'bogus'"),
        (["--data.split", "temporal"], "data.split has no effect on a walk"),
        (["--model.model_type", "mtgr"], "walks retrieval models"),
        (["--walk_from", "1999-01-01"], "leaves no event before"),
    ],
)
def test_what_a_walk_cannot_follow_is_named(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        walk(tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()
