"""Law 3: each damage of a checkpoint is detected before anything changes, or it loads the very state that was saved."""

import functools
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from damage import Damager
from engine_jobs import Layout, Recipe, build_engine, build_steps, train
from grzoo.embeddings.engine import checkpoint as checkpoints
from grzoo.embeddings.engine.dense import DenseState
from grzoo.embeddings.engine.training_state import training_state
from results import report

OLDER = {"loader": {"epoch": 0, "cursor": 7}}  # client_state of checkpoint-1
SEED = int(os.environ.get("GRZOO_FAULTS_SEED", 0))


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    """A micro engine of one rank, with checkpoints in several files of each kind."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
            patch.setenv(name, value)
        patch.setattr(checkpoints, "save_dense", functools.partial(checkpoints.save_dense, max_bytes=4_000))
        patch.setattr(checkpoints, "save_tables", functools.partial(checkpoints.save_tables, max_shard_bytes=3_000))
        engine = build_engine(Recipe(), Layout())
        yield engine
        engine.destroy()


@pytest.fixture(scope="module")
def saved(engine: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """checkpoint-1 and checkpoint-2; the second is to be damaged."""
    folder, steps = tmp_path_factory.mktemp("saved"), build_steps(Recipe(), Layout(), 0)
    for step in range(2):
        train(engine, steps, step, step + 1)
        engine.save_checkpoint(folder, client_state={"loader": {"epoch": step, "cursor": 7}})
    names = [path.name for path in (folder / "checkpoint-2").iterdir()]
    for kind in ("dense", "embeddings"):
        assert sum(name.startswith(f"{kind}-") for name in names) > 2
    return folder


def state_of(engine: Any, client_state: Any) -> dict[str, Any]:
    """All that a checkpoint has to bring back."""
    dense = DenseState(engine.deepspeed)
    tensors = {key: value for name in dense.names() for key, value in dense.gather(name).items()}
    for name, values in ((t, engine.collection.export_rows(t)) for t in engine.collection.table_names):
        order = values["ids"].argsort()
        tensors |= {f"{name}.{key}": value[order] for key, value in values.items()}
    plain = json.dumps([training_state(engine), dense.scalars(), client_state], sort_keys=True)
    return {"plain": plain, **tensors}


def is_same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and a["plain"] == b["plain"] and all(torch.equal(a[k], b[k]) for k in a if k != "plain")


@pytest.mark.parametrize("damages", [60, pytest.param(1500, marks=[pytest.mark.slow, pytest.mark.timeout(1500)])])
def test_each_damage_is_detected_or_harmless(engine: Any, saved: Path, tmp_path: Path, damages: int) -> None:
    whole = state_of(engine, engine.load_checkpoint(saved / "checkpoint-2")[1])
    other = state_of(engine, engine.load_checkpoint(saved / "checkpoint-1")[1])
    harmless: list[str] = []
    begin = time.monotonic()
    for number in range(damages):
        folder = tmp_path / "checkpoint-2"
        shutil.copytree(saved / "checkpoint-2", folder)
        what = Damager(folder, [saved / "checkpoint-1"], seed=1_000_003 * SEED + number).damage()
        try:
            _, client_state = engine.load_checkpoint(folder)
        except ValueError as error:
            assert "checkpoint-2" in str(error), f"{what}: the message does not say where: {error}"
            if number % 20 == 0:
                assert is_same(state_of(engine, OLDER), other), f"{what} changed the engine"
        except Exception as error:
            raise AssertionError(f"{what} (seed {number}): {error!r}") from error
        else:
            assert is_same(state_of(engine, client_state), whole), f"{what} (seed {number}) was not detected"
            harmless.append(what)
            engine.load_checkpoint(saved / "checkpoint-1")
        shutil.rmtree(folder)
    report(
        "random damages",
        events=damages,
        unusable=0,
        differing=0,
        seconds=time.monotonic() - begin,
        detail=f"{damages - len(harmless)} detected, {len(harmless)} harmless; seed {SEED}",
    )
    print(*harmless, sep="\n")
    assert len(harmless) < damages / 5, "the damages are too gentle to show anything"
