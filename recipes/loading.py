"""A model from an export folder or from a checkpoint of a training run."""

from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from grzoo.embeddings.io import load_tables
from grzoo.models import AutoModelForRetrieval

from .runtime import UserError


def load_model(path: Path, process_group: dist.ProcessGroup | None = None) -> Any:
    """The model of an export folder or a `checkpoint-N`, in evaluation mode.

    Args:
        path: the folder.
        process_group: shard the tables over its ranks; None: all of them here.

    Raises:
        UserError: the folder is neither.
    """
    if (path / "config.json").is_file():
        return AutoModelForRetrieval.from_pretrained(str(path), process_group=process_group).eval()
    if not is_checkpoint(path):
        raise UserError(f"{path} holds no model: give an export folder or a complete checkpoint-N of a training run")
    options = checkpoint_state(path)["model_config"]
    config = CONFIG_MAPPING[options["model_type"]].from_dict(options)
    model = AutoModelForRetrieval.from_config(config)
    model.load_state_dict(dense_weights(path))
    model.embeddings.set_process_group(process_group)
    load_tables(model.embeddings, path, state=False)
    return model.eval()


def is_checkpoint(path: Path) -> bool:
    """Whether the folder is a complete checkpoint."""
    return (path / "COMPLETE.json").is_file()
