"""The command line of prepare_data: a report and a folder, or one line of error, code 2 and nothing left behind."""

import subprocess
import sys
from pathlib import Path

import pytest
from grzoo.data import EventDataset
from grzoo.recipes.prepare_data import main, parse


def test_the_name_may_come_first() -> None:
    config = parse(["ml-1m", "--output_dir", "out", "--validation", "last", "--feature_columns", "a", "b"])
    assert (config.name, config.validation, config.feature_columns) == ("ml-1m", "last", ["a", "b"])
    assert parse(["--output_dir", "out", "--name", "synthetic", "--overwrite"]).overwrite


def test_it_makes_a_folder_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["synthetic", "--output_dir", str(tmp_path / "out"), "--num_users", "30", "--num_items", "50"]
    assert main([*words, "--split", "temporal", "--validation", "last"]) == 0
    out = capsys.readouterr().out
    assert "synthetic: 30 users" in out and f"wrote {tmp_path / 'out'}" in out
    assert len(EventDataset.from_folder(tmp_path / "out", "validation")) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ml-1m", "--source", "nowhere"], "prepare_data: source nowhere does not exist"),
        (["movies"], "there is no data set 'movies'"),
        (["synthetic", "--split", "random"], "split is 'random'"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_as_a_module(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "grzoo.recipes.prepare_data",
        "ml-1m",
        "--source",
        str(tmp_path),
        "--output_dir",
        "x",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "holds none of" in done.stderr
