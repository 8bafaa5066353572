"""A run never writes over another run, its data, a checkpoint, or what is not its own."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from grzoo.recipes.arguments import DataArguments
from grzoo.recipes.dataset_folder import check_same_data, find_or_prepare, load
from grzoo.recipes.output_folder import check_export_folder, check_run_folder
from grzoo.recipes.runtime import Runtime, UserError

ALONE = Runtime(0, 0, 1, 1)
MICRO: dict[str, Any] = {"num_users": 20, "num_items": 15, "mean_length": 6.0}


@pytest.mark.parametrize("product", ["metrics.jsonl", "checkpoint-4"])
def test_a_run_goes_into_the_folder_of_another_one_only_to_go_on_with_it(tmp_path: Path, product: str) -> None:
    check_run_folder(tmp_path / "new", None, resumes=False)
    check_run_folder(tmp_path, None, resumes=False)
    (tmp_path / product).mkdir()
    with pytest.raises(UserError, match="holds a training run: go on with it by --resume_from_checkpoint last"):
        check_run_folder(tmp_path, None, resumes=False)
    check_run_folder(tmp_path, None, resumes=True)


def test_a_run_does_not_go_into_its_data_or_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a run needs a folder of its own"):
        check_run_folder(tmp_path, tmp_path / "x" / "..", resumes=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        check_run_folder(tmp_path / "file", None, resumes=False)


def test_an_export_goes_into_an_empty_folder_or_over_an_earlier_one(tmp_path: Path) -> None:
    check_export_folder(tmp_path / "new")
    check_export_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not empty and no earlier export"):
        check_export_folder(tmp_path)
    (tmp_path / "embeddings.safetensors.index.json").write_text("{}")
    check_export_folder(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(UserError, match="is a checkpoint, which an export would destroy"):
        check_export_folder(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        check_export_folder(tmp_path / "file")


def test_a_dataset_folder_that_is_missing_is_not_made_of_a_generated_log(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(UserError, match="missing is no dataset folder: prepare it .* or name the --dataset"):
        find_or_prepare(DataArguments(dataset_dir=missing), {}, ALONE)
    assert not (tmp_path / "missing").exists()
    for number, arguments in enumerate([{"dataset": "synthetic"}, {}]):
        folder = str(tmp_path / str(number))
        assert find_or_prepare(DataArguments(dataset_dir=folder, **arguments), MICRO, ALONE) == Path(folder)


def test_other_data_than_a_checkpoint_was_trained_on_is_told(tmp_path: Path) -> None:
    loaded = []
    for seed in (1, 2):
        arguments = DataArguments(dataset_dir=str(tmp_path / str(seed)))
        loaded.append(load(find_or_prepare(arguments, MICRO | {"seed": seed, "num_items": 14 + seed}, ALONE)))
    first, second = loaded
    saved = json.loads(json.dumps(first.identity()))
    check_same_data(saved, first, "checkpoint-4")
    check_same_data(None, second, "checkpoint-4 of an earlier version")
    with pytest.raises(UserError, match="checkpoint-4 was trained on other data than .*2: .*items .* --init_from"):
        check_same_data(saved, second, "checkpoint-4")
    renamed = SimpleNamespace(identity=lambda: saved | {"name": "x"}, folder="here")
    with pytest.raises(UserError, match="name 'synthetic' instead of 'x'"):
        check_same_data(saved, renamed, "checkpoint-4")  # type: ignore[arg-type]
