"""The engine on two ranks: a step for both sides or for neither, bad input, evaluation, checkpoints of any layout.

The checks themselves are in engine_cases.py and run on the ranks; a failure there fails these tests with its traceback.
"""

import engine_runs
import pytest

pytestmark = pytest.mark.timeout(600)  # the first test waits for all ranks


def test_cases_on_two_ranks() -> None:
    """Both or neither on overflow; bad steps raise on all ranks; evaluation is read-only; resume == never stopped."""
    seconds = engine_runs.ranks(2)["seconds"]
    for case in ("overflow", "bad steps", "evaluation", "own loop", "raw deepspeed", "resume", "damage", "failed save"):
        assert case in seconds


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_checkpoint_loads_in_any_layout(world_size: int) -> None:
    """Law 3: a checkpoint of two ranks at stage 2 continues at other world sizes and stages with the same losses."""
    elastic = engine_runs.ranks(world_size)["elastic"]
    assert len(elastic) == 2
    for stage, differences in elastic.items():
        assert max(differences) <= 1e-5, f"ZeRO {stage}"
