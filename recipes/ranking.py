"""Training of ranking models: config from the data's schema, windows of exposures as samples, AUC as the metric."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grzoo.data import Catalogue, EventDataset, GlobalBatchSampler, RankingCollator, StepLoader
from grzoo.data.schema import DatasetSchema
from grzoo.models import AutoModelForRanking
from grzoo.models.ranking import RankingConfig
from numpy.typing import NDArray
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .assembly import worker_options
from .click_metrics import click_metrics
from .dataset_folder import LoadedData, has_split
from .evaluation import gather
from .parsing import build_config
from .runtime import Runtime, UserError, user_errors
from .settings import Settings

METRICS = ("auc", "gauc", "logloss", "ne")
_FROM_SCHEMA = ("tasks", "user_features", "event_features", "item_features", "cross_features")
_OWNED = {"max_sequence_length": "--max_length", "num_recent": "--num_recent", "embedding_seed": "--seed"}


def is_ranking(model_type: str | None) -> bool:
    """Whether a model of this type ranks given candidates."""
    name = model_type or ""
    return name in CONFIG_MAPPING and issubclass(CONFIG_MAPPING[name], RankingConfig)


def build_ranking_config(settings: Settings, schema: DatasetSchema) -> RankingConfig:
    """The model's configuration: features and tasks of the dataset folder, then the `model:` settings.

    Raises:
        UserError: a folder that was prepared without `ranking`, an unknown hyperparameter or feature.
    """
    options = dict(settings.model_options)
    config_class = CONFIG_MAPPING[options.pop("model_type")]
    about = schema.ranking
    if not about:
        raise UserError(f"{schema.name} was prepared without what ranking models read: set data.ranking to true")
    for name, flag in _OWNED.items():
        if name in options:
            raise UserError(f"set {flag} instead of model.{name}: the batches follow it too")
    decided: dict[str, Any] = {name: list(about[name]) for name in _FROM_SCHEMA if name != "item_features"}
    decided["item_features"] = {name: len(values) for name, values in about["item_features"].items()}
    for name in _FROM_SCHEMA:
        unknown = sorted(set(options.get(name) or []) - set(decided[name]))
        if unknown:
            raise UserError(f"model.{name} names {unknown}; the data set has {list(decided[name])}")
    decided |= {"max_sequence_length": settings.data.max_length, "num_recent": settings.data.num_recent}
    decided["embedding_seed"] = settings.training.seed
    config: RankingConfig = build_config(config_class, {**decided, **options})
    return config


def build_ranking_model(settings: Settings, config: RankingConfig) -> Any:
    """A new model, equal on all ranks."""
    torch.manual_seed(settings.training.seed)
    with user_errors():
        return AutoModelForRanking.from_config(config, embedding_backend=settings.step.backend)


def build_collator(dataset: EventDataset, config: RankingConfig, settings: Settings) -> RankingCollator:
    """The windows and features that the config names."""
    return ranking_collator(dataset, config, seed=settings.training.seed, max_candidates=settings.data.max_candidates)


def ranking_collator(
    dataset: EventDataset, config: RankingConfig, *, num_recent: int | None = None, **options: Any
) -> RankingCollator:
    """A collator of the features and tasks of a model; `num_recent` instead of the config's, where given.

    Raises:
        ValueError: neither the call nor the config says how many events before a sample are its real-time history.
    """
    num_recent = config.num_recent if num_recent is None else num_recent
    if num_recent is None:
        raise ValueError(
            f"the config of this {config.model_type} model has no num_recent, as in exports of earlier versions: give "
            "the number that it was trained with (--num_recent; the recipes' default is 20)"
        )
    return RankingCollator(
        dataset,
        max_length=config.max_sequence_length,
        num_recent=num_recent,
        tasks=list(config.tasks or []),
        user_features=config.user_features,
        event_features=config.event_features,
        item_features=list(config.item_features or {}),
        cross_features=config.cross_features,
        **options,
    )


def build_ranking_loader(settings: Settings, data: LoadedData, config: RankingConfig, runtime: Runtime) -> StepLoader:
    """The balanced global steps of this rank.

    Raises:
        UserError: an empty split, missing columns, or a token budget below the longest sample.
    """
    step = settings.step
    with user_errors():
        collator = build_collator(data.train, config, settings)
        sampler = GlobalBatchSampler(len(collator.windows), step.global_batch_size, seed=settings.training.seed)
        return StepLoader(
            data.train,
            sampler,
            collator,
            world_size=runtime.world_size,
            rank=runtime.rank,
            cost=config.flops,
            max_tokens_per_device=step.max_tokens_per_device,
            micro_batches=step.micro_batches,
            **worker_options(settings),
        )


class RankingEvaluator:
    """AUC, GAUC, log loss and NE of every exposure of a split, once; the first task without a prefix.

    Args:
        folder: dataset folder.
        split: "validation" or "test".
        catalogue: gives the training counts of the popularity baseline.
        config: of the model: features, tasks, cost.
        batch_size: samples of a forward pass over all ranks.
        options: of `ranking_collator`: max_candidates, num_recent.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        catalogue: Catalogue,
        config: RankingConfig,
        runtime: Runtime,
        *,
        batch_size: int,
        max_tokens: int | None = None,
        **options: Any,
    ) -> None:
        self.split, self.catalogue, self.tasks, self.runtime = split, catalogue, list(config.tasks or []), runtime
        dataset = EventDataset.from_folder(folder, split)
        collator = ranking_collator(dataset, config, **options)
        self.loader = StepLoader(
            dataset,
            GlobalBatchSampler(len(collator.windows), batch_size, shuffle=False),
            collator,
            world_size=runtime.world_size,
            rank=runtime.rank,
            cost=config.flops,
            max_tokens_per_device=max_tokens,
        )

    @property
    def metric_names(self) -> list[str]:
        """What an evaluation gives; the first is the metric that decides unless another is asked for."""
        return [(name if at == 0 else f"{task}/{name}") for at, task in enumerate(self.tasks) for name in METRICS]

    def __call__(self, model: Any) -> dict[str, float]:
        """Metrics of `model` (its forward gives `logits`). Collective."""
        device = next(model.parameters()).device

        def logits(batch: dict[str, Any]) -> Tensor:
            fields = {name: value for name, value in batch.items() if not name.startswith("label")}
            inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in fields.items()}
            found: Tensor = model(**inputs).logits[0].double().cpu()
            return found

        with model.inference():
            return self._metrics(logits, METRICS)

    def popularity(self) -> dict[str, float]:
        """AUC and GAUC of the number of an item's training events. Collective."""
        counts = self.catalogue.counts

        def logits(batch: dict[str, Any]) -> Tensor:
            at = self.catalogue.index_of(batch["candidate_ids"][0].numpy())
            found = torch.from_numpy(np.where(at >= 0, counts[at], 0).astype(np.float64))
            return found.unsqueeze(1).expand(-1, len(self.tasks))

        return self._metrics(logits, ("auc", "gauc"))

    def _metrics(self, logits: Callable[[dict[str, Any]], Tensor], wanted: tuple[str, ...]) -> dict[str, float]:
        parts: list[list[Tensor]] = [[], [], [], []]
        self.loader._position = (0, 0)
        for step in self.loader:
            for batch in step.micro_batches:
                users: Any = batch["user_ids"]
                starts: Any = batch["cu_seq_lens_candidates"]
                fields: tuple[Any, ...] = (
                    torch.repeat_interleave(users, starts.diff()),
                    logits(batch),
                    batch["labels"],
                    batch["label_mask"],
                )
                for part, value in zip(parts, (fields[0], fields[1], fields[2][0], fields[3][0]), strict=True):
                    part.append(value)
        users, scores, labels, mask = (self._gathered(part) for part in parts)
        metrics: dict[str, float] = {}
        for at, task in enumerate(self.tasks):
            known = mask[:, at].astype(bool)
            found = click_metrics(labels[known, at], scores[known, at], users[known, 0])
            metrics |= {(name if at == 0 else f"{task}/{name}"): found[name] for name in wanted}
        return metrics

    def _gathered(self, part: list[Tensor]) -> NDArray[Any]:
        """Values of all ranks, [n, k]."""
        mine = torch.cat(part)
        columns = mine.reshape(len(mine), -1).double()
        flat = gather(columns.flatten(), self.runtime)
        return flat.view(-1, columns.shape[1]).numpy()


def ranking_evaluators(
    settings: Settings, data: LoadedData, config: RankingConfig, runtime: Runtime
) -> dict[str, RankingEvaluator]:
    """One for each held-out split."""
    splits = ["validation", "test"] if has_split(data.folder, "validation") else ["test"]
    with user_errors():
        return {
            split: RankingEvaluator(
                data.folder,
                split,
                data.catalogue,
                config,
                runtime,
                batch_size=settings.evaluation.eval_batch_size,
                max_tokens=settings.step.max_tokens_per_device,
                max_candidates=settings.data.max_candidates,
            )
            for split in splits
        }
