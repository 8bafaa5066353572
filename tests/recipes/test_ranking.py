"""Law: one command trains, evaluates and exports a ranking model; the export and the checkpoint score the same."""

import json

import numpy as np
import pytest
import torch
from grzoo.data import EventDataset
from grzoo.models import AutoModelForRanking
from grzoo.recipes.evaluate import main as evaluate
from grzoo.recipes.ranking import ranking_collator
from grzoo.recipes.runtime import Runtime, UserError
from grzoo.recipes.train import main as train

MICRO = (
    "--dataset ml-100k --source raw --dataset_dir data --data.ranking true --data.split temporal --max_length 30 "
    "--max_candidates 10 --num_recent 5 --global_batch_size 8 --model.model_type mtgr --model.hidden_size 8 "
    "--model.embedding_dim 4 --logging_steps 2 --use_cpu --backend naive --save_strategy no"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A raw log in the form of ml-100k, small."""
    folder = tmp_path_factory.mktemp("ranking")
    rng = np.random.default_rng(0)
    (folder / "raw").mkdir()
    lines = [f"{rng.integers(1, 21)}\t{rng.integers(1, 40)}\t{rng.integers(1, 6)}\t{1000 + t // 2}" for t in range(600)]
    (folder / "raw" / "u.data").write_text("\n".join(lines) + "\n")
    users = [f"{u}|{20 + u}|{'MF'[u % 2]}|writer|8571{u % 10}" for u in range(1, 21)]
    (folder / "raw" / "u.user").write_text("\n".join(users) + "\n")
    return folder


def run_here(main, *arguments):
    main(Runtime(0, 0, 1, 1), [str(argument) for argument in arguments])


def test_one_command_trains_evaluates_and_exports(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    run_here(train, *MICRO, "--output_dir", "out", "--max_steps", 4)
    lines = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    written = {key for line in lines for key in line}
    assert {"eval/auc", "eval/gauc", "eval/logloss", "eval/ne", "eval/love/auc", "popularity/auc"} <= written
    assert {"config.json", "model.safetensors", "README.md", "schema.json"} <= {
        p.name for p in (folder / "out/export").iterdir()
    }
    assert "AutoModelForRanking" in (folder / "out/export/README.md").read_text()
    assert AutoModelForRanking.from_pretrained("out/export").config.tasks == ["like", "love"]
    options = "--dataset_dir data --use_cpu --output_file metrics.json --max_candidates 10".split()
    run_here(evaluate, "--model", "out/export", *options)
    found = json.loads((folder / "metrics.json").read_text())["eval"]
    assert set(found) == {f"{t}{m}" for t in ("", "love/") for m in ("auc", "gauc", "logloss", "ne")}
    config = AutoModelForRanking.from_pretrained("out/export").config
    assert config.num_recent == 5
    tested = {name: value for line in lines for name, value in line.items()}  # the last evaluation is the export's
    assert found == pytest.approx({name: tested[f"eval/{name}"] for name in found}, abs=1e-5)
    with pytest.raises(UserError, match=r"model.cross_features names \['clicks'\]"):
        run_here(train, *MICRO, "--output_dir", "x", "--model.cross_features", "[clicks]")


def test_a_folder_without_ranking_columns_is_named(folder, monkeypatch):
    monkeypatch.chdir(folder)
    options = [*MICRO, "--dataset_dir", "plain", "--data.ranking", "false", "--output_dir", "x"]
    with pytest.raises(UserError, match="data.ranking to true"):
        run_here(train, *options)


def test_the_best_model_is_chosen_on_the_validation_part(folder, monkeypatch):
    """By AUC; a log without a validation part has nothing to choose by."""
    monkeypatch.chdir(folder)
    choice = (
        "--load_best_model_at_end true --save_strategy best --early_stopping_patience 1 --eval_strategy steps".split()
    )
    with pytest.raises(UserError, match="validation last"):
        run_here(train, *MICRO, *choice, "--output_dir", "x")
    options = [*MICRO, *choice, "--data.validation", "last", "--dataset_dir", "validated", "--eval_steps", "1"]
    run_here(train, *options, "--output_dir", "best", "--max_steps", 4, "--learning_rate", 0.1)
    lines = [json.loads(line) for line in (folder / "best/metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["eval/auc"] for line in lines if "eval/auc" in line}
    assert lines[-1]["best/auc"] == max(found.values()) == found[lines[-1]["best/step"]]
    assert "| chosen by | validation auc" in (folder / "best/report.md").read_text()


@pytest.mark.parametrize("name", ["mtgr_ml1m", "mtgr_ml100k", "dlrm_hstu_ml100k", "dlrm_ml100k"])
def test_shipped_configurations_train(name, folder, monkeypatch):
    """At their own sizes, on a few ratings: each takes steps, is evaluated and exported."""
    monkeypatch.chdir(folder)
    small = (
        "--dataset ml-100k --source raw --dataset_dir validated --global_batch_size 8 --max_steps 2 --use_cpu".split()
    )
    run_here(train, "--config", name, *small, "--backend", "naive", "--output_dir", name)
    last = json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < last["test/auc"] < 1 and 0 < last["test/love/ne"] and last["best/step"] == 2
    assert AutoModelForRanking.from_pretrained(f"{name}/export").config.model_type == name.rpartition("_")[0]


def test_an_export_is_scored_as_it_was_evaluated(folder, monkeypatch):
    """Serving knows no `num_recent` but that of the export; one without it says so and needs --num_recent."""
    monkeypatch.chdir(folder)
    run_here(train, *MICRO, "--output_dir", "served", "--max_steps", 4, "--learning_rate", 0.1)
    model = AutoModelForRanking.from_pretrained("served/export")
    collator = ranking_collator(EventDataset.from_folder(folder / "data", "test"), model.config, max_candidates=1)
    checked = 0
    for sample in range(len(collator.windows)):
        batch = collator([sample])
        # What happens in the candidate's second has no order outside the log.
        if not (batch["timestamps"] == batch["candidate_timestamps"]).any() and len(batch["timestamps"][0]) > 5:
            served = {name: value for name, value in batch.items() if name != "num_recent"}
            assert torch.equal(model.score(**served), model.score(**batch))
            checked += not torch.equal(
                model.score(**served), model.score(**{**batch, "num_recent": torch.tensor([30])})
            )
    assert checked
    config = json.loads((folder / "served/export/config.json").read_text())
    del config["num_recent"]
    (folder / "served/export/config.json").write_text(json.dumps(config))
    options = "--model served/export --dataset_dir data --use_cpu --max_candidates 10".split()
    with pytest.raises(UserError, match="mtgr model has no num_recent.*--num_recent"):
        run_here(evaluate, *options)
    run_here(evaluate, *options, "--num_recent", 5)
