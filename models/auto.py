"""Auto classes of tasks that transformers does not have."""

from collections import OrderedDict

from transformers.models.auto.auto_factory import _BaseAutoModelClass, _LazyAutoMapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

MODEL_FOR_RETRIEVAL_MAPPING = _LazyAutoMapping(CONFIG_MAPPING_NAMES, OrderedDict())


class AutoModelForRetrieval(_BaseAutoModelClass):
    """Loads the retrieval model that a folder or hub repository holds, tables included.

    `transformers.AutoModel` would load the bare backbone; recommending needs this class.

    Example:
        model = AutoModelForRetrieval.from_pretrained("path/or/hub-id")
        model.recommend(history, top_k=10)
    """

    _model_mapping = MODEL_FOR_RETRIEVAL_MAPPING


__all__ = ["AutoModelForRetrieval", "MODEL_FOR_RETRIEVAL_MAPPING"]
