"""Tables in GPU memory against a static table there, in the setting that NVIDIA publishes for dynamicemb.

    python -m grzoo.recipes.benchmark.device_tables --output device_tables.csv

Ten tables of a million rows of 128 float32, Adam; a step looks up 1.05 million ids (Zipf 1.05, about 320,000 distinct).
Contestants, interleaved round by round with the same ids and gradients, all of them on the GPU:
    grzoo   DynamicEmbeddingCollection(placement="device") + SparseAdam: any int64 id, growth and counters on
    static  a tensor of all rows, written by hand in torch: index_select, and in training unique, index_add_ of the
            gradients (atomics: its sums depend on the order) and Adam on the distinct rows. Both count the steps of
            Adam for all rows alike
Phases, in milliseconds between events of the GPU: "forward" from ids to a row per id, "backward_update" from gradients
to the updated table, "train" both, "eval" a lookup that inserts nothing. Published for one H100 (README of dynamicemb):
forward 1.338, backward 0.847, train 2.185, eval 0.645, and 0.347, 1.005, 1.352, 0.457 with static tables.

Without a GPU there is nothing to measure and the program says so; `--quick` then runs a tiny size under Triton's
interpreter, to show that the code works. Its times mean nothing, and its last line says "interpreted".
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from grzoo.embeddings import DynamicEmbeddingCollection, FeatureConfig, SparseAdam, TableConfig
from torch import Tensor

from .embedding import zipf_batches
from .reporting import print_headline, spread, write_rows

LEARNING_RATE, BETAS, EPS = 0.01, (0.9, 0.999), 1e-8
PART = 100_000  # rows of each table that are inserted, or read, at a time
NO_GPU = (
    "no CUDA or HIP device here: there is nothing to measure. On a machine with one run this command again; "
    "--quick shows under Triton's interpreter that the code works"
)


@dataclass(frozen=True)
class Size:
    """What a step looks up."""

    tables: int
    rows: int  # of a table
    ids: int  # of a table and step
    dim: int
    rounds: int


FULL = Size(tables=10, rows=1_000_000, ids=105_000, dim=128, rounds=50)
TINY = Size(tables=3, rows=400, ids=60, dim=8, rounds=2)


class Contestant(Protocol):
    """Looks ids int64 [tables, ids] up: float32 [tables, ids, dim]."""

    def forward(self, ids: Tensor) -> Tensor: ...

    def backward_update(self, grads: Tensor) -> None: ...

    def evaluate(self, ids: Tensor) -> Tensor: ...


class Grzoo:
    """Dynamic tables on the device."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self._names = [f"t{k}" for k in range(size.tables)]
        tables = [TableConfig(name=name, embedding_dim=size.dim, placement="device") for name in self._names]
        self.collection = DynamicEmbeddingCollection(tables, [FeatureConfig(name=n, table=n) for n in self._names])
        self._optimizer = SparseAdam(self.collection, lr=LEARNING_RATE, betas=BETAS, eps=EPS, step_mode="global")
        for ids in torch.arange(size.rows, device=device).split(PART):
            self.collection.prepare([dict.fromkeys(self._names, ids)])
        self._rows: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        found = self.collection.prepare([dict(zip(self._names, ids, strict=True))]).fetch()[0]
        self._rows = [found[name] for name in self._names]
        return torch.stack(self._rows)

    def backward_update(self, grads: Tensor) -> None:
        torch.autograd.backward(self._rows, list(grads))
        self._optimizer.step()
        self._rows = []

    @torch.no_grad()
    def evaluate(self, ids: Tensor) -> Tensor:
        found = self.collection.prepare([dict(zip(self._names, ids, strict=True))], insert=False).fetch()[0]
        return torch.stack([found[name] for name in self._names])


class Static:
    """A table of known size: ids are row numbers."""

    def __init__(self, size: Size, device: torch.device, rows: Tensor) -> None:
        self.weight = rows
        self._first, self._second = torch.zeros_like(rows), torch.zeros_like(rows)
        self._offsets = torch.arange(size.tables, device=device)[:, None] * size.rows
        self._dim, self._step = size.dim, 0
        self._index = torch.empty(0, dtype=torch.int64, device=device)

    def forward(self, ids: Tensor) -> Tensor:
        self._index = (ids + self._offsets).reshape(-1)
        return self.weight.index_select(0, self._index).view(*ids.shape, self._dim)

    def backward_update(self, grads: Tensor) -> None:
        rows, inverse = torch.unique(self._index, return_inverse=True)
        summed = torch.zeros(len(rows), self._dim, device=rows.device).index_add_(0, inverse, grads.view(-1, self._dim))
        self._step += 1
        first = self._first[rows].lerp_(summed, 1 - BETAS[0])
        second = self._second[rows].mul_(BETAS[1]).addcmul_(summed, summed, value=1 - BETAS[1])
        self._first[rows], self._second[rows] = first, second
        size = LEARNING_RATE / (1 - BETAS[0] ** self._step)
        root = (second / (1 - BETAS[1] ** self._step)).sqrt_().add_(EPS)
        self.weight[rows] = self.weight[rows].addcdiv_(first, root, value=-size)

    def evaluate(self, ids: Tensor) -> Tensor:
        return self.forward(ids)


def timed(device: torch.device, *calls: Callable[[], Any]) -> list[float]:
    """Run calls one after the other; return the seconds of each, as the GPU sees them where there is one."""
    if device.type == "cpu":
        seconds = []
        for call in calls:
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
        return seconds
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for call, mark in zip(calls, marks[1:], strict=True):
        call()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:], strict=False)]


def run(size: Size, device: torch.device) -> list[dict[str, Any]]:
    """Measure all contestants; a row for each of them and phase."""
    drawn = zipf_batches(size.rows, size.tables * size.ids, 1.05, 4)
    batches = [ids.view(size.tables, size.ids).to(device) for ids in drawn]
    grads = torch.randn(size.tables, size.ids, size.dim, device=device)
    grzoo = Grzoo(size, device)
    parts = torch.arange(size.rows, device=device).split(PART)
    born = torch.cat([grzoo.evaluate(ids.expand(size.tables, -1)) for ids in parts], dim=1).flatten(0, 1)
    contestants: dict[str, Contestant] = {"grzoo": grzoo, "static": Static(size, device, born)}
    distinct = sum(len(torch.unique(ids)) for ids in batches[0])
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(size.rounds + 2):
        for name, contestant in contestants.items():
            ids = batches[number % len(batches)]
            forward, backward = timed(
                device, partial(contestant.forward, ids), partial(contestant.backward_update, grads)
            )
            (evaluation,) = timed(device, partial(contestant.evaluate, ids))
            phases = {"forward": forward, "backward_update": backward, "train": forward + backward, "eval": evaluation}
            for phase, value in phases.items() if number > 1 else ():  # the first rounds compile
                seconds.setdefault((name, phase), []).append(value)
    difference = (grzoo.evaluate(batches[0]) - contestants["static"].evaluate(batches[0])).abs().max()
    grzoo.collection.close()
    return [
        {"contestant": name, "phase": phase, "tables": size.tables, "rows": size.rows, "ids": size.tables * size.ids}
        | {"distinct": distinct, "dim": size.dim, "optimizer": "adam", **spread(values), "rounds": size.rounds}
        | {"largest_difference": float(difference), "interpreted": device.type == "cpu"}
        for (name, phase), values in seconds.items()
    ]


def headline(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Name the medians of grzoo, and those over the static table's; what was interpreted has no times to name."""
    if rows[0]["interpreted"]:
        return {"interpreted": True, "largest_difference": rows[0]["largest_difference"]}
    at = {(row["contestant"], row["phase"]): row["median_ms"] for row in rows}
    figures: dict[str, Any] = {f"{phase}_ms": at["grzoo", phase] for phase in ("forward", "train", "eval")}
    figures |= {f"{phase}_vs_static": round(at["grzoo", phase] / at["static", phase], 3) for phase in ("train", "eval")}
    return figures | {"distinct": rows[0]["distinct"], "device": torch.cuda.get_device_name()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny size; without a GPU, under Triton's interpreter")
    parser.add_argument("--rounds", type=int, default=FULL.rounds)
    parser.add_argument("--output", type=Path, default=None, help="CSV file to append to")
    options = parser.parse_args()
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    elif options.quick:
        assert "triton" not in sys.modules
        os.environ["TRITON_INTERPRET"] = "1"
        device = torch.device("cpu")
    else:
        sys.exit(NO_GPU)
    size = TINY if options.quick else Size(FULL.tables, FULL.rows, FULL.ids, FULL.dim, options.rounds)
    rows = run(size, device)
    write_rows(rows, options.output)
    print_headline(headline(rows))


if __name__ == "__main__":
    main()
