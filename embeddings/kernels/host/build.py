"""Compile the host kernels once per machine and keep the library in the user's cache."""

import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from grzoo.embeddings.kernels.base import BackendUnavailable

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "src"
_FLOATS = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
# Products and sums are not contracted and no -march=native: the same bits and the same file serve every machine.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", *_FLOATS)
KERNEL_FLAGS: dict[str, tuple[str, ...]] = {"baseline": ()}
if platform.machine() in ("x86_64", "AMD64"):
    KERNEL_FLAGS["avx2"] = ("-mavx2", "-mfma")
    KERNEL_FLAGS["avx512"] = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
LIBRARIES = ("-shared", "-pthread")


def library_path() -> Path:
    """Return the compiled library, after compiling it if the cache does not hold it.

    The cache is `$GRZOO_CACHE`, else `$XDG_CACHE_HOME/grzoo`, else `~/.cache/grzoo`. The file name has a hash of the
    sources, the flags and the compiler's version. Processes that start at once wait for one of them; the lock is the
    kernel's, so that one which is killed holds nobody up.

    Raises BackendUnavailable where there is no compiler, it fails, or nothing can be written.
    """
    compiler = find_compiler()
    key = build_key(compiler)
    folder = cache_folder()
    target = folder / f"host-{key}.so"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f"host-{key}.lock"):
            if not target.exists():
                _build(compiler, folder, key, target)
    except OSError as error:
        message = f"cannot write to the cache {folder} ({error}): set GRZOO_CACHE to a folder of yours"
        raise BackendUnavailable(message) from error
    return target


def cache_folder() -> Path:
    """Return the folder of compiled libraries."""
    if chosen := os.environ.get("GRZOO_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grzoo"


def find_compiler() -> list[str]:
    """Return the command of `$CXX`, c++, g++ or clang++, whichever exists first."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        command = shlex.split(name)
        if shutil.which(command[0]):
            return command
    raise BackendUnavailable(f"no C++ compiler ({', '.join(names)}): install g++ or clang++, or name one in CXX")


def build_key(compiler: list[str]) -> str:
    """Return a hash of everything that the library depends on."""
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BackendUnavailable(f"the C++ compiler {shlex.join(compiler)} does not run: {error}") from error
    digest = hashlib.sha256(version)
    digest.update(repr((compiler, FLAGS, KERNEL_FLAGS, LIBRARIES, platform.machine())).encode())
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".cpp", ".h"):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:20]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock that the operating system drops when the process ends, however it ends."""
    with open(path, "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def compile_commands(compiler: list[str], folder: Path, flags: tuple[str, ...] = FLAGS) -> list[list[str]]:
    """Return the commands that make the object files of the library in `folder`; they may run side by side."""
    common = [*compiler, *flags, "-c"]
    commands = [[*common, str(SOURCES / "host.cpp"), "-o", str(folder / "host.o")]]
    for isa, isa_flags in KERNEL_FLAGS.items():
        output = str(folder / f"kernels-{isa}.o")
        commands.append([*common, *isa_flags, f"-DGRZOO_ISA={isa}", str(SOURCES / "kernels.cpp"), "-o", output])
    return commands


def _build(compiler: list[str], folder: Path, key: str, target: Path) -> None:
    for left_over in folder.glob(f"build-{key}-*"):  # of a build that was killed: the lock is ours
        shutil.rmtree(left_over, ignore_errors=True)
    logger.warning("compiling the host kernels with %s, once, into %s", shlex.join(compiler), folder)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f"build-{key}-", dir=folder) as name:
        work = Path(name)
        _run_all(compile_commands(compiler, work))
        objects = [str(path) for path in sorted(work.glob("*.o"))]
        library = work / "library.so"
        _run_all([[*compiler, *objects, *LIBRARIES, "-o", str(library)]])
        os.replace(library, target)
    logger.info("compiled the host kernels in %.1f s", time.perf_counter() - start)


def _run_all(commands: list[list[str]]) -> None:
    """Run the commands side by side; BackendUnavailable with the compiler's words when one fails."""
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    outputs = [process.communicate()[0] for process in running]
    for process, command, output in zip(running, commands, outputs, strict=True):
        if process.returncode != 0:
            raise BackendUnavailable(f"compiling the host kernels failed: {shlex.join(command)}\n{output[-4000:]}")
