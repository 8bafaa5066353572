"""Law 3 on real training: killed at any moment and resumed, a run has the losses of one that was never killed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from grzoo.recipes.prepare_data import main as prepare
from killed_run import MICRO, Ranks, kill_and_resume
from results import report

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
OPTIONS = "--max_steps 300 --save_steps 4".split()
SHORT = "--max_steps 40 --save_steps 3".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kill")
    log = "synthetic --num_users 60 --num_items 40 --mean_length 8 --output_dir"
    assert prepare([*log.split(), str(path / "data")]) == 0
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[int, float]:
    """The losses of the run that nobody kills, on two ranks."""
    home = folder / "whole"
    home.mkdir()
    ranks = Ranks(home, folder / "data", 2, OPTIONS, "0")
    assert ranks.wait() and ranks.exit_codes() == [0, 0], Path(ranks.output.name).read_text()[-5000:]
    losses = ranks.losses()
    assert sorted(losses) == list(range(1, 301))
    return losses


def test_killed_runs_of_two_ranks_are_the_uninterrupted_one_bit_for_bit(
    folder: Path, expected: dict[int, float]
) -> None:
    begin = time.monotonic()
    tally = kill_and_resume(
        folder / "same", folder / "data", expected, kills=22, world_sizes=[2], options=OPTIONS, seed=1
    )
    report(
        "SIGKILL, 2 ranks",
        events=tally.kills,
        unusable=tally.unusable,
        differing=sum(difference != 0 for difference in tally.differences),
        seconds=time.monotonic() - begin,
        detail=f"{tally.in_saves} in a save; {tally.of_one_rank} of one rank; {tally.hung} hung; {tally.steps} losses "
        f"compared; {tally.passed_over} damaged checkpoints passed over",
    )
    assert tally.unusable == tally.hung == 0 and tally.in_saves > 3
    assert tally.steps > 100 and set(tally.differences) == {0.0}


def test_killed_runs_go_on_with_other_numbers_of_ranks(folder: Path, expected: dict[int, float]) -> None:
    begin = time.monotonic()
    tally = kill_and_resume(
        folder / "other", folder / "data", expected, kills=4, world_sizes=[2, 1, 3], options=SHORT, seed=2
    )
    report(
        "SIGKILL, 2 -> 1 -> 3 ranks",
        events=tally.kills,
        unusable=tally.unusable,
        differing=sum(difference > 1e-5 for difference in tally.differences),
        seconds=time.monotonic() - begin,
        detail=f"{tally.steps} losses compared, largest difference {max(tally.differences):.1e}",
    )
    assert tally.unusable == tally.hung == 0 and max(tally.differences) <= 1e-5


def test_a_job_that_is_told_to_end_saves_the_step_that_it_is_in(folder: Path) -> None:
    """SIGTERM for all processes of a job, as schedulers send it: `deepspeed` on one node does not pass on its own."""
    home = folder / "told"
    words = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "-q",
        "--master_port",
        "29741",
        "--num_accelerators",
        "2",
    ]
    words += [str(Path(__file__).parents[2] / "recipes" / "train.py"), *MICRO, "--dataset_dir", str(folder / "data")]
    words += ["--output_dir", str(home), "--max_steps", "100000", "--save_steps", "100000"]
    with (folder / "told.txt").open("w") as output:
        launcher = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while not (home / "metrics.jsonl").exists() or '"step": 9' not in (home / "metrics.jsonl").read_text():
                assert launcher.poll() is None, (folder / "told.txt").read_text()
                time.sleep(0.2)
            os.killpg(launcher.pid, signal.SIGTERM)
            deadline = time.monotonic() + 60
            while not list(home.glob("checkpoint-*/COMPLETE.json")) and time.monotonic() < deadline:
                time.sleep(0.2)
            time.sleep(5)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
    text = (folder / "told.txt").read_text()
    assert text.count("told to end: saved checkpoint-") == 1 and "Traceback" not in text, text[-3000:]
    assert len(list(home.glob("checkpoint-*"))) == 1
