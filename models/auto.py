"""Auto classes of tasks that transformers does not have."""

import os
from collections import OrderedDict
from typing import Any

import torch.distributed as dist
from transformers.models.auto.auto_factory import _BaseAutoModelClass, _LazyAutoMapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

MODEL_FOR_RETRIEVAL_MAPPING = _LazyAutoMapping(CONFIG_MAPPING_NAMES, OrderedDict())
MODEL_FOR_RANKING_MAPPING = _LazyAutoMapping(CONFIG_MAPPING_NAMES, OrderedDict())


class SharedGroup:
    """A process group among the keyword arguments of an auto class, which copies them; a group cannot be copied."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedGroup":
        return self


class _AutoModelWithTables(_BaseAutoModelClass):
    """An auto class whose `from_pretrained` takes a process group for the tables."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        process_group: dist.ProcessGroup | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `GenRecPreTrainedModel.from_pretrained`, for whichever model the folder or hub repository holds."""
        if process_group is not None:
            kwargs["process_group"] = SharedGroup(process_group)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)


class AutoModelForRetrieval(_AutoModelWithTables):
    """Loads the retrieval model that a folder or hub repository holds, tables included.

    `transformers.AutoModel` would load the bare backbone; recommending needs this class.

    Example:
        model = AutoModelForRetrieval.from_pretrained("path/or/hub-id")
        model.recommend(history, top_k=10)
    """

    _model_mapping: Any = MODEL_FOR_RETRIEVAL_MAPPING


class AutoModelForRanking(_AutoModelWithTables):
    """Loads the ranking model that a folder or hub repository holds, tables included.

    Example:
        model = AutoModelForRanking.from_pretrained("path/or/hub-id")
        model.score(history, candidates, timestamps=times, candidate_timestamps=now)
    """

    _model_mapping: Any = MODEL_FOR_RANKING_MAPPING


__all__ = [
    "AutoModelForRanking",
    "AutoModelForRetrieval",
    "MODEL_FOR_RANKING_MAPPING",
    "MODEL_FOR_RETRIEVAL_MAPPING",
]
