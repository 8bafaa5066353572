"""Dense state in safetensors shards whose boundaries do not depend on the number of ranks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grzoo.embeddings.exchange import Exchange
from grzoo.embeddings.files import Fingerprint
from grzoo.embeddings.tensor_file import save_tensors
from safetensors import safe_open
from torch import Tensor

from .dense import DenseState

SHARD_BYTES = 1 << 30


def plan_shards(dense: DenseState, max_bytes: int = SHARD_BYTES) -> list[list[str]]:
    """Names of parameters and buffers by shard; a parameter and its optimizer states stay together."""
    factor = 4 * (1 + len(dense.state_keys()))
    shards: list[list[str]] = [[]]
    size = 0
    for name in dense.names():
        needed = factor * dense.numel(name)
        if shards[-1] and size + needed > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += needed
    return shards


def save_dense(
    dense: DenseState, folder: Path, exchange: Exchange, max_bytes: int = SHARD_BYTES
) -> dict[str, Fingerprint]:
    """Writes dense-00001-of-0000N.safetensors; shard k is written by rank k modulo the number of ranks. Collective.

    Returns the sizes and checksums of the files that this rank wrote.
    """
    shards = plan_shards(dense, max_bytes)
    problem: Exception | None = None
    files: dict[str, Fingerprint] = {}
    for number, names in enumerate(shards):
        is_writer = number % exchange.world_size == exchange.rank
        tensors: dict[str, Tensor] = {}
        for name in names:
            gathered = dense.gather(name)
            if is_writer:
                tensors |= gathered
        if is_writer and problem is None:  # after a failure this rank still takes part in the gathering
            file = f"dense-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            try:
                files[file] = save_tensors(folder / file, tensors)
            except Exception as error:  # whatever it is, the other ranks are waiting to gather
                problem = error
    exchange.agree(problem)
    return files


def check_dense(dense: DenseState, folder: Path, saved: Mapping[str, Any]) -> None:
    """Raises ValueError when the files hold other parameters, shapes or optimizer states than the model needs."""
    shapes: dict[str, list[int]] = {}
    for file in _files(folder):
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in opened.keys():
                shapes[name] = opened.get_slice(name).get_shape()
    ours = {f"model.{name}": dense.shape(name) for name in dense.names()}
    theirs = {name: shape for name, shape in shapes.items() if name.startswith("model.")}
    for what, names in (
        ("the checkpoint lacks", ours.keys() - theirs.keys()),
        ("the model lacks", theirs.keys() - ours.keys()),
    ):
        if names:
            some = ", ".join(sorted(name.removeprefix("model.") for name in names)[:5])
            raise ValueError(f"{folder} is of another model: {what} {len(names)} parameters ({some}, ...)")
    for name, shape in ours.items():
        if theirs[name] != shape:
            raise ValueError(f"{name} in {folder} has shape {theirs[name]}, in the model {shape}")
    for state in saved["states"]:
        missing = [name for name in dense.trainable_names() if f"optimizer.{state}.{name}" not in shapes]
        if missing:
            raise ValueError(f"{folder} is damaged: it has no optimizer state {state!r} of {missing[0]}")


def load_dense(dense: DenseState, folder: Path, exchange: Exchange) -> None:
    """Reads what `save_dense` wrote into the engine, one parameter at a time. Collective; after `check_dense`."""
    opened = [safe_open(file, framework="pt", device="cpu") for file in _files(folder)]
    where = {name: file for file in opened for name in file.keys()}
    for name in dense.names():
        keys = [f"model.{name}", *(f"optimizer.{key}.{name}" for key in dense.state_keys())]
        dense.scatter(name, {key: where[key].get_tensor(key) for key in keys if key in where})
    exchange.agree(None)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("dense-*-of-*.safetensors"))
