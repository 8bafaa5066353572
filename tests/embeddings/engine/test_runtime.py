"""Plain `python train.py` is a job of one rank; a launcher's variables are left alone."""

import os
import subprocess
import sys

import pytest
from grzoo.embeddings.engine.runtime import prepare_environment

NAMES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PMI_SIZE", "PMIX_RANK"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
)


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


def test_mpi_is_left_to_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMIX_RANK", "1")
    prepare_environment()
    assert "RANK" not in os.environ


def test_the_script_of_a_slurm_job_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm gives it a number, though it is no task of srun."""
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_LOCALID", "0")
    prepare_environment()
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["0", "1", "0"]


def srun(monkeypatch: pytest.MonkeyPatch, task: int, tasks: int) -> None:
    slurm = {"SLURM_PROCID": task, "SLURM_LOCALID": task % 2, "SLURM_STEP_NUM_TASKS": tasks, "PMIX_RANK": task}
    for name, value in slurm.items():
        monkeypatch.setenv(name, str(value))


def test_the_tasks_of_srun_are_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    srun(monkeypatch, 3, 4)
    with pytest.raises(ValueError, match="srun started 4 tasks, and MASTER_ADDR and MASTER_PORT .*scontrol"):
        prepare_environment()
    assert "RANK" not in os.environ
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    prepare_environment()
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["3", "4", "1"]


def test_one_task_of_srun_needs_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    srun(monkeypatch, 0, 1)
    prepare_environment()
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["0", "1", "0"]
    assert os.environ["MASTER_ADDR"] == "127.0.0.1" and int(os.environ["MASTER_PORT"]) > 0


def test_half_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="RANK is set but WORLD_SIZE is not"):
        prepare_environment()


def test_importing_does_not_import_deepspeed() -> None:
    code = "import sys, grzoo.embeddings.engine; assert 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
