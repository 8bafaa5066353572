"""From a person's history to model inputs and back: the processor that is saved and pushed with a model."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi
from numpy.typing import ArrayLike
from transformers import BatchFeature, FeatureExtractionMixin
from transformers.utils import cached_file, logging
from transformers.utils.hub import extract_commit_hash

from .catalogue import Catalogue, OriginalId
from .jagged import Int64, offsets_of, within
from .schema import ITEMS_FILE, SCHEMA_FILE, DatasetSchema

logger = logging.get_logger(__name__)

CONFIG_FILE = "preprocessor_config.json"
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
_UNKNOWN = ("error", "skip", "keep")


class GenRecProcessor(FeatureExtractionMixin):
    """Encodes histories of original item ids, and decodes model ids to original ids and titles.

    catalogue, schema: of the dataset folder that the model was trained on.  max_length: events that the model sees,
    applied only with `truncation=True` (models cut histories themselves, and what is cut still counts as seen).
    unknown: what to do with an item that the catalogue lacks: "error", "skip" it with a warning, or "keep" it where
    it has a model id all the same (a hash, or an integer that is its own id). None: "keep" for hashed catalogues,
    else "error".

        processor = GenRecProcessor.from_pretrained("user/hstu-ml-1m")
        inputs = processor([["tt0133093", "tt0234215"]], timestamps=[[978300760, 978302109]])
        processor.titles(model.recommend(**inputs).item_ids)
    """

    def __init__(
        self,
        catalogue: Catalogue,
        schema: DatasetSchema,
        *,
        max_length: int | None = None,
        unknown: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1 event, got {max_length}")
        self.catalogue = catalogue
        self.schema = schema
        self.max_length = max_length
        self.unknown = self._policy(unknown or ("keep" if catalogue.id_mapping == "hash" else "error"))

    def _policy(self, unknown: str) -> str:
        if unknown not in _UNKNOWN:
            raise ValueError(f"unknown is {unknown!r}; it is one of {', '.join(_UNKNOWN)}")
        if unknown == "keep" and self.catalogue.id_mapping == "vocabulary":
            raise ValueError("a vocabulary has no ids for unknown items: set unknown to 'error' or 'skip'")
        return unknown

    @classmethod
    def from_dataset(cls, folder: str | Path, *, max_length: int | None = None, unknown: str | None = None) -> Any:
        """The processor of a dataset folder."""
        schema = DatasetSchema.load(folder)
        return cls(Catalogue.from_folder(folder, schema.id_mapping), schema, max_length=max_length, unknown=unknown)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> "GenRecProcessor":
        """Load from a folder or from the hub (`revision`, `token`, `cache_dir`, ... as in transformers)."""
        name = str(pretrained_model_name_or_path)
        hub = {option: kwargs.pop(option) for option in _HUB_OPTIONS if option in kwargs}
        if not os.path.isdir(name):  # resolved once, so that all files are of one commit
            hub["revision"] = extract_commit_hash(_file(name, CONFIG_FILE, hub), None) or hub.get("revision", "main")
        values, rest = cls.get_feature_extractor_dict(name, **hub, **kwargs)
        schema = DatasetSchema.load(Path(_file(name, SCHEMA_FILE, hub)).parent)
        catalogue = Catalogue.from_folder(Path(_file(name, ITEMS_FILE, hub)).parent, schema.id_mapping)
        known = {key: values[key] for key in ("max_length", "unknown") if key in values}
        known |= {key: rest[key] for key in known if key in rest}
        return cls(catalogue, schema, **known)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Write `preprocessor_config.json`, `schema.json` and `items.parquet`; `push_to_hub` uploads these three."""
        folder = Path(save_directory)
        (path,) = super().save_pretrained(str(folder))
        self.schema.save(folder)
        self.catalogue.save(folder)
        if push_to_hub:
            self._upload(folder, **kwargs)
        return [path, str(folder / SCHEMA_FILE), str(folder / ITEMS_FILE)]

    def _upload(self, folder: Path, repo_id: str | None = None, **kwargs: Any) -> None:
        api = HfApi(token=kwargs.pop("token", None))
        message, revision = kwargs.pop("commit_message", "Upload processor"), kwargs.pop("revision", None)
        repository = api.create_repo(repo_id or folder.name, exist_ok=True, private=kwargs.pop("private", None)).repo_id
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[CONFIG_FILE, SCHEMA_FILE, ITEMS_FILE],
            commit_message=message,
            revision=revision,
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `preprocessor_config.json`."""
        return {
            "feature_extractor_type": type(self).__name__,
            "max_length": self.max_length,
            "unknown": self.unknown,
        }

    def __call__(
        self,
        histories: Sequence[Sequence[OriginalId]],
        timestamps: Sequence[Sequence[int]] | None = None,
        request_timestamps: Sequence[int] | None = None,
        *,
        packed: bool = False,
        truncation: bool = False,
        unknown: str | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Inputs of a model's `recommend` for B histories of original item ids, oldest event first.

        timestamps: seconds of each event.  request_timestamps: seconds [B], when each user asks.
        Returns `input_ids` and `attention_mask` int64 [B, L], padded at the end (and `timestamps` [B, L]), or packed:
        `input_ids`, `position_ids` (and `timestamps`) int64 [1, T], `cu_seq_lens_q` int32 [B + 1], `max_length_q`;
        `request_timestamps` int64 [B]. Raises ValueError for an item that the catalogue lacks (see `unknown`) and for
        times that do not match the histories.
        """
        if return_tensors not in ("pt", "np"):
            raise ValueError(f"return_tensors is {return_tensors!r}; it is 'pt' or 'np'")
        for history in histories:
            if isinstance(history, int | np.integer):
                raise ValueError(
                    f"histories must be a list of lists of item ids, got the item {history}: write [[...]]"
                )
        counts = np.array([len(history) for history in histories], dtype=np.int64)
        columns = {"input_ids": np.zeros(0, dtype=np.int64)}
        flat = [item for history in histories for item in history]
        columns["input_ids"], keep = self._encode(flat, self._policy(unknown) if unknown else self.unknown)
        if timestamps is not None:
            columns["timestamps"] = _times(timestamps, counts)
        if truncation:
            keep &= self._recent(counts)
        owner = np.repeat(np.arange(len(counts)), counts)[keep]
        counts = np.bincount(owner, minlength=len(counts)).astype(np.int64)
        columns = {name: values[keep] for name, values in columns.items()}
        arrays = _packed(columns, counts) if packed else _padded(columns, counts)
        if request_timestamps is not None:
            arrays["request_timestamps"] = np.asarray(request_timestamps, dtype=np.int64)
            if arrays["request_timestamps"].shape != (len(counts),):
                raise ValueError(f"request_timestamps needs one time for each of the {len(counts)} histories")
        if return_tensors == "pt":
            arrays = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in arrays.items()}
        return BatchFeature(arrays)

    def _encode(self, items: list[OriginalId], unknown: str) -> tuple[Int64, Any]:
        ids, known = self.catalogue.encode(items)
        if known.all() or unknown == "keep":
            return ids, np.ones(len(ids), dtype=bool)
        missing = [items[int(at)] for at in np.flatnonzero(~known)]
        if unknown == "error":
            raise ValueError(
                f"the catalogue has no item {missing[0]!r}: leave it out of the history, or pass unknown='skip'"
            )
        logger.warning(f"skipped {len(missing)} unknown items, the first is {missing[0]!r}")
        return ids, known

    def _recent(self, counts: Int64) -> Any:
        if self.max_length is None:
            raise ValueError("truncation needs a max_length: set processor.max_length")
        return within(counts) >= np.repeat(counts - self.max_length, counts)

    def decode(self, item_ids: ArrayLike | torch.Tensor) -> list[Any]:
        """Original ids of model ids, in the nesting of `item_ids` ([k] or [B, k]); None where unknown."""
        return _nested(self.catalogue.decode, item_ids)

    def titles(self, item_ids: ArrayLike | torch.Tensor) -> list[Any]:
        """Names of items by model id, in the nesting of `item_ids` ([k] or [B, k])."""
        return _nested(self.catalogue.titles, item_ids)


def _file(name: str, file: str, hub: dict[str, Any]) -> str:
    path = cached_file(name, file, **hub)
    if path is None:
        raise FileNotFoundError(f"{name} has no {file}: it was saved without its processor")
    return str(path)


def _times(timestamps: Sequence[Sequence[int]], counts: Int64) -> Int64:
    given = [len(times) for times in timestamps]
    if given != counts.tolist():
        raise ValueError(
            f"timestamps have the lengths {given[:8]}, the histories {counts[:8].tolist()}: they must agree"
        )
    return np.array([time for times in timestamps for time in times], dtype=np.int64)


def _packed(columns: dict[str, Int64], counts: Int64) -> dict[str, Any]:
    arrays: dict[str, Any] = {name: values[None] for name, values in columns.items()}
    arrays["position_ids"] = within(counts)[None]
    arrays["cu_seq_lens_q"] = offsets_of(counts).astype(np.int32)
    arrays["max_length_q"] = int(counts.max(initial=0))
    return arrays


def _padded(columns: dict[str, Int64], counts: Int64) -> dict[str, Any]:
    shape = (len(counts), int(counts.max(initial=0)))
    row, place = np.repeat(np.arange(len(counts)), counts), within(counts)
    arrays: dict[str, Any] = {}
    for name, values in {**columns, "attention_mask": np.ones(len(place), dtype=np.int64)}.items():
        arrays[name] = np.zeros(shape, dtype=np.int64)
        arrays[name][row, place] = values
    return arrays


def _nested(function: Any, item_ids: ArrayLike | torch.Tensor) -> list[Any]:
    array = item_ids.cpu().numpy() if isinstance(item_ids, torch.Tensor) else np.asarray(item_ids, dtype=np.int64)
    flat = function(array)
    if array.ndim < 2:
        return list(flat)
    return [flat[first : first + array.shape[-1]] for first in range(0, len(flat), array.shape[-1])]
