"""A trained model as a Hugging Face folder: weights, tables, processor, model card."""

from pathlib import Path
from typing import Any

from grzoo.data import GenRecProcessor
from grzoo.embeddings.engine import GenRecEngine
from grzoo.embeddings.engine.dense import DenseState
from transformers.utils.logging import disable_progress_bar

from .dataset_folder import LoadedData
from .model_card import model_card


def export(
    engine: GenRecEngine,
    data: LoadedData,
    folder: Path,
    *,
    metrics: dict[str, float],
    baseline: dict[str, float],
    conditions: dict[str, str],
    command: str,
    split: str = "test",
) -> None:
    """Writes `folder` for `AutoModelForRetrieval.from_pretrained` and `GenRecProcessor.from_pretrained`. Collective.

    Dense weights are the float32 masters, gathered over the ranks; tables go in shards, each rank writing its rows.

    Args:
        data: gives the processor (ids, titles).
        metrics, baseline: test metrics of the model and of popularity, for the card.
        conditions: what the run was made with.
        command: the command line that made it.
        split: what the metrics are of.
    """
    disable_progress_bar()  # of the few files that transformers writes
    dense = DenseState(engine.deepspeed)
    weights = {name: dense.gather(name, state=False)[f"model.{name}"] for name in dense.names()}
    model: Any = engine.module
    model.save_pretrained(folder, state_dict=weights)
    if engine.deepspeed.global_rank == 0:
        GenRecProcessor.from_dataset(data.folder, max_length=model.config.max_sequence_length).save_pretrained(folder)
        card = model_card(
            model, data, metrics=metrics, baseline=baseline, conditions=conditions, command=command, split=split
        )
        (folder / "README.md").write_text(card)
