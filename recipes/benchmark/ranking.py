"""Ranking models at equal features on MovieLens: MTGR, its ablations, DLRM-HSTU, a DLRM-style MLP, over seeds.

    python -m grzoo.recipes.benchmark.ranking --quick                                   # under a minute, no result
    python -m grzoo.recipes.benchmark.ranking --dataset ml-100k --source RAW --output results/ranking.csv

Each variant trains in this process (Adam, dense and tables), is evaluated on the validation part after every epoch, and
reports the test metrics of its best epoch by validation AUC of the first task. One CSV row per variant and seed.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grzoo.data import Catalogue, DatasetSchema, EventDataset, GlobalBatchSampler, StepLoader
from grzoo.data.prepare import prepare
from grzoo.embeddings import SparseAdam
from grzoo.models import AutoModelForRanking, DLRMConfig, DLRMHSTUConfig, MTGRConfig
from grzoo.models.ranking import RankingConfig
from grzoo.recipes.ranking import RankingEvaluator, ranking_collator
from grzoo.recipes.runtime import Runtime

from .reporting import print_headline, write_rows

BATCH, LEARNING_RATE, DROPOUT, WIDTH, LENGTH = 32, 3e-3, 0.2, 32, 100
_Maker = Callable[..., RankingConfig]


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


def train(folder: Path, config: RankingConfig, seed: int, epochs: int) -> dict[str, Any]:
    """Test metrics of the epoch that is best on the validation part."""
    torch.manual_seed(seed)
    model = AutoModelForRanking.from_config(config).train()
    dense = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    sparse = SparseAdam(model.embeddings, LEARNING_RATE)
    dataset = EventDataset.from_folder(folder, "train")
    collator = ranking_collator(dataset, config, seed=seed)
    loader = StepLoader(dataset, GlobalBatchSampler(len(collator.windows), BATCH, seed=seed), collator)
    runtime, catalogue = Runtime(0, 0, 1, 1), Catalogue.from_folder(folder)
    evaluators = [
        RankingEvaluator(folder, split, catalogue, config, runtime, batch_size=256) for split in ("validation", "test")
    ]
    best: dict[str, Any] = {"validation_auc": -1.0}
    began = time.perf_counter()
    for epoch in range(1, epochs + 1):
        for step in loader:
            rows = model.embeddings.prepare([model.embedding_ids(batch) for batch in step.micro_batches]).fetch()
            for k, batch in enumerate(step.micro_batches):
                model(**batch, embeddings=rows[k], num_items_in_batch=step.num_items_in_batch).loss.backward()
            dense.step()
            dense.zero_grad()
            sparse.reduce()
            sparse.step()
        found = evaluators[0](model)["auc"]
        if found > best["validation_auc"]:
            test = {name.replace("/", "_"): round(value, 5) for name, value in evaluators[1](model).items()}
            best = {"best_epoch": epoch, "validation_auc": round(found, 5), **test}
    parameters = sum(p.numel() for p in model.parameters())
    return {**best, "dense_parameters": parameters, "seconds": round(time.perf_counter() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--source", help="raw files; default: the official download")
    parser.add_argument("--variants", nargs="+", choices=list(variants()), default=list(variants()))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--output", type=Path, help="append the rows to this CSV")
    parser.add_argument("--quick", action="store_true", help="one epoch, one seed, MTGR and the MLP")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.variants, arguments.seeds, arguments.epochs = ["mtgr", "dlrm"], [0], 1
    aucs: dict[str, list[float]] = {name: [] for name in arguments.variants}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / arguments.dataset
        prepare(arguments.dataset, folder, arguments.source, split="temporal", validation="last", ranking=True)
        features = features_of(DatasetSchema.load(folder))
        for seed in arguments.seeds:
            for name in arguments.variants:
                make, changed = variants()[name]
                common = {"hidden_size": WIDTH, "embedding_dim": 16, "hidden_dropout": DROPOUT, "embedding_seed": seed}
                common["max_sequence_length"] = LENGTH
                found = train(folder, make(**{**features, **common, **changed}), seed, arguments.epochs)
                conditions = {"dataset": arguments.dataset, "split": "temporal 80/10/10", "variant": name, "seed": seed}
                fixed = {
                    "epochs": arguments.epochs,
                    "batch": BATCH,
                    "learning_rate": LEARNING_RATE,
                    "width": WIDTH,
                    "length": LENGTH,
                }
                write_rows([{**conditions, **fixed, **found}], arguments.output)
                aucs[name].append(found["auc"])
    print_headline({f"auc {name}": round(float(np.mean(values)), 5) for name, values in aucs.items()})


if __name__ == "__main__":
    main()
