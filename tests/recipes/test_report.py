"""Law: metrics.jsonl alone makes the report, survives a kill in mid-line and a resume."""

import json

import pytest
from grzoo.recipes.metrics_log import MetricsLog, read_metrics
from grzoo.recipes.report import metrics_table, write_report


def test_lines_survive_a_kill_and_a_resume(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write(step, step / 10, {"train/loss": 1.0 / step, "bad": float("nan")})
    with log.path.open("a") as file:
        file.write('{"step": 4, "tra')
    assert [line["step"] for line in read_metrics(log.path)] == [1, 2, 3]
    resumed = MetricsLog(tmp_path)
    resumed.start_at(2)
    resumed.write(3, 0.3, {"train/loss": 9.0})
    assert [line["train/loss"] for line in read_metrics(log.path)] == [1.0, 0.5, 9.0]
    assert read_metrics(log.path)[0]["bad"] is None
    resumed.start_at(0)
    assert read_metrics(log.path) == []


def test_other_ranks_write_nothing(tmp_path):
    log = MetricsLog(None)
    log.start_at(0)
    log.write(1, 0.0, {"x": 1})
    assert list(tmp_path.iterdir()) == []


def test_report_holds_tables_and_plots(tmp_path):
    pytest.importorskip("matplotlib")
    log = MetricsLog(tmp_path)
    log.write(0, 0.0, {"popularity/ndcg@10": 0.01, "popularity/hr@10": 0.02})
    for step in (1, 2):
        log.write(step, step, {"train/loss": 2.0, "train/tokens_per_second": 9.0, "train/seconds_forward": 0.5 * step})
        log.write(step, step, {"eval/ndcg@10": 0.1 * step, "eval/hr@10": 0.2 * step})
    text = write_report(tmp_path, title="A run", conditions={"seed": 1}).read_text()
    assert "| 2 | 2 | 0.2000 | 0.4000 |" in text
    assert "| popularity |  | 0.0100 | 0.0200 |" in text
    assert "| forward | 1000.00 |" in text
    for name in ("loss.png", "throughput.png", "ranking.png"):
        assert (tmp_path / name).stat().st_size > 1000
        assert name in text


def test_report_of_an_empty_run(tmp_path):
    assert "# Nothing" in write_report(tmp_path, title="Nothing", conditions={}).read_text()


def test_metrics_table_shows_the_baseline_beside_the_model():
    lines = metrics_table({"ndcg@10": 0.5, "loss": 1.0}, {"ndcg@10": 0.25}).splitlines()
    assert lines[0].split() == ["metric", "model", "popularity"]
    assert lines[1].split() == ["ndcg@10", "0.5000", "0.2500"]
    assert lines[2].split() == ["loss", "1.0000"]
    assert json.dumps(lines)
