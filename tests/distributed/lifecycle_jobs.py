"""The training recipe on its ranks: told to end, out of disk, with damaged checkpoints; what the test asks of each."""

import errno
import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from grzoo.data import Catalogue
from grzoo.embeddings import saving
from grzoo.embeddings.engine import GenRecEngine
from grzoo.embeddings.engine import checkpoint as checkpoints
from grzoo.recipes.evaluation import Evaluator
from grzoo.recipes.loading import load_model
from grzoo.recipes.runtime import Preempted, Runtime, UserError
from grzoo.recipes.train import main as train

MICRO = (
    "--dataset_dir data --max_length 12 --global_batch_size 20 --num_negatives 8 --model.hidden_size 8 "
    "--model.attention_head_dim 4 --model.linear_head_dim 4 --model.num_hidden_layers 1 --logging_steps 1 --use_cpu "
    "--backend naive --eval_strategy no --top_k 5 --save_strategy steps --disable_tqdm"
).split()


class Job:
    """Runs the recipe on this rank, in the working folder, and keeps the losses of its steps, by number."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.runtime = Runtime(rank, rank, world_size, world_size)
        self.losses: dict[int, float] = {}
        self.at_step: Callable[[int], None] = lambda step: None

    def run(self, output_dir: str, options: str) -> dict[int, float]:
        self.losses = {}
        with self._watched():
            train(self.runtime, [*MICRO, "--output_dir", output_dir, *options.split()])
        return self.losses

    @contextmanager
    def _watched(self) -> Iterator[None]:
        original = GenRecEngine.train_batch

        def train_batch(engine: GenRecEngine, step: Any) -> Any:
            self.at_step(engine.global_steps + 1)
            output = original(engine, step)
            self.losses[engine.global_steps] = output.loss
            return output

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GenRecEngine, "train_batch", train_batch)
            yield


def all_jobs(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Every check in one spawn; returns what only the test can compare."""
    os.chdir(folder)
    job = Job(rank, world_size)
    expected = job.run("whole", "--max_steps 7 --save_steps 3")
    assert sorted(expected) == [1, 2, 3, 4, 5, 6, 7] and names("whole") == ["checkpoint-6", "checkpoint-7"]
    check_told_to_end(job, expected)
    check_limits(job)
    check_resume_by_path(job, expected)
    check_damaged_newest(job, expected)
    check_disk_full(job, expected)
    check_best(job)
    return {"losses": expected}


def names(output_dir: str) -> list[str]:
    dist.barrier()  # rank 0 has tidied up
    found = sorted(path.name for path in Path(output_dir).glob("checkpoint-*"))
    dist.barrier()
    return found


def check_told_to_end(job: Job, expected: dict[int, float]) -> None:
    """SIGTERM on one rank in step 4: all finish and save it, and the resumed run is the one that was never told."""

    def tell(step: int) -> None:
        if step == 4 and job.runtime.rank == job.runtime.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    job.at_step = tell
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="saved checkpoint-4; continue with --resume_from_checkpoint last"):
        job.run("told", "--max_steps 7 --save_steps 1000")
    assert signal.getsignal(signal.SIGTERM) == before
    assert names("told") == ["checkpoint-4"] and sorted(job.losses) == [1, 2, 3, 4]
    with pytest.raises(Preempted, match="nothing was saved"):
        job.run("unsaved", "--max_steps 7 --save_strategy no")
    assert names("unsaved") == []
    job.at_step = lambda step: None
    assert job.run("told", "--max_steps 7 --save_steps 1000 --resume_from_checkpoint true") == {
        step: loss for step, loss in expected.items() if step > 4
    }


def check_limits(job: Job) -> None:
    job.run("limited", "--max_steps 5 --save_steps 1 --save_total_limit 1")
    assert names("limited") == ["checkpoint-5"]
    job.run("unlimited", "--max_steps 3 --save_steps 1 --save_total_limit 0")
    assert names("unlimited") == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def check_resume_by_path(job: Job, expected: dict[int, float]) -> None:
    """A named checkpoint is taken though there is a newer one; saving goes on above it and leaves the newer alone."""
    found = job.run("whole", "--max_steps 7 --save_steps 3 --resume_from_checkpoint whole/checkpoint-6")
    assert found == {7: expected[7]}
    assert job.run("new", "--max_steps 3 --resume_from_checkpoint last --save_strategy no")[1] == expected[1]


def check_damaged_newest(job: Job, expected: dict[int, float]) -> None:
    """The newest complete one is taken, what is wrong with the newer is said, and the damaged one is not kept."""
    if job.runtime.is_main:
        file = Path("whole/checkpoint-7/state.json")
        file.write_text(file.read_text().replace('"step": 7', '"step": 8'))
    messages = Messages()
    with messages:
        found = job.run("whole", "--max_steps 7 --save_steps 3 --save_total_limit 1 --resume_from_checkpoint last")
    assert found == {7: expected[7]}
    if job.runtime.is_main:
        assert any("checkpoint-7 is damaged: the checksum of state.json" in text for text in messages.texts)
    assert names("whole") == ["checkpoint-7"]
    assert json.loads(Path("whole/checkpoint-7/state.json").read_text())["client_state"]["step"] == 7


def check_disk_full(job: Job, expected: dict[int, float]) -> None:
    """No room for a checkpoint: one message on all ranks, the one before stays, and the run continues from it."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    last = job.runtime.world_size - 1
    culprits = ((0, checkpoints.folders, "write_text"), (last, saving, "_table_rows"))
    for folder, (culprit, module, function) in zip(("full", "full again"), culprits, strict=True):

        def fill(step: int, culprit: int = culprit, module: Any = module, function: str = function) -> None:
            if step == 4 and job.runtime.rank == culprit:
                patch.setattr(module, function, full)

        job.at_step = fill
        with pytest.MonkeyPatch.context() as patch:
            with pytest.raises(UserError, match="checkpoint-4: .*No space left.*checkpoint-2 is intact"):
                job.run(folder, "--max_steps 7 --save_steps 2 --save_total_limit 1")
        assert names(folder) == ["checkpoint-2"]
    job.at_step = lambda step: None
    found = job.run("full", "--max_steps 7 --save_steps 2 --resume_from_checkpoint last")
    assert found == {step: loss for step, loss in expected.items() if step > 2}


def check_best(job: Job) -> None:
    """The best of scripted evaluations is kept, ends the waiting and is exported, also when the run was interrupted."""
    options = (
        "--dataset_dir validated --eval_strategy steps --eval_steps 1 --max_steps 9 --load_best_model_at_end true "
    )
    options += "--early_stopping_patience 3 --metric_for_best_model mrr --save_total_limit 1 --save_steps 1"
    values = dict(enumerate((0.1, 0.3, 0.2, 0.25, 0.3, 0.9), 1))

    def scripted(evaluator: Evaluator, model: Any) -> dict[str, float]:
        return {"mrr": values[max(job.losses)] if evaluator.split == "validation" else 0.5}

    def tell(step: int) -> None:
        if step == 3 and job.runtime.is_main:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "__call__", scripted)
        expected = job.run("best", options)
        assert sorted(expected) == [1, 2, 3, 4, 5] and names("best") == ["checkpoint-2", "checkpoint-5"]
        job.at_step = tell
        with pytest.raises(Preempted, match="saved checkpoint-3"):
            job.run("told-best", options)
        assert names("told-best") == ["checkpoint-2", "checkpoint-3"]
        job.at_step = lambda step: None
        again = job.run("told-best", f"{options} --resume_from_checkpoint last")
        assert again == {4: expected[4], 5: expected[5]} and names("told-best") == ["checkpoint-2", "checkpoint-5"]
        assert job.run("told-best", f"{options} --resume_from_checkpoint last") == {}
        job.run("only-best", f"{options} --save_strategy best")
        assert names("only-best") == ["checkpoint-2"]
    for output_dir in ("best", "told-best", "only-best") if job.runtime.is_main else ():
        check_exported(Path(output_dir))
        last = json.loads(Path(output_dir, "metrics.jsonl").read_text().splitlines()[-1])
        assert (last["step"], last["best/step"], last["best/mrr"], last["test/mrr"]) == (5, 2, 0.3, 0.5)


def check_exported(output_dir: Path) -> None:
    """The exported model is that of checkpoint-2, to the bit, and not that of the last step."""
    exported, best = load_model(output_dir / "export"), load_model(output_dir / "checkpoint-2")
    weights = best.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in exported.state_dict().items())
    items = torch.from_numpy(Catalogue.from_folder("validated").ids)
    assert torch.equal(exported.item_embeddings(items), best.item_embeddings(items))
    if (output_dir / "checkpoint-5").exists():
        last = load_model(output_dir / "checkpoint-5")
        assert not torch.equal(exported.item_embeddings(items), last.item_embeddings(items))


class Messages(logging.Handler):
    """What is logged while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def __enter__(self) -> "Messages":
        logging.getLogger("grzoo").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("grzoo").removeHandler(self)
