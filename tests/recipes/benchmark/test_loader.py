"""Laws: the log has the stated mean and is read in full; every contestant counts each event of its batches once."""

import json
from pathlib import Path

import numpy as np
import pytest
from grzoo.data import EventDataset
from grzoo.recipes.benchmark import loader


@pytest.mark.parametrize("mean", [54, 600])
def test_the_log_is_as_stated(tmp_path: Path, mean: int) -> None:
    loader.write_folder(tmp_path / "data", 200_000, mean)
    dataset = EventDataset.from_folder(tmp_path / "data")
    assert dataset.lengths.mean() == pytest.approx(mean, rel=0.03) and dataset.lengths.max() <= loader.LONGEST
    assert dataset.num_events == pytest.approx(200_000, rel=0.03)


def test_an_epoch_counts_every_event_once(tmp_path: Path) -> None:
    loader.write_folder(tmp_path / "data", 20_000, 54)
    dataset = EventDataset.from_folder(tmp_path / "data")
    served = loader.endless(loader.build_loader(dataset, 50, 0))
    assert sum(next(served) for _ in range(-(-len(dataset) // 50))) == dataset.num_events


def test_quick_speed_ends_with_its_headline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader, "measure_speed", lambda *_: _small_speed())
    loader.main(["--quick", "--part", "speed", "--csv", str(tmp_path / "rows.csv")])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["events_per_second_workers_1_mean_600"] > 0 and figures["share_of_memcpy_rows_mean_54"] > 0
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + 4 * 4


def _small_speed() -> list[dict[str, object]]:
    rows = loader.compare(EventDataset.from_arrays({"item_id": np.arange(5000)}, [50] * 100), 10, 3, 1)
    values = {name: float(speed) for name, speed in rows[0].items()}
    return [
        {"measured": "speed", "mean_length": m, "events": 0, "users": u, "contestant": c, "value": v, "share": 0.1}
        for m, u in loader.CASES
        for c, v in values.items()
    ]
