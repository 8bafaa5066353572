"""Law 3 in every layout: what one job saves any other continues: its state bit for bit, its losses within 1e-5.

tests/distributed/test_engine.py does a part of this in every run of the tests.
"""

import time
from itertools import cycle
from pathlib import Path

import elastic_jobs
import engine_cases
import pytest
from results import report
from spawn import spawn

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
WORLD_SIZES = (1, 2, 3, 4)


def largest_difference(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


def test_any_world_size_continues_any_other(tmp_path: Path) -> None:
    """All W -> W' in 1, 2, 3, 4 at ZeRO 2: the same files when saved again, the same losses."""
    folder, begin = str(tmp_path), time.monotonic()
    expected = {f"{w}-2": spawn(w, elastic_jobs.write, folder, [2], timeout=300.0)[0][0] for w in WORLD_SIZES}
    differences: list[float] = []
    for world_size in WORLD_SIZES:
        answers = spawn(world_size, elastic_jobs.read, folder, list(expected), [(2, "fp32")], timeout=300.0)
        for tag, losses in answers[0]["2-fp32"].items():
            differences.append(largest_difference(losses, expected[tag]))
            if tag == f"{world_size}-2":
                assert losses == expected[tag], "resumed on the same ranks, the losses are the same bits"
    report(
        "W -> W' in 1, 2, 3, 4, ZeRO 2",
        events=len(differences),
        unusable=0,
        differing=sum(difference > 1e-5 for difference in differences),
        seconds=time.monotonic() - begin,
        detail=f"files equal when saved again; largest difference of 3 losses {max(differences):.1e}",
    )
    assert max(differences) <= 1e-5


def test_any_stage_continues_any_other(tmp_path: Path) -> None:
    """All pairs of ZeRO stages on two ranks; fp32 state also passes through an engine that computes in bfloat16."""
    folder, stages, begin = str(tmp_path), [1, 2, 3], time.monotonic()
    written = spawn(2, elastic_jobs.write, folder, stages, timeout=300.0)[0]
    expected = {f"2-{stage}": losses for stage, losses in zip(stages, written, strict=True)}
    layouts = [*((stage, "fp32") for stage in stages), (1, "bf16"), (3, "bf16")]
    answers = spawn(2, elastic_jobs.read, folder, list(expected), layouts, timeout=300.0)[0]
    differences = [
        largest_difference(losses, expected[tag])
        for stage in stages
        for tag, losses in answers[f"{stage}-fp32"].items()
    ]
    report(
        "stage -> stage in 1, 2, 3, 2 ranks",
        events=len(differences),
        unusable=0,
        differing=sum(difference > 1e-5 for difference in differences),
        seconds=time.monotonic() - begin,
        detail=f"same files again, also through bf16; largest difference of 3 losses {max(differences):.1e}",
    )
    assert max(differences) <= 1e-5
    for stage in stages:
        for tag, losses in answers[f"{stage}-fp32"].items():
            if tag == f"2-{stage}":
                assert losses == expected[tag]


def test_resume_is_never_stopped_for_every_optimizer_and_precision(tmp_path: Path) -> None:
    stages, begin = cycle((1, 2, 3)), time.monotonic()
    runs = [(next(stages), dtype, optimizer) for dtype in ("fp32", "bf16") for optimizer in engine_cases.OPTIMIZERS]
    assert len({engine_cases.OPTIMIZERS[optimizer].sparse[0] for _, _, optimizer in runs}) == 5
    spawn(2, elastic_jobs.resume, str(tmp_path), runs, timeout=600.0)
    report(
        "resume == never stopped, 2 ranks",
        events=len(runs),
        unusable=0,
        differing=0,
        seconds=time.monotonic() - begin,
        detail="bit-equal losses, dense weights, rows: " + " ".join("-".join(map(str, run)) for run in runs),
    )
