"""A real training run on several ranks that is killed and resumed until it has done all its steps."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from grzoo.embeddings.engine import checkpoint as checkpoints
from grzoo.embeddings.engine import folder as folders
from grzoo.embeddings.exchange import Exchange

MICRO = (
    "--max_length 12 --global_batch_size 20 --num_negatives 8 --model.hidden_size 8 --model.attention_head_dim 4 "
    "--model.linear_head_dim 4 --model.num_hidden_layers 1 --logging_steps 1 --use_cpu --eval_strategy no --top_k 5 "
    "--save_strategy steps --save_total_limit 2 --disable_tqdm --model.hidden_dropout 0.2 --sparse_optimizer adamw"
).split()
LAUNCHER_VARIABLES = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE LOCAL_SIZE MASTER_ADDR MASTER_PORT".split()
PATIENCE = 240.0  # seconds to start, and to notice that another rank has died


@dataclass
class Tally:
    """What the kills did."""

    kills: int = 0
    in_saves: int = 0
    of_one_rank: int = 0
    hung: int = 0
    unusable: int = 0
    passed_over: int = 0  # damaged checkpoints that were noticed and not taken
    steps: int = 0
    differences: list[float] = field(default_factory=list)


class Ranks:
    """The processes of one attempt."""

    def __init__(self, folder: Path, data: Path, world_size: int, options: list[str], name: str) -> None:
        self.output_dir = folder / "out"
        self.losses_file = folder / f"losses-{name}"
        self.output = (folder / f"output-{name}").open("w")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
        environment |= {"GRZOO_LOSSES": str(self.losses_file), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": str(world_size)}
        words = [sys.executable, str(Path(__file__).with_name("train_job.py")), *MICRO, *options]
        words += ["--output_dir", str(self.output_dir), "--dataset_dir", str(data)]
        words += ["--resume_from_checkpoint", "last"]
        self.processes = [
            subprocess.Popen(
                words,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=self.output,
                stderr=subprocess.STDOUT,
            )
            for rank in range(world_size)
        ]

    def losses(self) -> dict[int, float]:
        """Step -> loss, of the steps whose line is complete."""
        text = self.losses_file.read_text() if self.losses_file.exists() else ""
        lines = [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]
        return {int(step): float.fromhex(loss) for step, loss in lines}

    def wait_until(self, is_so: Callable[[], bool], poll: float = 0.02) -> bool:
        """True when it is so, False when a process ended before."""
        deadline = time.monotonic() + PATIENCE
        while not is_so():
            if any(process.poll() is not None for process in self.processes):
                return False
            if time.monotonic() > deadline:
                self.kill(range(len(self.processes)))
                raise AssertionError(f"nothing happened for {PATIENCE} s: {Path(self.output.name).read_text()[-3000:]}")
            time.sleep(poll)
        return True

    def kill(self, ranks: range | list[int]) -> None:
        for rank in ranks:
            self.processes[rank].send_signal(signal.SIGKILL)

    def wait(self) -> bool:
        """Whether all ended by themselves; kills those that did not."""
        deadline = time.monotonic() + PATIENCE
        hung = False
        for process in self.processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                hung = True
                process.kill()
                process.wait()
        self.output.close()
        return not hung

    def exit_codes(self) -> list[int | None]:
        return [process.returncode for process in self.processes]


def strike(ranks: Ranks, rng: random.Random, tally: Tally, longest: float) -> bool:
    """Kills one rank or all at a random moment: while starting, training or saving; False when the run was faster."""
    moment = rng.choices(["start", "training", "save"], [1, 4, 4])[0]
    if moment == "start":
        time.sleep(rng.uniform(0.0, 12.0))
    elif not ranks.wait_until(lambda: bool(ranks.losses())):
        return False
    if moment == "training":
        time.sleep(rng.uniform(0.0, longest))
    if moment == "save":
        time.sleep(rng.uniform(0.0, longest / 2))
        if not ranks.wait_until(lambda: any(ranks.output_dir.glob("*.incomplete")), poll=0.0005):
            return False
        time.sleep(rng.choice([0.0, rng.uniform(0.0, 0.01), rng.uniform(0.0, 0.1)]))
    if any(process.poll() is not None for process in ranks.processes):
        return False
    world_size = len(ranks.processes)
    # While ranks are starting only a launcher could tell the others that one is gone.
    is_single = world_size > 1 and moment != "start" and rng.random() < 0.3
    is_saving = any(ranks.output_dir.glob("*.incomplete"))
    ranks.kill([rng.randrange(world_size)] if is_single else range(world_size))
    tally.kills += 1
    tally.in_saves += is_saving
    tally.of_one_rank += is_single
    tally.hung += not ranks.wait()
    return True


def look(ranks: Ranks, expected: dict[int, float], tally: Tally, had_one: bool) -> bool:
    """Compares the losses of an attempt and loads what it left; whether there is a complete checkpoint."""
    losses = ranks.losses()
    tally.steps += len(losses)
    tally.differences += [abs(loss - expected[step]) for step, loss in losses.items()]
    for path in folders.candidates(ranks.output_dir):
        try:
            checkpoints.verify_checkpoint(path, Exchange())
        except ValueError:
            tally.passed_over += 1
            continue
        return True
    tally.unusable += had_one
    return False


def kill_and_resume(
    folder: Path,
    data: Path,
    expected: dict[int, float],
    *,
    kills: int,
    world_sizes: list[int],
    options: list[str],
    seed: int,
) -> Tally:
    """Kills runs on the dataset `data` so often, on so many ranks in turn, each going on from a complete checkpoint."""
    tally, rng = Tally(), random.Random(seed)
    attempt, round_, had_one = 0, 0, False
    while True:
        home = folder / f"round-{round_}"
        home.mkdir(parents=True, exist_ok=True)
        ranks = Ranks(home, data, world_sizes[attempt % len(world_sizes)], options, str(attempt))
        was_killed = tally.kills < kills and strike(ranks, rng, tally, longest=4.0)
        if not was_killed:
            assert ranks.wait() and not any(ranks.exit_codes()), Path(ranks.output.name).read_text()[-5000:]
        had_one = look(ranks, expected, tally, had_one)
        attempt += 1
        print(
            f"attempt {attempt}: {tally.kills} kills, steps {list(ranks.losses())[:1]}+{len(ranks.losses())}",
            flush=True,
        )
        if not was_killed:
            if tally.kills >= kills:
                return tally
            round_, had_one = round_ + 1, False
