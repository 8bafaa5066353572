"""Raw logs -> dataset folders.

report = prepare("ml-1m", "out/ml-1m", source="raw/ml-1m")
print("\\n".join(report.lines()))
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import amazon, event_log, movielens, synthetic
from .append import HistoryStore, append_day, days
from .config import PrepareConfig, without_effect
from .histogram import PLOT_FILE, plot_lengths
from .log import EventLog, GroupedLog, group, k_core
from .ranking import add_ranking_columns
from .report import Report, card, report_of
from .splits import Split, split_log
from .writer import check_free, new_folder, replace_folder, schema_of, train_counts, write_items, write_splits

__all__ = [
    "EventLog",
    "HistoryStore",
    "PrepareConfig",
    "Report",
    "append_day",
    "days",
    "names",
    "prepare",
    "prepare_log",
    "read_log",
]

_COMMON = frozenset({"overwrite", "split", "validation", "cutoff", "test_fraction", "k_core", "id_mapping", "ranking"})
_Reader = Callable[[PrepareConfig], EventLog]


def _sources() -> dict[str, tuple[_Reader, frozenset[str]]]:
    """name -> (reader, options that it reads besides the common ones)."""
    return {
        "synthetic": (synthetic.read, synthetic.OPTIONS),
        **dict.fromkeys(movielens.NAMES, (movielens.read, movielens.OPTIONS)),
        **dict.fromkeys(amazon.CATEGORIES, (amazon.read, amazon.OPTIONS)),
        "amazon": (amazon.read, amazon.OPTIONS | {"category"}),
        "event_log": (event_log.read, event_log.OPTIONS),
    }


def names() -> list[str]:
    """Names of the data sets that can be prepared."""
    return sorted(_sources())


def prepare(name: str, output_dir: str | Path, source: str | Path | None = None, **options: Any) -> Report:
    """Make a dataset folder of a data set.

    name: one of `names()`.  output_dir: the folder to make.  source: file or folder of the raw data; None downloads it.
    options: fields of PrepareConfig.  Raises ValueError or FileNotFoundError naming what is wrong; then no folder is
    made.
    """
    config, reader = _reader(name, output_dir, source, options)
    check_free(Path(config.output_dir), config.overwrite)
    if config.max_memory_gb is not None and reader is event_log.read:
        return _prepare_out_of_core(config)
    return prepare_log(reader(config), config)


def read_log(name: str, source: str | Path | None = None, **options: Any) -> EventLog:
    """The events of a data set, in the order of its files; arguments and errors as for `prepare`."""
    config, reader = _reader(name, "", source, options)
    return reader(config)


def _reader(
    name: str, output_dir: str | Path, source: str | Path | None, options: dict[str, Any]
) -> tuple[PrepareConfig, _Reader]:
    config = PrepareConfig(
        name=name, output_dir=str(output_dir), source=None if source is None else str(source), **options
    )
    readers = _sources()
    if name not in readers:
        raise ValueError(f"there is no data set {name!r}; there are {', '.join(names())}")
    reader, known = readers[name]
    for option in sorted(config.changed() - known - _COMMON):
        warnings.warn(f"option {option} has no effect on {name}", stacklevel=3)
    for option, why in without_effect(config).items():
        if option in known | _COMMON:
            warnings.warn(f"option {option} has no effect {why}", stacklevel=3)
    return config, reader


def _prepare_out_of_core(config: PrepareConfig) -> Report:
    from .out_of_core import OutOfCore

    job = OutOfCore(config)
    try:
        grouped = job.group()
        split = split_log(grouped, config)
        report = report_of(config, grouped, split)
        job.folder.mkdir(exist_ok=True)
        _write(job.folder, config, grouped, split, report)
    except ValueError:
        job.discard()  # the input is wrong: nothing of it is of use to another call
        raise
    replace_folder(job.folder, Path(config.output_dir))
    job.discard()
    return report


def prepare_log(log: EventLog, config: PrepareConfig) -> Report:
    """Make a dataset folder of a log of events."""
    if config.k_core > 1:
        log = k_core(log, config.k_core)
    if config.ranking:
        log = add_ranking_columns(log)
    grouped = group(log, config.id_mapping)
    split = split_log(grouped, config)
    report = report_of(config, grouped, split)
    with new_folder(config.output_dir, config.overwrite) as folder:
        _write(folder, config, grouped, split, report)
    return report


def _write(folder: Path, config: PrepareConfig, grouped: GroupedLog, split: Split, report: Report) -> None:
    write_splits(folder, grouped, split)
    write_items(folder, grouped, train_counts(grouped, split))
    schema_of(grouped, config, split, report.statistics).save(folder)
    has_plot = plot_lengths(grouped.lengths, folder / PLOT_FILE)
    (folder / "README.md").write_text(card(report, split, grouped.id_mapping, has_plot), encoding="utf-8")
