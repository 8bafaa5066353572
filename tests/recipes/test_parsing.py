"""Law: the command line wins over the YAML, and nothing that is given is silently ignored."""

from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from grzoo.data.prepare import PrepareConfig
from grzoo.recipes.arguments import (
    CommonArguments,
    DataArguments,
    EvaluationArguments,
    OptimizerArguments,
    StepArguments,
    TrainingArguments,
)
from grzoo.recipes.assembly import build_model_config
from grzoo.recipes.dataset_folder import RECIPE_OWNED
from grzoo.recipes.no_effect import without_effect
from grzoo.recipes.parsing import build_config, parse
from grzoo.recipes.periods import WalkArguments
from grzoo.recipes.runtime import UserError
from grzoo.recipes.settings import read_settings
from grzoo.recipes.walk_days import PeriodTraining

ALL = [CommonArguments, DataArguments, EvaluationArguments, OptimizerArguments, StepArguments, TrainingArguments]


HSTU = ["hstu_synthetic", "hstu_ml1m", "hstu_ml100k", "hstu_beauty", "hstu_sports"]
SASREC = ["sasrec_ml1m", "sasrec_ml100k", "sasrec_beauty", "sasrec_sports"]
RANKING = ["mtgr_ml1m", "mtgr_ml100k", "dlrm_hstu_ml100k", "dlrm_ml100k"]  # trained a step in test_ranking.py
WALK = ["walk_ml_latest_small"]


def parse_all(*argv):
    values, sections = parse(ALL, list(argv))
    return {name: getattr(value, name) for value in values for name in vars(value)}, sections["model"]


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_command_line_wins_over_yaml(yaml_file):
    text = "learning_rate: 1e-2\nmax_length: 50\nbf16: true\ntop_k: [1, 3]\nmodel:\n  hidden_size: 8\n  dropout: 1e-1\n"
    flags = ["--learning_rate", "1e-4", "--model.hidden_size=16", "--model.x", "y"]
    settings, model = parse_all("--config", yaml_file(text), *flags)
    assert settings["learning_rate"] == 1e-4
    assert (settings["max_length"], settings["bf16"], settings["top_k"]) == (50, True, [1, 3])
    assert model == {"hidden_size": 16, "dropout": 0.1, "x": "y"}


def test_sections_keep_apart(yaml_file):
    config = yaml_file("data:\n  num_users: 7\nmodel:\n")
    _, sections = parse(ALL, ["--config", config, "--data.num_items", "9", "--model.num_items", "1"])
    assert sections == {"data": {"num_users": 7, "num_items": 9}, "model": {"num_items": 1}}


def test_order_of_config_and_flags_does_not_matter(yaml_file):
    config = yaml_file("max_length: 50\n")
    assert parse_all("--max_length", "7", f"--config={config}")[0]["max_length"] == 7


def test_null_in_yaml_means_the_default(yaml_file):
    assert parse_all("--config", yaml_file("max_tokens_per_device: null\n"))[0]["max_tokens_per_device"] is None


@pytest.mark.parametrize(
    ("argv", "yaml", "parts"),
    [
        ([], "learning_rte: 1\n", ["'learning_rte'", "learning_rate"]),
        (["--num_epochs", "3"], None, ["'--num_epochs'", "--num_train_epochs"]),
        (["--num_train_epoch", "3"], None, ["--num_train_epoch", "--num_train_epochs"]),
        (["--max_length", "many"], None, ["max_length", "many"]),
        (["--eval_strategy", "hourly"], None, ["eval_strategy", "hourly"]),
        (["--model.hidden_size"], None, ["--model.hidden_size needs a value"]),
        ([], "just text\n", ["expected 'key: value' lines"]),
        ([], "a: [1\n", ["is not YAML"]),
        ([], "model: 3\n", ["under 'model'"]),
        ([], "data: [3]\n", ["under 'data'"]),
        (["--config", "nowhere.yaml"], None, ["nowhere.yaml", "hstu_ml1m"]),
    ],
)
def test_mistakes_are_named(yaml_file, argv, yaml, parts):
    argv = argv + (["--config", yaml_file(yaml)] if yaml else [])
    with pytest.raises(UserError) as error:
        parse_all(*argv)
    for part in parts:
        assert part in str(error.value)


def test_a_recipe_without_sections_refuses_them():
    with pytest.raises(UserError, match=r"unknown argument '--model.hidden_size'"):
        parse([EvaluationArguments], ["--model.hidden_size", "3"], sections=())


def test_help_names_every_setting_of_the_data(capsys):
    with pytest.raises(SystemExit):
        read_settings(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    own = {field.name for field in fields(PrepareConfig)} - set(RECIPE_OWNED)
    assert not [name for name in own if f" {name}," not in shown and f" {name}." not in shown]


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("warmup_steps", "-1"),
        ("weight_decay", "-0.1"),
        ("max_grad_norm", "nan"),
        ("save_total_limit", "-1"),
        ("learning_rate", "nan"),
        ("max_candidates", "0"),
        ("top_k", "0"),
        ("adam_beta1", "1.0"),
        ("adam_beta2", "-0.5"),
    ],
)
def test_numbers_out_of_range_are_refused(flag, value):
    with pytest.raises(UserError, match=f"--{flag} .*{value}"):
        read_settings(["--output_dir", "x", f"--{flag}", value])


def test_a_tracker_that_is_not_installed_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--report_to tensorboard needs the tensorboard package"):
        read_settings(["--output_dir", "x", "--report_to", "tensorboard"])


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("--eval_steps 5", "--eval_steps has no effect with --eval_strategy epoch"),
        ("--eval_epochs 5 --eval_strategy steps", "--eval_epochs has no effect with --eval_strategy steps"),
        ("--save_steps 5", "--save_steps has no effect with --save_strategy epoch"),
        ("--save_total_limit 5 --save_strategy no", "--save_total_limit has no effect with --save_strategy no"),
        ("--warmup_steps 5", "--warmup_steps has no effect with --lr_scheduler_type constant"),
        ("--window_overlap 0.2", "--window_overlap has no effect with --windows recent"),
        ("--stochastic_alpha 1.2 --windows sliding", "--stochastic_alpha has no effect with --windows sliding"),
        ("--num_negatives 5 --negative_sampling all", "--num_negatives has no effect with --negative_sampling all"),
        ("--num_recent 5", "--num_recent has no effect with a retrieval model"),
        ("--windows sliding --model.model_type mtgr", "--windows has no effect with a ranking model"),
        ("--top_k 3 --model.model_type mtgr", "--top_k has no effect with a ranking model"),
        (
            "--dataloader_prefetch_factor 3",
            "--dataloader_prefetch_factor has no effect with --dataloader_num_workers 0",
        ),
        ("--eval_steps 5 --eval_strategy steps --warmup_steps 2 --lr_scheduler_type cosine", None),
        ("--window_overlap 0.2 --windows sliding --num_negatives 5 --negative_sampling shared", None),
    ],
)
def test_settings_that_others_leave_without_effect_are_told(argv, told):
    lines = without_effect(read_settings(["--output_dir", "x", *argv.split()]))
    assert [line.startswith(told) for line in lines] == [True] if told else not lines


@pytest.mark.parametrize("name", HSTU + SASREC + RANKING + WALK)
def test_shipped_configurations_have_no_setting_without_effect(name):
    assert not without_effect(read_settings(["--config", name, "--output_dir", "x"], WalkArguments, PeriodTraining))


def test_unknown_hyperparameter_names_near_ones():
    @dataclass
    class Config:
        hidden_size: int = 8

    assert build_config(Config, {"hidden_size": 9}).hidden_size == 9
    with pytest.raises(UserError, match="'hidden_sizes' of Config; did you mean hidden_size"):
        build_config(Config, {"hidden_sizes": 9})


def test_every_shipped_configuration_is_tested():
    folder = Path(__file__).parents[2] / "recipes" / "configs"
    assert {path.stem for path in folder.glob("*.yaml")} == {*HSTU, *SASREC, *RANKING, *WALK}


@pytest.mark.parametrize("name", RANKING)
def test_shipped_ranking_configurations_choose_by_validation(name):
    settings = read_settings(["--config", name, "--output_dir", "x"])
    assert settings.model_options["model_type"] == name.rpartition("_")[0]
    assert settings.data_options == {"ranking": True, "split": "temporal", "validation": "last"}
    assert settings.training.load_best_model_at_end and settings.training.early_stopping_patience == 2


@pytest.mark.parametrize("name", HSTU + SASREC)
def test_shipped_configurations_parse(name):
    settings = read_settings(["--config", name, "--output_dir", "x"])
    config = build_model_config(settings, has_timestamps=False, num_items=100)
    assert config.model_type == name.split("_")[0]
    assert config.max_sequence_length == settings.data.max_length
    assert (settings.data.dataset == "synthetic") == (name == "hstu_synthetic")


def test_a_hyperparameter_out_of_range_is_said_once():
    settings = read_settings(["--output_dir", "x", "--model.hidden_size", "-4"])
    with pytest.raises(UserError, match="^HSTUConfig: hidden_size must be positive"):
        build_model_config(settings, has_timestamps=False, num_items=100)


def test_a_longer_history_needs_no_other_setting():
    settings = read_settings(["--config", "hstu_beauty", "--output_dir", "x", "--max_length", "100"])
    assert build_model_config(settings, has_timestamps=False, num_items=100).max_position_embeddings == 111


def test_impossible_hyperparameter_is_one_line():
    settings = read_settings(
        ["--config", "hstu_beauty", "--output_dir", "x", "--max_length", "100", "--model.max_position_embeddings", "61"]
    )
    with pytest.raises(UserError, match=r"^HSTUConfig: .*max_position_embeddings \(61\)") as error:
        build_model_config(settings, has_timestamps=False, num_items=100)
    assert "\n" not in str(error.value)
    assert "validation error" not in str(error.value)


@pytest.mark.parametrize("name", WALK)
def test_shipped_walks_train_every_event(name):
    settings = read_settings(["--config", name, "--output_dir", "x"], WalkArguments, PeriodTraining)
    assert settings.data.windows == "sliding" and settings.more[0].period == "month"
    config = build_model_config(settings, has_timestamps=True, num_items=10)
    assert config.max_sequence_length == settings.data.max_length
