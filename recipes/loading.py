"""A model from an export folder or from a checkpoint of a training run."""

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from grzoo.embeddings.engine.checkpoint import verify_checkpoint
from grzoo.embeddings.exchange import Exchange
from grzoo.embeddings.io import load_tables
from grzoo.models import AutoModelForRanking, AutoModelForRetrieval
from grzoo.models.ranking import RankingConfig
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .runtime import UserError


def load_model(path: Path, process_group: dist.ProcessGroup | None = None) -> Any:
    """The model of an export folder or a `checkpoint-N`, in evaluation mode.

    Args:
        path: the folder.
        process_group: shard the tables over its ranks; None: all of them here.

    Raises:
        UserError: the folder is neither.
        ValueError: on all ranks, when a file of a checkpoint is missing or damaged (all checksums are compared).
    """
    if (path / "config.json").is_file():
        model_type = json.loads((path / "config.json").read_text())["model_type"]
        return auto_class(CONFIG_MAPPING[model_type]).from_pretrained(str(path), process_group=process_group).eval()
    if not is_checkpoint(path):
        raise UserError(f"{path} holds no model: give an export folder or a complete checkpoint-N of a training run")
    files = verify_checkpoint(path, Exchange(process_group), but_whole_shards=True)
    options = checkpoint_state(path)["model_config"]
    config = CONFIG_MAPPING[options["model_type"]].from_dict(options)
    model = auto_class(type(config)).from_config(config)
    model.load_state_dict(dense_weights(path))
    model.embeddings.set_process_group(process_group)
    load_tables(model.embeddings, path, state=False, fingerprints=files)
    return model.eval()


def warm_start(model: Any, path: Path) -> None:
    """Set the dense parameters to those of an export folder or a checkpoint; `warm_start_tables` loads the rows.

    Raises:
        UserError: the folder is neither, or holds another model; a parameter and its shapes on both sides are named.
    """
    if (path / "config.json").is_file():
        weights: dict[str, Tensor] = {}
        for file in sorted(path.glob("model*.safetensors")):
            weights |= load_file(file)
    elif is_checkpoint(path):
        weights = dense_weights(path)
    else:
        raise UserError(f"--init_from {path} holds no model: give an export folder or a complete checkpoint-N")
    ours, theirs = ({name: list(t.shape) for name, t in side.items()} for side in (model.state_dict(), weights))
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            there, here = theirs.get(name, "missing"), ours.get(name, "missing")
            raise UserError(f"--init_from {path} holds another model: {name} is {there} there, {here} in this model")
    model.load_state_dict(weights)


def warm_start_tables(model: Any, path: Path) -> None:
    """Load the rows of a folder with fresh optimizer state. Collective."""
    load_tables(model.embeddings, path, state=False, tables=model.embeddings.table_names)


def auto_class(config_class: type) -> Any:
    """The auto class of a model with this configuration."""
    return AutoModelForRanking if issubclass(config_class, RankingConfig) else AutoModelForRetrieval


def is_checkpoint(path: Path) -> bool:
    """Whether the folder is a complete checkpoint."""
    return (path / "COMPLETE.json").is_file()


def checkpoint_state(path: Path) -> dict[str, Any]:
    """What the training recipe left in a checkpoint: `model_config`, `dataset_dir`, `step`, position in the data.

    Raises:
        UserError: the checkpoint was written by another program.
    """
    state: dict[str, Any] = json.loads((path / "state.json").read_text()).get("client_state", {})
    if "model_config" not in state:
        raise UserError(f"{path} was not written by recipes/train.py: it does not say which model it holds")
    return state


def dense_weights(path: Path) -> dict[str, Tensor]:
    """The float32 parameters and buffers of a checkpoint, by name, without the optimizer's state."""
    prefix = "model."
    weights: dict[str, Tensor] = {}
    for file in sorted(path.glob("dense-*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                if name.startswith(prefix):
                    weights[name.removeprefix(prefix)] = tensors.get_tensor(name)
    return weights
