"""Law: the tables of results in the READMEs are those that the CSVs make; nobody types them."""

import csv

import numpy as np
import pytest
from grzoo.recipes.benchmark import record, tables


@pytest.mark.parametrize("path", tables.blocks(), ids=lambda path: str(path.relative_to(tables.ROOT)))
def test_the_readmes_hold_what_the_csvs_make(path):
    text = path.read_text()
    assert tables.fill(text, tables.blocks()[path]) == text, "run python -m grzoo.recipes.benchmark.tables"


def test_a_readme_without_its_block_is_an_error():
    with pytest.raises(ValueError, match="no block <!-- results: x -->"):
        tables.fill("nothing", {"x": lambda: ""})
    text = "a\n<!-- results: x -->\nold\n<!-- end of results -->\nb"
    filled = tables.fill(text, {"x": lambda: r"new \1"})
    assert filled == "a\n<!-- results: x -->\nnew \\1\n<!-- end of results -->\nb"


def test_seeds_are_one_line_with_their_spread():
    rows = [{"run": run, "auc": auc} for run, auc in (("a", ".1"), ("b", ".5"), ("a", ".4"), ("a", ".25"), ("b", ""))]
    first, second = tables.seeds_together(rows, ["run"])
    values = [0.1, 0.4, 0.25]
    assert tables.spread(first, "auc") == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}".replace("0.", ".")
    assert tables.spread(second, "auc") == ""
    assert tables.spread(first[:1], "auc", digits=2) == ".10"


@pytest.mark.parametrize("name", ["retrieval", "ranking", "published"])
def test_every_row_has_every_column(name):
    with open(tables.RESULTS / f"{name}.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert {len(row) for row in rows} == {len(rows[0])}
    if name == "retrieval":
        assert tuple(rows[0]) == record.COLUMNS
        assert all(dict(zip(rows[0], row, strict=True))["dataset"] in tables._DATASETS for row in rows[1:])
