"""Saving and loading a GenRecEngine: dense and sparse side, schedulers, counters and the caller's state."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from grzoo.embeddings.exchange import Exchange
from grzoo.embeddings.files import DamagedFile, Fingerprint, write_text
from grzoo.embeddings.io import INDEX_NAME, load_tables, read_index, save_tables, whole_shards
from grzoo.embeddings.saving import check_between_steps, of_all_ranks
from safetensors import SafetensorError

from grzoo import __version__

from . import folder as folders
from .dense import DenseState
from .dense_io import check_dense, load_dense, save_dense
from .training_state import check_training_state, restore_training_state, training_state

if TYPE_CHECKING:
    from .engine import GenRecEngine

logger = logging.getLogger(__name__)

STATE = "state.json"

T = TypeVar("T")


def save_checkpoint(engine: "GenRecEngine", save_dir: Path, tag: str, client_state: Mapping[str, Any]) -> Path:
    """See `GenRecEngine.save_checkpoint`."""
    exchange = engine.exchange
    check_between_steps(engine.collection)
    target = save_dir / tag
    state = _together(exchange, lambda: _encode_state(engine, tag, client_state))
    try:
        _together(exchange, lambda: folders.start(target) if exchange.rank == 0 else None)
        temporary = _together(exchange, lambda: _visible(folders.temporary_path(target)))
        files = save_dense(DenseState(engine.deepspeed), temporary, exchange)
        files |= save_tables(engine.collection, temporary, state=True)
        if written := _together(exchange, lambda: write_text(temporary / STATE, state) if exchange.rank == 0 else None):
            files[STATE] = written
        files = of_all_ranks(exchange, files)
        seal = engine.global_steps
        _together(exchange, lambda: folders.publish(target, files, seal) if exchange.rank == 0 else None)
    except Exception:
        if exchange.rank == 0:
            shutil.rmtree(folders.temporary_path(target), ignore_errors=True)
        raise
    return target


def load_checkpoint(engine: "GenRecEngine", load_dir: Path, tag: str | None) -> tuple[Path, dict[str, Any]]:
    """See `GenRecEngine.load_checkpoint`."""
    exchange, dense = engine.exchange, DenseState(engine.deepspeed)

    def load_rows(target: Path) -> tuple[Path, dict[str, Any]]:
        """All that can fail; changes nothing when it does."""
        files = verify_checkpoint(target, exchange, but_whole_shards=True)
        state = _together(exchange, lambda: _read_state(target))
        _together(exchange, lambda: _check_fits(engine, dense, target, state))
        load_tables(engine.collection, target, state=True, fingerprints=files)
        return target, state

    target, state = _first_undamaged(load_dir, tag, exchange, load_rows)
    dense.create_states(state["dense"]["states"], state["dense"]["scalars"])
    load_dense(dense, target, exchange)
    restore_training_state(engine, state)
    return target, state["client_state"]


def find_checkpoint(load_dir: Path, tag: str | None, exchange: Exchange) -> Path:
    """The checkpoint to load, verified against its checksums: the one that is named, else the newest undamaged one.

    A damaged newer one is passed over with a warning. Collective; each rank reads a part of the files.

    Raises:
        ValueError: on every rank, when there is none, or the one that is named is damaged.
    """

    def verified(path: Path) -> Path:
        verify_checkpoint(path, exchange)
        return path

    return _first_undamaged(load_dir, tag, exchange, verified)


def _first_undamaged(load_dir: Path, tag: str | None, exchange: Exchange, use: Callable[[Path], T]) -> T:
    """What `use` makes of the checkpoint that is named, else of the newest that is not damaged. Collective.

    `use` raises DamagedFile on some rank, and ValueError on all, when it is damaged; other errors are passed on.
    """
    names = [tag] if tag is not None else _from_first(exchange, lambda: _candidate_names(load_dir))
    is_named = tag is not None or names == [""]
    damage: list[str] = []
    for path in [load_dir / name for name in names]:
        try:
            found = use(path)
        except Exception as error:  # on every rank, though not of one type
            damaged = exchange.sum_int(int(isinstance(error, DamagedFile)))
            others = exchange.sum_int(int(not isinstance(error, ValueError)))
            if is_named or others or not damaged:
                raise
            damage.append(str(error))
            continue
        for message in damage if exchange.rank == 0 else ():
            logger.warning("passed over: %s", message)
        return found
    detail = "; ".join(damage) or "it has no folder checkpoint-N"
    raise ValueError(f"no complete checkpoint in {load_dir}: {detail}")


def _candidate_names(load_dir: Path) -> list[str]:
    if (load_dir / folders.COMPLETE).exists():
        return [""]  # the folder itself
    return [path.name for path in folders.candidates(load_dir)]


def verify_checkpoint(path: Path, exchange: Exchange, *, but_whole_shards: bool = False) -> dict[str, Fingerprint]:
    """Compares all files of a checkpoint with their checksums, each rank a part of them. Collective.

    Args:
        but_whole_shards: leave out those shards of tables that `load_tables` compares itself, given what this returns.

    Returns: sizes and checksums of the files.

    Raises:
        ValueError: on every rank, naming what is missing or damaged (a DamagedFile on the rank that has met it).
    """

    def check() -> dict[str, Fingerprint]:
        files = folders.read_seal(path)
        for name in (STATE, INDEX_NAME):
            if name not in files:
                raise ValueError(f"{path} is damaged: its {folders.COMPLETE} does not list {name}")
        left_out: set[str] = set()
        if but_whole_shards:
            folders.check_file(path, INDEX_NAME, files[INDEX_NAME])
            left_out = whole_shards(read_index(path)["metadata"], exchange.world_size)
            if unlisted := sorted(left_out - files.keys()):
                raise ValueError(f"{path} is damaged: its {folders.COMPLETE} does not list {unlisted[0]}")
        for name in sorted(files.keys() - left_out)[exchange.rank :: exchange.world_size]:
            folders.check_file(path, name, files[name])
        sealed, saved = folders.sealed_step(path), _steps(_read_state(path))
        if sealed != saved:
            raise ValueError(f"{path} is damaged: {folders.COMPLETE} is of step {sealed}, {STATE} of step {saved}")
        return files

    def named() -> dict[str, Fingerprint]:
        try:
            return check()
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise DamagedFile(
                str(error) if isinstance(error, ValueError) else f"{path} is damaged: {error!r}"
            ) from error

    return _together(exchange, named)


def _check_fits(engine: "GenRecEngine", dense: DenseState, target: Path, state: dict[str, Any]) -> None:
    try:
        check_training_state(engine, state, target)
        check_dense(dense, target, state["dense"])
    except (KeyError, TypeError, AttributeError, IndexError, SafetensorError) as error:
        raise ValueError(f"{target} is not a checkpoint that this grzoo can read: {error!r}") from error


def _encode_state(engine: "GenRecEngine", tag: str, client_state: Mapping[str, Any]) -> str:
    if Path(tag).name != tag or tag in (".", ".."):
        raise ValueError(f"tag {tag!r} is not the name of a folder")
    dense = DenseState(engine.deepspeed)
    state = {
        "format_version": folders.FORMAT_VERSION,
        "versions": {"grzoo": __version__, "torch": str(torch.__version__)},
        "dense": {"states": dense.state_keys(), "scalars": dense.scalars()},
        **training_state(engine),
    }
    try:
        return json.dumps(state | {"client_state": dict(client_state)}, indent=1)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"client_state or a scheduler's state is not JSON: {error}; pass numbers and strings"
        ) from error


def _read_state(target: Path) -> dict[str, Any]:
    state = folders.read_json(target / STATE)
    if state.get("format_version") != folders.FORMAT_VERSION:
        raise ValueError(
            f"{target / STATE} has format version {state.get('format_version')!r}; this grzoo reads "
            f"{folders.FORMAT_VERSION}"
        )
    return state


def _steps(state: dict[str, Any]) -> Any:
    counters = state.get("counters")
    return counters.get("global_steps") if isinstance(counters, dict) else None


def _visible(temporary: Path) -> Path:
    if not temporary.is_dir():
        raise ValueError(
            f"this rank does not see {temporary}, which rank 0 has made: save to a folder that all ranks share"
        )
    return temporary


def _from_first(exchange: Exchange, work: Callable[[], list[str]]) -> list[str]:
    """What `work` finds on rank 0, for all ranks: they may see a shared folder in different states."""
    found = _together(exchange, lambda: work() if exchange.rank == 0 else [])
    names: list[str] = json.loads(bytes(exchange.gather_ints(list(json.dumps(found).encode()))[0]))
    return names


def _together(exchange: Exchange, work: Callable[[], T]) -> T:
    """Runs `work`, which must not communicate, on every rank; when it fails on one, all raise."""
    result: T | None = None
    problem: Exception | None = None
    try:
        result = work()
    except Exception as error:
        problem = error
    exchange.agree(problem)
    return result  # type: ignore[return-value]
