"""Law: what a ranking model reads of an event comes from strictly earlier events of the log."""

import numpy as np
import pyarrow as pa
import pytest
from grzoo.data import DatasetSchema, EventDataset
from grzoo.data.prepare import EventLog, PrepareConfig, prepare, prepare_log
from grzoo.data.prepare.ranking import CROSS_FEATURES, add_ranking_columns, past_sums


def make_log(seed=0, events=300):
    rng = np.random.default_rng(seed)
    genres = pa.array([["a"], ["a", "b"], None, ["c"], ["b", "c"], [], ["c"], ["a"]])
    return EventLog(
        users=pa.array(rng.integers(0, 12, events)),
        items=pa.array(rng.integers(0, 9, events)),  # item 8 is unknown to the metadata
        timestamps=rng.integers(0, 60, events),
        features={"rating": np.where(rng.random(events) < 0.1, np.nan, rng.integers(1, 6, events)).astype(np.float32)},
        item_metadata=pa.table({"item_id": pa.array(range(8)), "genres": genres}),
        user_metadata=pa.table({"user_id": pa.array(range(1, 12)), "gender": ["F", "M"] * 5 + [None]}),
    )


def test_past_sums_equal_brute_force():
    rng = np.random.default_rng(1)
    groups, times, values = rng.integers(0, 4, 80), rng.integers(0, 9, 80), rng.normal(size=(80, 2))
    want = np.array([values[(groups == g) & (times < t)].sum(0) for g, t in zip(groups, times, strict=True)])
    np.testing.assert_allclose(past_sums(groups, times, values), want, atol=1e-12)
    assert past_sums(groups[:0], times[:0], values[:0]).shape == (0, 2)


def test_the_future_changes_no_feature():
    """Other items, ratings and users from time 30 on leave every column of the events up to then as it was."""
    log, other = make_log(0), make_log(7)
    future = log.timestamps > 30
    mixed = make_log(0)
    mixed.users = pa.array(np.where(future, other.users.to_numpy(), log.users.to_numpy()))
    mixed.items = pa.array(np.where(future, other.items.to_numpy(), log.items.to_numpy()))
    rating = np.where(future, other.features["rating"], log.features["rating"])
    mixed.features = {"rating": rating.astype(np.float32)}
    want, got = add_ranking_columns(log), add_ranking_columns(mixed)
    differ = 0
    for name in CROSS_FEATURES:
        np.testing.assert_array_equal(got.features[name][~future], want.features[name][~future], err_msg=name)
        differ += (got.features[name] != want.features[name]).sum()
    assert differ > 0
    assert all(np.isfinite(want.features[name]).all() for name in CROSS_FEATURES)


def test_an_event_does_not_see_its_own_second():
    log = make_log(0)
    want = add_ranking_columns(log).features
    at = int(np.argmax(np.bincount(log.timestamps)))
    same = log.timestamps == at
    log.features = {"rating": np.where(same, 1.0, log.features["rating"]).astype(np.float32)}
    got = add_ranking_columns(log).features
    for name in CROSS_FEATURES:
        np.testing.assert_array_equal(got[name][same], want[name][same])


def test_features_by_hand():
    log = EventLog(
        users=pa.array([1, 1, 1, 2]),
        items=pa.array([0, 1, 1, 1]),
        timestamps=np.array([10, 20, 30, 20]),
        features={"rating": np.array([5, 2, np.nan, 4], dtype=np.float32)},
        item_metadata=pa.table({"item_id": [0, 1], "genres": [["x"], ["x", "y"]]}),
        user_metadata=pa.table({"user_id": [1], "gender": ["F"]}),
    )
    got = add_ranking_columns(log)
    features = got.features
    assert features["like"].tolist() == [1, 0, -1, 1] and features["love"].tolist() == [1, 0, -1, 0]
    assert features["action"].tolist() == [11, 5, 1, 9] and features["genres"].tolist() == [1, 3, 3, 3]
    assert features["gender"].tolist() == [1, 1, 1, 0]
    third = {name: float(features[name][2]) for name in CROSS_FEATURES}
    assert third["user_events"] == pytest.approx(np.log(3)) and third["item_events"] == pytest.approx(np.log(3))
    assert third["user_mean"] == pytest.approx((5 + 2 - 7) / 7) and third["item_mean"] == pytest.approx((2 + 4 - 7) / 7)
    assert third["user_genre_events"] == pytest.approx(np.log(4))  # x twice, y once
    assert third["user_genre_mean"] == pytest.approx((5 + 2 + 2 - 3 * 3.5) / 8)
    assert got.ranking["item_features"] == {"genres": ["x", "y"]} and got.ranking["user_features"] == {"gender": ["F"]}


def test_folder_carries_what_ranking_reads(tmp_path):
    config = PrepareConfig(name="event_log", output_dir=str(tmp_path / "d"), split="temporal", ranking=True)
    prepare_log(make_log(), config)
    schema, train = DatasetSchema.load(tmp_path / "d"), EventDataset.from_folder(tmp_path / "d", "train")
    assert list(schema.ranking["tasks"]) == ["like", "love"] and set(CROSS_FEATURES) <= set(train.feature_names)


def test_logs_without_ratings_or_times_are_refused(tmp_path):
    with pytest.raises(ValueError, match="ranking needs a log with timestamps and ratings"):
        prepare("synthetic", tmp_path / "d", ranking=True)


def test_profiles_of_movielens(tmp_path):
    (tmp_path / "u.data").write_text("7\t1\t5\t10\n8\t1\t3\t11\n7\t2\t1\t12\n8\t2\t4\t13\n")
    (tmp_path / "u.user").write_text("7|24|M|writer|85711\n8|53|F|other|T8H1N\n")
    prepare("ml-100k", tmp_path / "d", source=tmp_path, ranking=True)
    about = DatasetSchema.load(tmp_path / "d").ranking["user_features"]
    assert about["age"] == [18, 50] and about["zip"] == ["8", "T"] and about["gender"] == ["F", "M"]
    rows = EventDataset.from_folder(tmp_path / "d", "train").rows([0, 1])
    assert rows["age"].tolist() == [1, 2] and rows["gender"].tolist() == [2, 1]
