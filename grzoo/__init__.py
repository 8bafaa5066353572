"""grzoo: generative recommenders over dynamic embedding tables, trained through DeepSpeed."""

from importlib import import_module
from importlib.metadata import version
from typing import Any

__version__ = version("grzoo")

_PUBLIC_NAMES = {
    "AutoModelForRanking": "grzoo.models",
    "AutoModelForRetrieval": "grzoo.models",
    "DynamicEmbeddingCollection": "grzoo.embeddings",
    "FeatureConfig": "grzoo.embeddings",
    "GenRecProcessor": "grzoo.data",
    "HSTUConfig": "grzoo.models",
    "HSTUForRetrieval": "grzoo.models",
    "HSTUModel": "grzoo.models",
    "Jagged": "grzoo.embeddings",
    "MTGRConfig": "grzoo.models",
    "MTGRForRanking": "grzoo.models",
    "MTGRModel": "grzoo.models",
    "SASRecConfig": "grzoo.models",
    "SASRecForRetrieval": "grzoo.models",
    "SASRecModel": "grzoo.models",
    "TableConfig": "grzoo.embeddings",
    "demo_checkpoint": "grzoo.models",
    "initialize": "grzoo.embeddings.engine",
}

__all__ = ["__version__", *_PUBLIC_NAMES]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC_NAMES:
        return getattr(import_module(_PUBLIC_NAMES[name]), name)
    raise AttributeError(f"module 'grzoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
