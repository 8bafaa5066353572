"""Lengths of the attention benchmark: of the public log where it is, else drawn to its percentiles; cut, not empty."""

import pytest
from grzoo.recipes.benchmark.attention import ml1m_lengths, zipf_lengths


@pytest.mark.parametrize("has_log", [True, False])
def test_lengths_of_ml1m_come_from_the_log_or_its_percentiles(has_log, tmp_path, monkeypatch):
    monkeypatch.setenv("GRZOO_DATA", str(tmp_path))
    if has_log:
        (tmp_path / "ml-1m").mkdir()
        lines = [f"{user} {item}" for user in range(1, 41) for item in range(user + 1)]
        (tmp_path / "ml-1m" / "ml-1m.txt").write_text("\n".join(lines))
    lengths, source = ml1m_lengths(16, 20)
    assert len(lengths) == 16 and min(lengths) >= 1 and max(lengths) == 20
    assert ("ml-1m.txt" in source) == has_log


def test_zipf_lengths_are_long_and_cut():
    lengths, _ = zipf_lengths(64, 512)
    assert len(lengths) == 64 and min(lengths) >= 64 and max(lengths) <= 512
