"""Plain `python train.py` is a job of one rank; a launcher's variables are left alone."""

import os
import subprocess
import sys

import pytest
from grzoo.embeddings.engine.runtime import prepare_environment

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "PMI_SIZE", "PMIX_RANK")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that what the test sets is undone
        monkeypatch.delenv(name)


def test_one_rank_without_a_launcher() -> None:
    prepare_environment()
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["0", "1", "0"]
    assert os.environ["MASTER_ADDR"] == "127.0.0.1" and int(os.environ["MASTER_PORT"]) > 0


def test_launcher_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "9"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    prepare_environment()
    assert {name: os.environ[name] for name in given} == given


def test_foreign_launcher_is_left_to_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    prepare_environment()
    assert "RANK" not in os.environ


def test_half_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="RANK is set but WORLD_SIZE is not"):
        prepare_environment()


def test_importing_does_not_import_deepspeed() -> None:
    code = "import sys, grzoo.embeddings.engine; assert 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
