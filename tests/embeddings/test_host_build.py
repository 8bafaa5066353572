"""The host kernels are compiled once per machine, whoever starts at once, is killed, or has no compiler."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from grzoo.embeddings.kernels import BackendUnavailable
from grzoo.embeddings.kernels.host import build

LOAD = "from grzoo.embeddings.kernels.host.build import library_path; print(library_path())"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a stand-in for the compiler that is fast and logs its calls."""
    compiler = tmp_path / "compiler"
    compiler.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo stand-in 1; exit 0; fi\n'
        f"echo call >> {tmp_path}/calls\n"
        "${SLOW:-true}\n"
        'while [ "$1" != -o ]; do shift; done; echo made > "$2"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("GRZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def calls(cache: Path) -> int:
    log = cache.parent / "calls"
    return len(log.read_text().splitlines()) if log.exists() else 0


ONE_BUILD = 2 + len(build.KERNEL_FLAGS)  # object files and the link


def start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LOAD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def test_the_second_call_finds_what_the_first_made(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = build.library_path()
    assert first.parent == cache and first.read_text() == "made\n"
    assert build.library_path() == first and calls(cache) == ONE_BUILD
    assert caplog.text.count("compiling the host kernels") == 1
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".so"]


def test_processes_that_start_at_once_compile_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOW", "sleep 1")
    processes = [start() for _ in range(3)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert len(set(outputs)) == 1 and Path(outputs[0].strip()).read_text() == "made\n"
    assert calls(cache) == ONE_BUILD


def test_a_build_that_was_killed_holds_nobody_up(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOW", "sleep 60")
    victim = start()
    deadline = time.monotonic() + 60
    while calls(cache) == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.communicate()
    assert not list(cache.glob("*.so")) and list(cache.glob("build-*"))
    monkeypatch.delenv("SLOW")
    assert build.library_path().read_text() == "made\n"
    assert not list(cache.glob("build-*"))


def test_the_file_depends_on_compiler_and_flags(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.library_path()
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O0"))
    assert build.library_path() != first
    compiler = Path(os.environ["CXX"])
    compiler.write_text(compiler.read_text().replace("stand-in 1", "stand-in 2"))
    assert len({first, build.library_path()}) == 2 and len(list(cache.glob("*.so"))) == 3


def test_no_compiler_says_so_and_auto_falls_back(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(BackendUnavailable, match="no C.. compiler .*install g.. or clang.., or name one in CXX"):
        build.library_path()
    program = (
        "from grzoo.embeddings.kernels import get_backend\n"
        "print(get_backend().name, get_backend('auto').name)\n"
        "try: get_backend('host')\nexcept RuntimeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("naive naive\nno C++ compiler")
    assert done.stderr.count("backend 'host' is not available") == 1


def test_a_compiler_that_fails_is_quoted(cache: Path) -> None:
    compiler = Path(os.environ["CXX"])
    compiler.write_text(compiler.read_text() + "echo this source is bad; exit 1\n")
    with pytest.raises(BackendUnavailable, match="this source is bad"):
        build.library_path()
    assert not list(cache.glob("*.so")) and not list(cache.glob("build-*"))


def test_a_cache_that_cannot_be_written_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache.parent / "file").write_text("")
    monkeypatch.setenv("GRZOO_CACHE", str(cache.parent / "file" / "below"))
    with pytest.raises(BackendUnavailable, match="set GRZOO_CACHE"):
        build.library_path()
