"""Law: the report says what share of labels is known and one, by split, and when they are known for a choice."""

import numpy as np
import pyarrow as pa
import pytest
from grzoo.data.prepare import EventLog, PrepareConfig, prepare_log

OPTIONS = {"split": "temporal", "validation": "last"}


def make_log(rating):
    """Ten users of twenty events each, in the order of time."""
    return EventLog(
        users=pa.array(np.tile(np.arange(10), 20)),
        items=pa.array(np.arange(200) % 7),
        timestamps=np.arange(200),
        features={"rating": np.asarray(rating, dtype=np.float32)},
    )


def report_of(rating, tmp_path):
    return prepare_log(make_log(rating), PrepareConfig(name="x", output_dir=tmp_path / "out", **OPTIONS, ranking=True))


def test_shares_are_those_of_the_targets_of_each_split(tmp_path):
    rating = np.where(np.arange(200) % 4 == 0, 2.0, 4.0)
    report = report_of(rating, tmp_path)
    test = report.statistics["labels"]["like"]["test"]
    assert test["known"] == 1 and test["ones"] == pytest.approx(np.mean(rating[-20:] >= 4), abs=1e-4)
    assert report.statistics["labels"]["love"]["test"] == {"known": 1, "ones": 0}
    assert "like: train " in "\n".join(report.lines()) and not any("known labels" in line for line in report.remarks)


def test_labels_that_are_known_for_high_ratings_are_remarked(tmp_path):
    rating = np.where(np.arange(200) % 2 == 0, 2.0, 4.0)
    chosen = np.where((np.arange(200) < 160) & (rating < 4), np.nan, rating)
    report = report_of(chosen, tmp_path)
    assert any("known labels of like are ones in" in line for line in report.remarks)
    assert report.statistics["labels"]["like"]["train"]["ones"] == 1


def test_labels_missing_at_random_are_told_and_not_remarked(tmp_path):
    rng = np.random.default_rng(0)
    rating = np.where(rng.random(200) < 0.3, np.nan, np.where(np.arange(200) % 20 < 10, 2.0, 4.0))
    report = report_of(rating, tmp_path)
    assert "that are known" in "\n".join(report.lines())
    assert not any("known labels" in line for line in report.remarks)


def test_a_log_without_ranking_has_no_labels(tmp_path):
    report = prepare_log(make_log(np.ones(200)), PrepareConfig(name="x", output_dir=tmp_path / "out", **OPTIONS))
    assert "labels" not in report.statistics


def test_complete_labels_are_not_remarked_whatever_their_shares(tmp_path):
    report = report_of(np.where(np.arange(200) < 160, 5.0, 1.0), tmp_path)
    assert report.statistics["labels"]["like"]["train"]["ones"] > report.statistics["labels"]["like"]["test"]["ones"]
    assert not any("known labels" in line for line in report.remarks)
