"""Law: a row of results is read from a finished run, never typed; a run is recorded once."""

import csv
import json

import pytest
from grzoo.recipes.benchmark import record
from grzoo.recipes.provenance import device
from grzoo.recipes.runtime import Runtime, UserError
from grzoo.recipes.train import main as train

MICRO = (
    "--dataset_dir data --data.num_users 60 --data.num_items 40 --data.mean_length 8 --data.validation last "
    "--max_length 12 --global_batch_size 20 --num_negatives 8 --model.hidden_size 8 --model.attention_head_dim 4 "
    "--model.linear_head_dim 4 --model.num_hidden_layers 1 --logging_steps 1 --use_cpu --backend naive --seed 7 "
    "--output_dir out --save_strategy best --load_best_model_at_end true --exclude_seen false --num_train_epochs 2"
).split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(Runtime(0, 0, 1, 1), MICRO)
    return folder / "out"


def test_the_row_is_what_the_run_wrote(finished):
    row = record.row_of(finished)
    assert set(row) == set(record.COLUMNS)
    last = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    assert float(row["ndcg@10"]) == pytest.approx(last["test/ndcg@10"], abs=5e-5)
    assert float(row["popularity_hr@10"]) == pytest.approx(last["test/popularity/hr@10"], abs=5e-5)
    assert (row["model"], row["dataset"], row["seed"], row["ranks"], row["epochs"]) == ("hstu", "synthetic", 7, 1, "2")
    assert row["protocol"] == "leave-one-out, validation event, full ranking, seen kept in"
    assert (row["exclude_seen"], row["loss"]) == ("false", "sampled softmax, 8 uniform negatives")
    assert float(row["best_epoch"]) == last["best/epoch"]
    assert "global_batch_size 20" in row["changes"] and "load_best_model_at_end true" in row["changes"]
    assert "output_dir" not in row["changes"] and "seed" not in row["changes"]
    assert row["device"] == device() and row["torch"] and row["deepspeed"] and row["commit"]
    assert 0 <= row["seconds"] < 60


def test_a_run_is_recorded_once(finished, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    for new in (1, 0):
        record.main([str(finished), "--results", str(path)])
        assert f"{new} of 1 runs were new" in capsys.readouterr().out
    with open(path, newline="") as file:
        assert [row["model"] for row in csv.DictReader(file)] == ["hstu"]


def test_a_report_without_its_commit_needs_it_told(finished, monkeypatch):
    conditions = record._conditions(finished / "report.md")
    conditions = {name: text for name, text in conditions.items() if name != "commit"} | {"machine": "x86_64, 2 cores"}
    monkeypatch.setattr(record, "_conditions", lambda report: conditions)
    with pytest.raises(UserError, match="--commit"):
        record.row_of(finished)
    row = record.row_of(finished, commit="abc")
    assert (row["commit"], row["device"]) == ("abc", device())


def test_an_unfinished_run_is_refused(finished, tmp_path):
    with pytest.raises(UserError, match="has no metrics.jsonl"):
        record.row_of(tmp_path)
    with pytest.raises(SystemExit, match="error: .* is no finished run"):
        record.main([str(tmp_path)])


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"negative_sampling": "uniform", "num_negatives": 128}, "sampled softmax, 128 uniform negatives"),
        ({"loss": "softmax", "negative_sampling": "all", "num_negatives": 9}, "full softmax"),
        ({"loss": "gbce", "negative_sampling": "uniform", "num_negatives": 1}, "gBCE, 1 uniform negative"),
    ],
)
def test_losses_have_names(config, text):
    assert record.loss_of(config) == text
