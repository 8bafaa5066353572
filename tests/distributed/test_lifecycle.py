"""Law: a run that is told to end, runs out of disk or meets a damaged checkpoint loses nothing that was complete.

The checks are in lifecycle_jobs.py and run on two ranks; a failure there fails this test with its traceback.
"""

from pathlib import Path

import lifecycle_jobs
from grzoo.recipes.prepare_data import main as prepare
from spawn import spawn


def test_life_of_a_run_on_two_ranks(tmp_path: Path) -> None:
    """Bit-equal losses after every interruption, checkpoints limited, the best one kept, one message for a full
    disk, none hangs."""
    log = "synthetic --num_users 60 --num_items 40 --mean_length 8 --output_dir"
    assert prepare([*log.split(), str(tmp_path / "data")]) == 0
    assert prepare([*log.split(), str(tmp_path / "validated"), "--validation", "last"]) == 0
    answers = spawn(2, lifecycle_jobs.all_jobs, str(tmp_path), timeout=240.0)
    assert answers[0] == answers[1]
