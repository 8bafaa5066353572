"""Law: what the README shows is what it prints."""

import contextlib
import io
import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def first_block() -> tuple[str, str]:
    """The first block of Python and the output below it."""
    match = re.search(r"```python\n(.*?)```\n```\n(.*?)```", README.read_text(), re.DOTALL)
    assert match is not None
    return match[1], match[2]


def test_the_first_block_prints_what_stands_below_it() -> None:
    code, output = first_block()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, str(README), "exec"), {})
    assert printed.getvalue() == output
