"""The whole training step of HSTU on CPU ranks, with its phases, against a padded step in plain torch.

    GRZOO_DATA=FOLDER python -m grzoo.recipes.benchmark.training --quick

Both contestants train on the same global batches, one step each in turn:
    grzoo    a recipe's step by its engine: data (sampling, negatives, balancing), prepare, fetch, forward, backward,
             reduce, dense_step, sparse_step
    padded   padded_hstu.py: padded to the longest history, negatives materialised, items an nn.Embedding with a dense
             gradient, AdamW, DistributedDataParallel; its batches are made beforehand and come from the balanced
             partition, which favours it
A step begins and ends when all ranks do. Tokens are events of the histories, padding does not count. `mfu` is three
times the forward cost of the model (`config.flops`) over the time and over the speed of a product of 1,024 x 1,024
matrices on all ranks at once. Without the data set of the recipe in $GRZOO_DATA: a synthetic log, as the rows say.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from grzoo.data import GlobalStep, StepLoader
from grzoo.recipes.assembly import build_engine, build_loader, build_model, build_model_config
from grzoo.recipes.dataset_folder import LoadedData, find_or_prepare, load
from grzoo.recipes.deepspeed_config import resolve
from grzoo.recipes.runtime import Runtime, connect, start
from grzoo.recipes.settings import Settings, read_settings
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .padded_hstu import PaddedHSTU
from .reporting import print_headline, spread, write_rows

CONFIGS = ("hstu_ml1m", "hstu_ml100k", "hstu_beauty", "hstu_sports")
_SYNTHETIC = ["--dataset", "synthetic", "--data.num_users", "2000", "--data.validation", "none"]


class Padded:
    """The baseline: model, data parallelism and optimizer."""

    def __init__(self, config: Any, item_ids: np.ndarray[Any, Any], settings: Settings) -> None:
        torch.manual_seed(0)
        self.item_ids = torch.from_numpy(np.sort(item_ids))
        self.model = PaddedHSTU(config, len(item_ids))
        parallel = dist.get_world_size() > 1
        self.parallel = torch.nn.parallel.DistributedDataParallel(self.model) if parallel else self.model
        about = settings.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parallel.parameters(),
            lr=about.learning_rate,
            betas=(about.adam_beta1, about.adam_beta2),
            weight_decay=about.weight_decay,
        )

    def inputs(self, micro_batch: dict[str, Any]) -> tuple[Tensor | None, ...]:
        """The arguments of the model for a packed micro-batch."""
        lengths = micro_batch["cu_seq_lens_q"].diff().tolist()

        def pad(name: str) -> Tensor | None:
            packed = micro_batch.get(name)
            return None if packed is None else pad_sequence(list(packed[0].split(lengths)), batch_first=True)

        items, labels, negatives = (
            torch.searchsorted(self.item_ids, micro_batch[name]) + 1 for name in ("input_ids", "labels", "negative_ids")
        )
        packed = {"input_ids": items, "labels": labels}
        padded = [pad_sequence(list(x[0].split(lengths)), batch_first=True) for x in packed.values()]
        return padded[0], pad("timestamps"), pad("target_timestamps"), padded[1], negatives[0]

    def step(self, inputs: tuple[Tensor | None, ...], denominator: int) -> None:
        self.optimizer.zero_grad()
        loss = self.parallel(*inputs) * (dist.get_world_size() / denominator)
        loss.backward()
        self.optimizer.step()


class Ours:
    """A recipe's engine and batches."""

    def __init__(self, settings: Settings, data: LoadedData, config: Any, runtime: Runtime) -> None:
        deepspeed = resolve(None, settings.step, settings.optimizer, runtime.world_size)
        loader: StepLoader = build_loader(settings, data, config, runtime)
        self.batches = iter(loader)
        self.engine = build_engine(settings, build_model(settings, config), deepspeed, 1000)

    def step(self) -> tuple[GlobalStep, dict[str, float]]:
        """One step; returns it and the seconds of its phases."""
        began = time.perf_counter()
        global_step = next(self.batches)
        data = time.perf_counter() - began
        return global_step, {"data": data, **self.engine.train_batch(global_step).seconds}


def measure(name: str, rounds: int, runtime: Runtime) -> dict[str, Any]:
    """Interleave the contestants on this rank; seconds per step, tokens, flops and phases (of rank 0)."""
    settings, data = _recipe(name, runtime)
    config = build_model_config(settings, has_timestamps=data.train.has_timestamps, num_items=len(data.catalogue))
    ours, padded = Ours(settings, data, config, runtime), Padded(config, data.catalogue.all_items().ids, settings)
    seconds: dict[str, list[float]] = {"grzoo": [], "padded": []}
    phases: list[dict[str, float]] = []
    tokens: list[int] = []
    flops: list[float] = []
    for _ in range(rounds + 2):
        took, (step, by_phase) = _timed(ours.step)
        inputs = [padded.inputs(micro_batch) for micro_batch in step.micro_batches]
        assert len(inputs) == 1, "the baseline has one micro-batch per step"
        denominator = step.num_items_in_batch
        padded_took, _ = _timed(lambda i=inputs[0], d=denominator: padded.step(i, d))
        seconds["grzoo"].append(took)
        seconds["padded"].append(padded_took)
        phases.append(by_phase)
        tokens.append(step.num_tokens)
        lengths = step.micro_batches[0]["cu_seq_lens_q"].diff().numpy()
        flops.append(_sum_of_ranks(3.0 * float(config.flops(lengths).sum())))
    return {
        "dataset": data.schema.name,
        "users": settings.step.global_batch_size,
        "negatives": config.num_negatives,
        "tokens": tokens[2:],
        "flops": flops[2:],
        "peak": _sum_of_ranks(_product_speed()),
        "seconds": {key: values[2:] for key, values in seconds.items()},
        "phases": {key: [p[key] for p in phases[2:]] for key in phases[-1]},
    }


def _recipe(name: str, runtime: Runtime) -> tuple[Settings, LoadedData]:
    arguments = ["--config", name, "--output_dir", "unused", "--use_cpu", "--disable_tqdm"]
    settings = read_settings(arguments)
    folder = Path(os.environ.get("GRZOO_DATA", "")) / settings.data.log_name.replace("amazon-", "amazon14-")
    if not os.environ.get("GRZOO_DATA") or not folder.exists():
        settings = read_settings(arguments + _SYNTHETIC)
    return settings, load(find_or_prepare(settings.data, settings.data_options, runtime))


def _timed(work: Any) -> tuple[float, Any]:
    """Seconds from when all ranks begin until all have ended, and the result on this rank."""
    dist.barrier()
    began = time.perf_counter()
    result = work()
    dist.barrier()
    return time.perf_counter() - began, result


def _sum_of_ranks(value: float) -> float:
    total = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)


def _product_speed() -> float:
    """Operations per second of a product of 1,024 x 1,024 float32 matrices, the best of five."""
    left = torch.randn(1024, 1024)
    times = []
    for _ in range(6):
        took, _ = _timed(lambda: left @ left)
        times.append(took)
    return 2 * 1024**3 / min(times[1:])


def rows_of(name: str, ranks: int, result: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """CSV rows and headline figures."""
    about = {"recipe": name, "dataset": result["dataset"], "ranks": ranks, "users": result["users"]}
    about |= {"negatives": result["negatives"], "tokens": round(float(np.mean(result["tokens"])))}
    phases = {f"{key}_ms": round(1e3 * float(np.median(v)), 2) for key, v in result["phases"].items()}
    rows = []
    speeds = {}
    for contestant, seconds in result["seconds"].items():
        speeds[contestant] = sum(result["tokens"]) / sum(seconds)
        mfu = sum(result["flops"]) / sum(seconds) / result["peak"]
        row = about | {"contestant": contestant, "steps": len(seconds), **spread(seconds)}
        row |= {"tokens_per_second": round(speeds[contestant]), "mfu": round(mfu, 3)}
        row |= {"peak_gflops": round(result["peak"] / 1e9, 1)}
        rows.append(row | (phases if contestant == "grzoo" else dict.fromkeys(phases)))
    ratios = np.asarray(result["seconds"]["padded"]) / np.asarray(result["seconds"]["grzoo"])
    headline = {
        "tokens_per_second": rows[0]["tokens_per_second"],
        "tokens_per_second_padded": rows[1]["tokens_per_second"],
        "speedup_vs_padded": round(float(np.median(ratios)), 2),
        "mfu": rows[0]["mfu"],
    }
    return rows, headline


def launch(name: str, ranks: int, threads: int, rounds: int) -> dict[str, Any]:
    """Run the ranks as processes of their own and return what rank 0 measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "grzoo.recipes.benchmark.training", "--worker", str(result)]
        command += ["--config", name, "--rounds", str(rounds)]
        common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        common |= {"MASTER_PORT": port, "OMP_NUM_THREADS": str(threads)}
        children = [
            subprocess.Popen(command, env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(ranks)
        ]
        try:
            codes = [child.wait() for child in children]
        finally:
            for child in children:
                child.kill()
        if any(codes):
            raise SystemExit(f"a rank failed, exit codes {codes}")
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, write rows, end with the headline figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer steps: under a minute")
    parser.add_argument("--config", choices=CONFIGS, default="hstu_ml1m", help="the recipe whose step is measured")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--rounds", type=int, default=None, help="steps of each contestant")
    parser.add_argument("--csv", type=Path, default=None, help="append the rows to this file")
    parser.add_argument("--worker", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker is not None:
        runtime = start()
        connect(runtime, use_cpu=True)
        result = measure(options.config, options.rounds, runtime)
        if runtime.is_main:
            options.worker.write_text(json.dumps(result))
        dist.barrier()
        dist.destroy_process_group()
        return
    torch.set_num_threads(options.threads)
    rounds = options.rounds or (6 if options.quick else 25)
    result = launch(options.config, options.ranks, options.threads, rounds)
    rows, headline = rows_of(options.config, options.ranks, result)
    write_rows(rows, options.csv)
    print_headline(headline)


if __name__ == "__main__":
    main()
