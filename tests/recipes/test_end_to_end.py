"""Law: one command trains, evaluates, exports, recommends; a resumed run is the uninterrupted one; mistakes exit by 2.

Micro sizes; what needs no process of its own runs as one rank in this one.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from grzoo.data import Catalogue, EventDataset
from grzoo.data.prepare import prepare
from grzoo.models import AutoModelForRetrieval
from grzoo.recipes.arguments import DataArguments, EvaluationArguments
from grzoo.recipes.dataset_folder import find_or_prepare, load
from grzoo.recipes.evaluate import main as evaluate
from grzoo.recipes.evaluation import Evaluator
from grzoo.recipes.export import main as export
from grzoo.recipes.known_items import strangers
from grzoo.recipes.metrics import ranking_metrics
from grzoo.recipes.recommend import main as recommend
from grzoo.recipes.runtime import Runtime, UserError
from grzoo.recipes.train import main as train
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
ZERO2 = ROOT / "ds_configs" / "zero2.json"
MICRO = (
    "--data.num_users 60 --data.num_items 40 --data.mean_length 8 --data.validation last --max_length 12 "
    "--global_batch_size 20 --num_negatives 8 --model.hidden_size 8 --model.attention_head_dim 4 "
    "--model.linear_head_dim 4 --model.num_hidden_layers 1 --logging_steps 2 --use_cpu --backend naive"
).split()


LAUNCHER_VARIABLES = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE LOCAL_SIZE MASTER_ADDR MASTER_PORT".split()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(name, *arguments, expect=0, ranks=1, cwd):
    """Runs a recipe in processes of its own; returns its stdout, or its stderr when it is expected to fail."""
    launcher = [sys.executable, "-u"]
    if ranks > 1:
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--master_port", free_port()]
        launcher += ["--num_accelerators", str(ranks)]
    process = subprocess.Popen(
        [*launcher, str(ROOT / "recipes" / f"{name}.py"), *map(str, arguments)],
        cwd=cwd,
        env={key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == expect, f"exit code {process.returncode}\n{out}\n{err}"
    return out if expect == 0 else err


def run_here(main, *arguments):
    """Runs a recipe as one rank in this process; the process group that it opens stays open."""
    main(Runtime(0, 0, 1, 1), [str(argument) for argument in arguments])


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One run on two ranks through the launcher: 7 steps, checkpoints every 3."""
    folder = tmp_path_factory.mktemp("run")
    options = "--output_dir out --dataset_dir data --max_steps 7 --save_strategy steps --save_steps 3".split()
    options += ["--model.table_policies", "{items: {track_use: true}}"]
    output = launch("train", *MICRO, *options, "--top_k", 5, 10, "--deepspeed_config", ZERO2, ranks=2, cwd=folder)
    return folder, output


@pytest.fixture
def inside(trained, monkeypatch):
    """The folder of that run, as the working folder."""
    monkeypatch.chdir(trained[0])
    return trained[0]


def test_training_says_what_it_chose_and_leaves_everything(trained):
    folder, output = trained
    for part in ("2 on CPU", "ZeRO stage 2", "fp32", "naive", "20 users", "8 uniform negatives", "dense parameters"):
        assert part in output
    assert output.count("user 0 gets") == 1
    out = folder / "out"
    files = {"metrics.jsonl", "report.md", "recommendations.json", "checkpoint-6", "checkpoint-7"}
    assert files <= set(os.listdir(out))
    assert {"README.md", "config.json", "model.safetensors", "items.parquet"} <= set(os.listdir(out / "export"))
    assert not [path for path in out.rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]
    written = {key for line in lines(out) for key in line}
    assert {"step", "epoch", "train/loss", "train/tokens_per_second", "eval/ndcg@10", "popularity/hr@5"} <= written
    phases = ("data", "prepare", "fetch", "forward", "backward", "reduce", "dense_step", "sparse_step")
    assert {f"train/seconds_{phase}" for phase in phases} <= written


def test_a_new_process_recommends_the_same(trained):
    folder, output = trained
    again = launch("recommend", "--model", "out/export", "--expect", "out/recommendations.json", cwd=folder)
    assert "identical" in again
    table = again[: again.index("identical")].strip()
    assert table in output
    assert "Item 0" in table  # titles


def test_recommendations_for_a_history_and_for_a_user(inside, capsys):
    expected = json.loads((inside / "out/recommendations.json").read_text())
    run_here(recommend, "--model", "out/export", "--history", expected["history"][0], "--top_k", 3)
    assert len(capsys.readouterr().out.splitlines()) == 4
    run_here(recommend, "--model", "out/export", "--user", 0, "--dataset_dir", "data")
    assert expected["recommendations"][0]["title"] in capsys.readouterr().out
    expected["recommendations"][0]["item_id"] += 1
    (inside / "wrong.json").write_text(json.dumps(expected))
    with pytest.raises(SystemExit) as stop:
        run_here(recommend, "--model", "out/export", "--expect", "wrong.json")
    assert stop.value.code == 1


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--history", "x,y"], "'x' is not an integer"),
        (["--history", "987654321"], "987654321"),
        (["--history", ","], "empty"),
        (["--history", "1", "--timestamps", "soon"], "whole seconds"),
        (["--user", "0", "--dataset_dir", "data", "--timestamps", "1"], "--timestamps goes with --history"),
        (["--history", "1", "--dataset_dir", "data"], "--dataset_dir goes with --user"),
        (["--expect", "missing.json"], "missing.json"),
        (["--expect", "out/export/config.json"], "is no recommendations.json"),
        (["--history", "1", "--top_k", "0"], "--top_k takes numbers from 1, got 0"),
        (["--user", "3"], "--dataset_dir"),
        (["--user", "999", "--dataset_dir", "data"], "rows 0 to"),
        ([], "--history"),
    ],
)
def test_recommendation_mistakes_are_named(inside, arguments, part):
    with pytest.raises(UserError, match=part):
        run_here(recommend, "--model", "out/export", *arguments)


def test_settings_without_effect_are_told(inside, capsys):
    history = json.loads((inside / "out/recommendations.json").read_text())["history"]
    with pytest.warns(UserWarning, match="simultaneous"):
        run_here(recommend, "--model", "out/export", "--history", ",".join(map(str, history)))
    arguments = DataArguments(dataset="ml-1m", dataset_dir=str(inside / "data"))
    find_or_prepare(arguments, {"validation": "none"}, Runtime(0, 0, 1, 1))
    told = capsys.readouterr().out
    assert "dataset=ml-1m has no effect: the folder was prepared with synthetic" in told
    assert "validation=none has no effect: the folder was prepared with last" in told


def test_only_other_data_settings_than_those_of_the_folder_are_told(inside, capsys):
    """The same command again, as for a resume, says nothing; another one names what the folder does not follow."""
    same = {"num_users": 60, "num_items": 40, "mean_length": 8, "validation": "last", "max_memory_gb": None}
    find_or_prepare(DataArguments(dataset_dir=str(inside / "data")), same, Runtime(0, 0, 1, 1))
    assert "warning" not in capsys.readouterr().out
    other = DataArguments(dataset_dir=str(inside / "data"), source="raw/log.csv")
    find_or_prepare(other, {**same, "num_users": 61, "k_core": 5}, Runtime(0, 0, 1, 1))
    told = capsys.readouterr().out
    assert "num_users=61 has no effect: the folder was prepared with 60" in told
    assert "k_core=5 has no effect: the folder was prepared with 0" in told
    assert "--source raw/log.csv has no effect" in told and told.count("warning") == 3


def test_checkpoint_evaluates_and_exports_like_the_run(inside):
    options = "--dataset_dir data --use_cpu --top_k 5 10 --output_file metrics.json".split()
    run_here(evaluate, "--model", "out/checkpoint-7", *options)
    found = json.loads((inside / "metrics.json").read_text())
    final = lines(inside / "out")[-1]
    for name, value in found["eval"].items():
        assert value == pytest.approx(final[f"test/{name}"], abs=1e-5)
    for name, value in found["popularity"].items():
        assert value == pytest.approx(final[f"test/popularity/{name}"], abs=1e-5)
    run_here(export, "--checkpoint", "out/checkpoint-7", "--output_dir", "again")
    run_here(recommend, "--model", "again", "--expect", "out/recommendations.json")
    counts = load_file("out/checkpoint-7/embeddings-00001-of-00001.safetensors")["items.count"]
    least = int(counts.min()) + 1
    run_here(export, "--checkpoint", "out/checkpoint-7", "--output_dir", "pruned", "--min_count", least)
    left = AutoModelForRetrieval.from_pretrained("pruned").embeddings.num_rows()
    assert left == int((counts >= least).sum()) < len(counts)
    said = f"- pruned: items: {left:,} of {len(counts):,} rows are left (min_count {least})"
    assert said in Path("pruned/README.md").read_text()
    assert (inside / "again/preprocessor_config.json").read_text() == (
        inside / "out/export/preprocessor_config.json"
    ).read_text()


@pytest.mark.parametrize("mapping", ["identity", "vocabulary"])
def test_a_model_that_does_not_know_the_items_says_so(inside, capsys, mapping, tmp_path):
    rows = [f"{user},{item + 1000 * (mapping == 'identity')},{item}" for user in range(3) for item in range(1, 5)]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,t", *rows]))
    data = tmp_path / "other"
    prepare("event_log", data, tmp_path / "log.csv", timestamp_column="t", id_mapping=mapping)
    for model in ("out/export", "out/checkpoint-7"):
        run_here(evaluate, "--model", model, "--dataset_dir", data, "--use_cpu", "--top_k", 1)
        told = capsys.readouterr().out
        assert "trained on synthetic" in told and "is event_log: have items the same ids?" in told
        assert ("rows of 0 of the 4 items" in told) == (mapping == "identity")
    run_here(recommend, "--model", "out/export", "--dataset_dir", data, "--user", 0)
    assert "the model was trained on synthetic" in capsys.readouterr().out
    run_here(evaluate, "--model", "out/export", "--dataset_dir", "data", "--use_cpu")
    assert "warning" not in capsys.readouterr().out


def test_another_vocabulary_is_told(inside, tmp_path):
    model = AutoModelForRetrieval.from_pretrained("out/export")
    for name, items in (("one", "abc"), ("two", "acb")):
        rows = [f"{user},{item},{time}" for user in range(3) for time, item in enumerate(items)]
        (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,t", *rows]))
        prepare("event_log", tmp_path / name, tmp_path / "log.csv", timestamp_column="t", id_mapping="vocabulary")
    one, two = (load(tmp_path / name) for name in ("one", "two"))
    assert not strangers(model, tmp_path / "one", one)
    (told,) = strangers(model, tmp_path / "one", two)
    assert told.startswith("2 of the 3 items") and "another number" in told


def test_evaluation_equals_brute_force(inside):
    """The evaluator's ranks against scores of every item, sorted by hand, with and without the seen items."""
    model = AutoModelForRetrieval.from_pretrained("out/export").eval()
    catalogue, dataset = Catalogue.from_folder("data"), EventDataset.from_folder("data", "test")
    vectors = model.item_embeddings(torch.from_numpy(catalogue.ids))
    for exclude_seen in (True, False):
        ranks = []
        for row in range(len(dataset)):
            events = dataset.rows([row])
            items, times = events["item_id"], torch.from_numpy(events["timestamp"][None])
            history = {"timestamps": times[:, :-1], "request_timestamps": times[0, -1:]}
            query = model.encode(torch.from_numpy(items[None, :-1]), **history)[0]
            scores = dict(zip(catalogue.ids.tolist(), (vectors @ query).tolist(), strict=True))
            hidden = set(items[:-1].tolist()) - {int(items[-1])} if exclude_seen else set()
            order = sorted((item for item in scores if item not in hidden), key=lambda item: (-scores[item], item))
            ranks.append(order.index(int(items[-1])) + 1)
        arguments = EvaluationArguments(top_k=[5, 10], exclude_seen=exclude_seen, eval_batch_size=7)
        evaluator = Evaluator(inside / "data", "test", catalogue, arguments, Runtime(0, 0, 1, 1), max_length=12)
        expected = ranking_metrics(torch.tensor(ranks), [5, 10])
        assert evaluator(model) == pytest.approx(expected, abs=1e-9)


def test_resumed_run_on_one_rank_is_the_uninterrupted_run(inside):
    options = "--output_dir resumed --dataset_dir data --max_steps 7 --save_strategy no --top_k 5 10".split()
    run_here(train, *MICRO, *options, "--resume_from_checkpoint", "out/checkpoint-6")
    (line,) = [line for line in lines(inside / "resumed") if "train/loss" in line]
    (same,) = [old for old in lines(inside / "out") if old["step"] == line["step"] and "train/loss" in old]
    assert line["train/loss"] == pytest.approx(same["train/loss"], abs=2e-5)
    last = lines(inside / "resumed")[-1]
    assert last["test/ndcg@10"] == pytest.approx(lines(inside / "out")[-1]["test/ndcg@10"], abs=1e-4)


@pytest.mark.parametrize("sampling", ["uniform", "shared"])
def test_other_settings_train_too(inside, sampling):
    """Shared negatives, bf16, ZeRO 3, a token budget that makes micro-batches, a schedule, row-wise Adagrad."""
    options = f"--output_dir {sampling} --dataset_dir data --num_train_epochs 1 --save_strategy no".split()
    options += f"--negative_sampling {sampling} --bf16 --max_tokens_per_device 60 --max_grad_norm 1.0".split()
    options += "--lr_scheduler_type cosine --warmup_steps 2 --sparse_optimizer rowwise_adagrad".split()
    run_here(train, *MICRO, *options, "--deepspeed_config", ROOT / "ds_configs" / "zero3.json")
    assert lines(inside / sampling)[-1]["test/mrr"] > 0


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--learning_rte", "1"], ["--learning_rte", "--learning_rate"]),
        (["--data.num_userz", "1"], ["num_userz", "num_users"]),
        (["--data.num_users", "many"], ["num_users", "many"]),
        (["--data.source", "x"], ["--source", "data.source"]),
        (["--data.k_core", "-2"], ["k_core", "-2"]),
        (["--model.hidden_sizes", "1"], ["hidden_sizes", "hidden_size"]),
        (["--model.num_negatives", "1"], ["--num_negatives"]),
        (["--model.model_type", "bert"], ["bert", "hstu"]),
        (["--max_tokens_per_device", "4"], ["max_tokens_per_device=4"]),
        (["--global_batch_size", "0"], ["--global_batch_size", "0"]),
        (["--dataset_dir", "new", "--dataset", "ml-1m", "--source", "nowhere"], ["nowhere"]),
        (["--dataset_dir", "new", "--dataset", "movies"], ["movies", "ml-1m"]),
        (["--deepspeed_config", "none.json"], ["none.json"]),
        (["--resume_from_checkpoint", "gone"], ["gone"]),
        (["--resume_from_checkpoint", "data"], ["data"]),
        (["--sparse_optimizer", "adagrad", "--sparse_weight_decay", "1"], ["no effect", "adamw"]),
        (["--output_dir", ""], ["--output_dir"]),
        (["--output_dir", "out/report.md/run"], ["--output_dir out/report.md/run cannot be made"]),
    ],
)
def test_mistakes_are_named(inside, arguments, parts):
    with pytest.raises(UserError) as error:
        run_here(train, *MICRO, "--output_dir", "x", "--dataset_dir", "data", "--max_steps", 1, *arguments)
    for part in parts:
        assert part in str(error.value)
    assert not (inside / "new").exists()


def test_a_mistake_under_the_launcher_ends_all_ranks(tmp_path):
    options = "--output_dir x --dataset_dir y --source nowhere --dataset ml-1m".split()
    errors = launch("train", *MICRO, *options, expect=2, ranks=2, cwd=tmp_path)
    assert errors.count("error: ") == 1
    assert "nowhere" in errors
    assert "Traceback" not in errors


def test_an_export_of_a_checkpoint_has_a_card_and_begins_another_run(inside):
    run_here(export, "--checkpoint", "out/checkpoint-6", "--output_dir", "half", "--row_dtype", "bfloat16")
    card = (inside / "half" / "README.md").read_text()
    assert "train.py --" in card and "checkpoint-6" in card and "hr@5" in card
    options = "--output_dir warm --dataset_dir data --max_steps 1 --top_k 5 --init_from half".split()
    assert "began with the weights and rows of half" in launch("train", *MICRO, *options, cwd=inside)
