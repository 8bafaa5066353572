"""Law: the notebook runs as it stands, and what is stored in it came out of it."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "recipes" / "notebooks" / "from_csv.ipynb"


def printed(cell) -> str:
    """The text that a cell of code printed."""
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


def best(cell) -> str:
    """The first item of a list of scores that a cell printed, whatever warnings stand before it."""
    match = re.search(r"^\s*0\.\d+\s+(\S+)", printed(cell), re.MULTILINE)
    return match[1] if match else ""


def test_the_stored_outputs_are_whole_and_name_no_machine():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [cell for cell in cells if any(output["output_type"] == "error" for output in cell["outputs"])]
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|usr|Users)\b", "".join(map(printed, cells)))
    assert best(cells[-2]) == "tea-06"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "ndcg@10" in printed(cells[2])
    assert best(cells[-2]) == "tea-06", printed(cells[-2])
    assert "wine-02" in printed(cells[-1]) or "bread-08" in printed(cells[-1])
