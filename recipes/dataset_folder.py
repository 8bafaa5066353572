"""From the name of a log to a prepared dataset folder: found, or made once by rank 0 while the others wait."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from grzoo.data import Catalogue, DatasetSchema, EventDataset
from grzoo.data.prepare import PrepareConfig, prepare
from grzoo.data.prepare.writer import short_source

from .arguments import DataArguments
from .parsing import near, typed_values
from .runtime import Runtime, UserError, user_errors

_OTHER_NAMES = {"amazon-beauty": "amazon14-beauty", "amazon-sports": "amazon14-sports"}  # folders below $GRZOO_DATA
RECIPE_OWNED = ("name", "output_dir", "source", "overwrite")


@dataclasses.dataclass
class LoadedData:
    """What a recipe reads: the folder, what it says of itself, its items, its training events."""

    folder: Path
    schema: DatasetSchema
    catalogue: Catalogue
    train: EventDataset

    @property
    def evaluation_split(self) -> str:
        """The split that is ranked during training: validation when the folder has one."""
        return "validation" if has_split(self.folder, "validation") else "test"

    def identity(self) -> dict[str, Any]:
        """What tells this data from other data: name, split, numbers of rows and items, checksum of the items."""
        digest = hashlib.sha256(self.catalogue.ids.tobytes()).hexdigest()[:16]
        return {"name": self.schema.name, "split": dict(self.schema.split), "rows": len(self.train), "items": digest}


def find_or_prepare(arguments: DataArguments, options: dict[str, Any], runtime: Runtime) -> Path:
    """The dataset folder of a recipe; rank 0 prepares it when it is missing, and a failure stops all ranks.

    Args:
        arguments: the log's name, raw files and folder.
        options: `data:` settings, further fields of `grzoo.data.prepare.PrepareConfig`.

    Raises:
        UserError: unknown option or log, missing or malformed files.
    """
    options = check_options(options)

    def work() -> str:
        folder = Path(arguments.dataset_dir) if arguments.dataset_dir else _cache_folder(arguments, options)
        if (folder / "schema.json").is_file():
            print(f"data     {folder} (prepared before)", flush=True)
            _warn_of_other_settings(arguments, options, DatasetSchema.load(folder))
            return str(folder)
        if arguments.dataset_dir and not (arguments.dataset or arguments.source or options):
            raise UserError(
                f"--dataset_dir {folder} is no dataset folder: prepare it with prepare_data.py, or name the --dataset "
                "that is to be prepared there"
            )
        with user_errors():
            report = prepare(arguments.log_name, folder, source=source_of(arguments), **options)
        print("\n".join(f"data     {line}" for line in report.lines()), flush=True)
        return str(folder)

    folder = Path(runtime.main_first("dataset", work))
    if not (folder / "schema.json").is_file():
        raise UserError(f"rank {runtime.rank} does not see {folder}: give --dataset_dir on a file system of all nodes")
    return folder


def load(folder: Path) -> LoadedData:
    """Opens a dataset folder for training (memory-mapped)."""
    with user_errors():
        schema = DatasetSchema.load(folder)
        return LoadedData(folder, schema, Catalogue.from_folder(folder), EventDataset.from_folder(folder, "train"))


def check_same_data(trained: dict[str, Any] | None, data: LoadedData, checkpoint: str) -> None:
    """Raises UserError unless `data` is what a checkpoint was trained on, by its `identity` (None: not known)."""
    here = data.identity()
    if trained is None or trained == here:
        return
    others = ", ".join(
        f"{key} {trained.get(key)!r} instead of {here[key]!r}" for key in here if trained.get(key) != here[key]
    )
    raise UserError(
        f"{checkpoint} was trained on other data than {data.folder}: {others}. Give the --dataset_dir that it "
        "was trained on; --init_from starts a new run from its weights"
    )


def has_split(folder: Path, split: str) -> bool:
    """Whether the dataset folder has rows of that split."""
    return any((folder / "data").glob(f"{split}-*.parquet"))


def check_options(options: dict[str, Any]) -> dict[str, Any]:
    """The `data:` settings, of the types that preparation takes.

    Raises:
        UserError: a setting that preparation does not know, of another type, or that has its own flag.
    """
    known = [f.name for f in dataclasses.fields(PrepareConfig) if f.name not in RECIPE_OWNED]
    for key in options:
        if key in RECIPE_OWNED:
            flag = {"name": "--dataset", "output_dir": "--dataset_dir", "source": "--source"}.get(key)
            raise UserError(f"set {flag} instead of data.{key}" if flag else f"data.{key} is not for a recipe")
        if key not in known:
            raise UserError(f"unknown data option {key!r}{near(key, known)}")
    with user_errors():
        typed = typed_values(PrepareConfig, {**options, "name": "", "output_dir": ""})
    return {key: getattr(typed, key) for key, value in options.items() if value is not None}


def source_of(arguments: DataArguments) -> str | None:
    """Raw files: as told, else those below $GRZOO_DATA, else None (download)."""
    if arguments.source or not os.environ.get("GRZOO_DATA"):
        return arguments.source
    root = Path(os.environ["GRZOO_DATA"])
    folders = [root / name for name in (arguments.log_name, _OTHER_NAMES.get(arguments.log_name, arguments.log_name))]
    return next((str(folder) for folder in folders if folder.exists()), None)


def _warn_of_other_settings(arguments: DataArguments, options: dict[str, Any], schema: DatasetSchema) -> None:
    """Says which settings a folder that was prepared before does not follow."""
    asked = dict(options)
    if arguments.dataset is not None:
        asked["dataset"] = arguments.dataset
    found = {"dataset": schema.name, **schema.split}
    if schema.options is not None:
        found = {**dataclasses.asdict(PrepareConfig(name="", output_dir="")), **schema.options, **found}
    for name, value in asked.items():
        value = short_source(value) if name == "item_metadata" else value
        if name in found and found[name] != value and name != "max_memory_gb":
            print(f"warning  {name}={value} has no effect: the folder was prepared with {found[name]}", flush=True)
    source = arguments.source
    if source is not None and Path(source).name not in Path(schema.source).parts:
        print(f"warning  --source {source} has no effect: the folder was made from {schema.source}", flush=True)


def _cache_folder(arguments: DataArguments, options: dict[str, Any]) -> Path:
    """A folder named by the log and by everything that shapes it, so that changed settings are prepared anew."""
    source = source_of(arguments)
    files = sorted(Path(source).rglob("*")) if source and Path(source).is_dir() else [Path(source)] if source else []
    state = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    key = hashlib.sha256(json.dumps([options, source, state], sort_keys=True).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("GRZOO_CACHE") or Path.home() / ".cache" / "grzoo")
    return cache / "datasets" / f"{arguments.log_name}-{key}"
