"""Compile the host paths of all ops into one library, once per machine, and load it through ctypes."""

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

from grzoo.embeddings.kernels.base import BackendUnavailable
from grzoo.embeddings.kernels.host.build import cache_folder, find_compiler, locked

logger = logging.getLogger(__name__)

OPS = Path(__file__).parent.parent
SOURCES = tuple(
    OPS / op / "host.cpp"
    for op in (
        "full_softmax",
        "hstu_attention",
        "keyed_dropout",
        "norm_gate_dropout",
        "sampled_softmax",
        "silu_attention",
    )
)
# No -march: a source is compiled for several instruction sets inside (dispatch.h) and picks one at run time.
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
)
# The threads are those of torch: a pool beside torch's would compete with its spinning workers for the cores.
OPENMP = ("-fopenmp",)
HIGHEST_LEVEL = 1  # of instruction sets (dispatch.h); 0 is what every processor of the kind has


@functools.cache
def library() -> ctypes.CDLL:
    """Return the compiled library, after compiling it if the cache folder does not hold it.

    Raises BackendUnavailable where there is no compiler, it fails, or nothing can be written.
    """
    compiler = find_compiler()
    folder = cache_folder()
    target = folder / f"ops-{_build_key(compiler)}.so"
    if not target.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(target.with_suffix(".lock")):
                if not target.exists():
                    _build(compiler, target)
        except OSError as error:
            message = f"cannot write to the cache {folder} ({error}): set GRZOO_CACHE to a folder of yours"
            raise BackendUnavailable(message) from error
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise BackendUnavailable(f"the compiled ops do not load: {error}") from error


@functools.cache
def available() -> bool:
    """Whether the library can be had; says once why not."""
    try:
        library()
    except BackendUnavailable as error:
        logger.warning("the model ops run in PyTorch, without their faster C++ paths: %s", error)
        return False
    return True


def _build_key(compiler: list[str]) -> str:
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BackendUnavailable(f"the C++ compiler {shlex.join(compiler)} does not run: {error}") from error
    digest = hashlib.sha256(version)
    digest.update(repr((compiler, FLAGS, OPENMP)).encode())
    folders = sorted({source.parent for source in SOURCES} | {Path(__file__).parent})
    for file in (file for folder in folders for file in sorted(folder.iterdir())):
        if file.suffix in (".cpp", ".h"):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:20]


def _build(compiler: list[str], target: Path) -> None:
    logger.warning("compiling the model ops with %s, once, into %s", shlex.join(compiler), target.parent)
    with tempfile.TemporaryDirectory(prefix="build-ops-", dir=target.parent) as name:
        work = Path(name)
        failure = _compile(compiler, OPENMP, work)
        if failure:
            logger.warning(
                "the model ops are compiled for one thread: no OpenMP (%s)", failure.strip().splitlines()[-1]
            )
            failure = _compile(compiler, (), work)
        if failure:
            raise BackendUnavailable(f"compiling the model ops failed: {failure[-4000:]}")
        os.replace(work / "library.so", target)


def _compile(compiler: list[str], threading: tuple[str, ...], work: Path) -> str:
    """Compile side by side and link; return the compiler's words when one command fails."""
    outputs = [work / f"{source.parent.name}.o" for source in SOURCES]
    failure = _run(
        [
            [*compiler, *FLAGS, *threading, "-c", str(source), "-o", str(output)]
            for source, output in zip(SOURCES, outputs, strict=True)
        ]
    )
    link = [*compiler, *threading, "-shared", *(str(output) for output in outputs), "-o", str(work / "library.so")]
    return failure or _run([link])


def _run(commands: list[list[str]]) -> str:
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    failures = []
    for process, command in zip(running, commands, strict=True):
        output = process.communicate()[0]
        if process.returncode != 0:
            failures.append(f"{shlex.join(command)}\n{output}")
    return "\n".join(failures)
