"""Fuzz the C interface of the host kernels under sanitizers, without suppressions.

python tests/embeddings/host_sanitizers/run.py --rounds 300

Needs g++ or clang++ with its sanitizer runtimes. Exits with 1 at the first report.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from grzoo.embeddings.kernels.host.build import SOURCES, compile_commands, find_compiler

DRIVER = Path(__file__).parent / "fuzz.cpp"
SANITIZERS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-fsanitize=thread",),
}
FLAGS = ("-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra")


def build(name: str, folder: Path) -> Path:
    """Compile kernels and driver with one sanitizer; return the program."""
    compiler, flags = find_compiler(), (*FLAGS, *SANITIZERS[name])
    running = [subprocess.Popen(command) for command in compile_commands(compiler, folder, flags)]
    program = folder / "fuzz"
    objects = [command[-1] for command in compile_commands(compiler, folder, flags)]
    if any(process.wait() for process in running):
        raise SystemExit(f"compiling with {name} failed")
    command = [*compiler, *flags, f"-I{SOURCES}", str(DRIVER), *objects, "-pthread", "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def run(name: str, seed: int, rounds: int) -> bool:
    """Return whether the driver ran without a report."""
    with tempfile.TemporaryDirectory() as folder:
        program = build(name, Path(folder))
        arguments = [str(program), str(seed), str(rounds), *(["threads"] if name == "thread" else [])]
        environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1"}
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    print(f"{name}: {'ok' if done.returncode == 0 else done.stdout[-2000:] + done.stderr[:8000]}", flush=True)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sanitizer", choices=sorted(SANITIZERS), action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    results = [run(name, options.seed, options.rounds) for name in options.sanitizer or sorted(SANITIZERS)]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
