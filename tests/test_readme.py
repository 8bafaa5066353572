"""Law: what the README shows is what it prints."""

import contextlib
import io


def test_the_first_block_prints_what_stands_below_it(readme_block: tuple[str, str]) -> None:
    code, output = readme_block
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == output
