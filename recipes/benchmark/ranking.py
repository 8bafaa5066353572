"""Ranking models at equal features on MovieLens: MTGR, its ablations, DLRM-HSTU, a DLRM-style MLP, over seeds.

    python -m grzoo.recipes.benchmark.ranking --quick                                   # under a minute, no result
    python -m grzoo.recipes.benchmark.ranking --dataset ml-100k --source RAW --output results/ranking.csv

First each model is tuned: one run for each pair of `LEARNING_RATES` and `DROPOUTS`, the same for all, with a seed of
its own; the pair of the best validation AUC is taken (an ablation of MTGR takes MTGR's). Then each variant trains with
it, once for each seed. Every run (Adam, dense and tables, in this process, one thread) is evaluated on the validation
part after each epoch, stops after `PATIENCE` epochs without a better AUC of the first task, and reports test metrics
of its best epoch. One CSV row per run; runs whose row is in the CSV already are not repeated, so that the program can
be stopped and called again.
"""

import argparse
import csv
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grzoo.data import Catalogue, DatasetSchema, EventDataset, GlobalBatchSampler, StepLoader
from grzoo.data.prepare import prepare
from grzoo.embeddings import SparseAdam
from grzoo.models import AutoModelForRanking, DLRMConfig, DLRMHSTUConfig, MTGRConfig
from grzoo.models.ranking import RankingConfig
from grzoo.recipes.best_model import BestModel
from grzoo.recipes.ranking import RankingEvaluator, ranking_collator
from grzoo.recipes.runtime import Runtime

from .reporting import print_headline, write_rows

BATCH, WIDTH, LENGTH, RECENT, PATIENCE = 32, 32, 100, 20, 2
LEARNING_RATES, DROPOUTS, TUNING_SEED = (3e-3, 1e-2), (0.1, 0.4), 100
TUNED_AS = {"dlrm": "dlrm", "dlrm_hstu": "dlrm_hstu"}  # every other variant: as mtgr
_Maker = Callable[..., RankingConfig]


@dataclass(frozen=True)
class Run:
    """What a row is of: `stage` is "tuning" or "final"."""

    dataset: str
    variant: str
    stage: str
    seed: int
    max_epochs: int
    learning_rate: float
    dropout: float

    def key(self) -> dict[str, Any]:
        """The columns that identify a run in the CSV."""
        return {**vars(self), "batch": BATCH, "width": WIDTH, "length": LENGTH}


def variants() -> dict[str, tuple[_Maker, dict[str, Any]]]:
    """Name -> config class and what differs from the common features and sizes."""
    return {
        "mtgr": (MTGRConfig, {}),
        "dlrm": (DLRMConfig, {}),
        "mtgr, no cross features": (MTGRConfig, {"cross_features": []}),
        "mtgr, no GroupLN": (MTGRConfig, {"use_group_norm": False}),
        "mtgr, no dynamic mask": (MTGRConfig, {"use_dynamic_mask": False}),
        "dlrm_hstu": (DLRMHSTUConfig, {"attention_head_dim": WIDTH // 2, "linear_head_dim": WIDTH // 2}),
    }


def features_of(schema: DatasetSchema) -> dict[str, Any]:
    """The config fields that follow from a dataset folder."""
    about = schema.ranking
    fields = {name: list(about[name]) for name in ("tasks", "user_features", "event_features", "cross_features")}
    return fields | {"item_features": {name: len(values) for name, values in about["item_features"].items()}}


def train(folder: Path, run: Run) -> dict[str, Any]:
    """Test metrics of the epoch that is best on the validation part."""
    make, changed = variants()[run.variant]
    common = {"hidden_size": WIDTH, "embedding_dim": 16, "max_sequence_length": LENGTH, "num_recent": RECENT}
    keyed = {"hidden_dropout": run.dropout, "embedding_seed": run.seed}
    config = make(**{**features_of(DatasetSchema.load(folder)), **common, **keyed, **changed})
    torch.manual_seed(run.seed)
    model = AutoModelForRanking.from_config(config).train()
    dense = torch.optim.Adam(model.parameters(), lr=run.learning_rate)
    sparse = SparseAdam(model.embeddings, run.learning_rate)
    dataset = EventDataset.from_folder(folder, "train")
    collator = ranking_collator(dataset, config, seed=run.seed)
    loader = StepLoader(dataset, GlobalBatchSampler(len(collator.windows), BATCH, seed=run.seed), collator)
    validation, test = (_evaluator(folder, split, config) for split in ("validation", "test"))
    best, found, epoch = BestModel("auc", keeps=False, patience=PATIENCE), {}, 0
    began = time.process_time()
    while epoch < run.max_epochs and not best.is_out_of_patience:
        epoch += 1
        for step in loader:
            rows = model.embeddings.prepare([model.embedding_ids(batch) for batch in step.micro_batches]).fetch()
            for k, batch in enumerate(step.micro_batches):
                model(**batch, embeddings=rows[k], num_items_in_batch=step.num_items_in_batch).loss.backward()
            dense.step()
            dense.zero_grad()
            sparse.reduce()
            sparse.step()
        if best.update(epoch, epoch, validation(model)):
            found = {name.replace("/", "_"): round(value, 5) for name, value in test(model).items()}
    return {
        "epochs": epoch,
        "best_epoch": best.step,
        "validation_auc": round(best.value, 5),
        **found,
        "dense_parameters": sum(p.numel() for p in model.parameters()),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def _evaluator(folder: Path, split: str, config: RankingConfig) -> RankingEvaluator:
    return RankingEvaluator(folder, split, Catalogue.from_folder(folder), config, Runtime(0, 0, 1, 1), batch_size=256)


class Results:
    """The rows of finished runs: those of a CSV, if one is given, and those of this process."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path is not None and path.exists():
            with open(path, newline="") as file:
                self.rows = list(csv.DictReader(file))

    def of(self, folder: Path, run: Run) -> dict[str, Any]:
        """The row of a run, which is made unless it is there."""
        for row in self.rows:
            if all(row.get(name) == str(value) for name, value in run.key().items()):
                return row
        row = {**run.key(), "split": "temporal 80/10/10", **train(folder, run)}
        write_rows([row], self.path)
        self.rows.append({name: str(value) for name, value in row.items()})
        return row


def tune(folder: Path, results: Results, dataset: str, variant: str, max_epochs: int) -> tuple[float, float]:
    """Learning rate and dropout of the best validation AUC."""
    pairs = [(rate, dropout) for rate in LEARNING_RATES for dropout in DROPOUTS]
    runs = [Run(dataset, variant, "tuning", TUNING_SEED, max_epochs, *pair) for pair in pairs]
    aucs = [float(results.of(folder, run)["validation_auc"]) for run in runs]
    return pairs[int(np.argmax(aucs))]


def compare(
    folder: Path, results: Results, dataset: str, names: Sequence[str], seeds: Sequence[int], max_epochs: int
) -> dict[str, float]:
    """Variant -> test AUC, mean over the seeds."""
    chosen = {
        name: tune(folder, results, dataset, name, max_epochs)
        for name in dict.fromkeys(TUNED_AS.get(name, "mtgr") for name in names)
    }
    aucs: dict[str, list[float]] = {name: [] for name in names}
    for seed in seeds:
        for name in names:
            run = Run(dataset, name, "final", seed, max_epochs, *chosen[TUNED_AS.get(name, "mtgr")])
            aucs[name].append(float(results.of(folder, run)["auc"]))
    return {name: round(float(np.mean(values)), 5) for name, values in aucs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--source", help="raw files; default: the official download")
    parser.add_argument("--variants", nargs="+", choices=list(variants()), default=list(variants()))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max_epochs", type=int, default=10)
    parser.add_argument("--output", type=Path, help="append the rows to this CSV; runs that it holds are not repeated")
    parser.add_argument("--quick", action="store_true", help="the MLP alone, one seed, one epoch")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.variants, arguments.seeds, arguments.max_epochs = ["dlrm"], [0], 1
    torch.set_num_threads(1)
    results = Results(arguments.output)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / arguments.dataset
        prepare(arguments.dataset, folder, arguments.source, split="temporal", validation="last", ranking=True)
        aucs = compare(folder, results, arguments.dataset, arguments.variants, arguments.seeds, arguments.max_epochs)
    print_headline({f"auc {name}": value for name, value in aucs.items()})


if __name__ == "__main__":
    main()
