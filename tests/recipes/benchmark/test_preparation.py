"""Laws: the log is as stated, its folder the same by both paths; the figures name the limit and what was held."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from grzoo.recipes.benchmark import preparation


def test_the_log_is_as_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "CHUNK", 4000)
    preparation.write_log(tmp_path / "log.parquet", 10_000)
    table = pq.read_table(tmp_path / "log.parquet")
    assert len(table) == 10_000 and table.column_names == ["user_id", "item_id", "time", "rating"]
    assert len(np.unique(table["user_id"])) <= 100
    assert preparation.digest(tmp_path) == preparation.digest(tmp_path) != preparation.digest(tmp_path.parent)


@pytest.mark.slow
def test_both_paths_make_the_same_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preparation.main(["--events", "50000", "--csv", str(tmp_path / "rows.csv")])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["same"] is True and figures["limit_mib"] == 572 and figures["own_mib"] > 50
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 3
