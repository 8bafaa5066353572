"""Law: a user's mistake gives one message, exit code 2 on every rank, and nobody waits for ever."""

import os
import socket
import subprocess
import sys
import warnings

import pytest
from grzoo.recipes import runtime as runtime_module
from grzoo.recipes.runtime import Runtime, UserError, plain_warnings, user_errors

SCRIPT = """
import time
from datetime import timedelta
from grzoo.recipes.runtime import UserError, connect, run, user_errors

def main(runtime, argv):
    if argv[0] == "everywhere":
        raise UserError("all are wrong")
    if argv[0] == "second" and runtime.rank == 1:
        with user_errors():
            raise FileNotFoundError("rank 1 is wrong")
    if argv[0] == "second":
        runtime.store.wait(["grzoo/error"], timedelta(seconds=60))  # as if in a collective
        return
    def work():
        if argv[0] == "prepare":
            raise UserError("cannot prepare")
        return "folder"
    assert runtime.main_first("data", work) == "folder"
    connect(runtime, use_cpu=True)
    if runtime.rank == 1:  # rank 0, which holds the store, must still be there
        time.sleep(1)
        runtime.store.set("late", "1")
    print("done", runtime.rank)

run(main)
"""


def run_ranks(tmp_path, case, world=2):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launched = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), case],
            env={**os.environ, **launched, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    return [rank.returncode for rank in ranks], "".join(o for o, _ in outputs), "".join(e for _, e in outputs)


@pytest.mark.parametrize(("case", "message"), [("everywhere", "all are wrong"), ("prepare", "cannot prepare")])
def test_one_message_and_exit_code_2_on_every_rank(tmp_path, case, message):
    codes, _, errors = run_ranks(tmp_path, case)
    assert codes == [2, 2]
    assert errors.count(f"error: {message}") == 1
    assert "Traceback" not in errors


def test_a_mistake_of_one_rank_is_reported_by_it(tmp_path):
    codes, _, errors = run_ranks(tmp_path, "second")
    assert codes[1] == 2
    assert "error: rank 1 is wrong" in errors


def test_all_ranks_get_the_result_and_rank_0_stays_until_all_are_done(tmp_path):
    codes, output, errors = run_ranks(tmp_path, "fine")
    assert codes == [0, 0], errors
    assert sorted(output.split()) == ["0", "1", "done", "done"]


def test_one_rank_needs_no_store():
    runtime = Runtime(0, 0, 1, 1)
    assert runtime.main_first("x", lambda: "y") == "y"
    assert runtime.claim("error")


def test_only_a_users_errors_are_turned():
    with pytest.raises(UserError, match="nothing there"), user_errors():
        raise FileNotFoundError("nothing there")
    with pytest.raises(KeyError), user_errors():
        raise KeyError("a bug")


def test_warnings_of_grzoo_are_one_line_and_others_are_as_python_shows_them(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(sys, "argv", ["elsewhere/recipes/recommend.py"])
    plain_warnings()
    own = [runtime_module.__file__, "elsewhere/recipes/recommend.py"]
    assert [warnings.formatwarning("so", UserWarning, file, 3) for file in own] == ["warning  so\n"] * 2
    assert "other.py:3: UserWarning: so" in warnings.formatwarning("so", UserWarning, "other.py", 3)
    assert "DeprecationWarning" in warnings.formatwarning("so", DeprecationWarning, runtime_module.__file__, 3)


def test_mpi_without_its_package_is_told(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    without = "import sys; sys.modules['mpi4py'] = None; sys.argv = ['script', 'fine']; import runpy; "
    found = subprocess.run(
        [sys.executable, "-c", f"{without}runpy.run_path({str(script)!r}, run_name='__main__')"],
        env=environment | {"OMPI_COMM_WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 2 and "install mpi4py, or start with `deepspeed`" in found.stderr, found.stderr
