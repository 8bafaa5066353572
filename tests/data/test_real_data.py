"""The public logs under $GRZOO_DATA: numbers of users, items and events, and the published protocol's targets."""

from pathlib import Path

import numpy as np
import pytest
from grzoo.data import Catalogue, EventDataset
from grzoo.data.prepare import prepare

LOGS = [
    ("ml-1m", "ml-1m", 6_040, 3_416, 999_611),
    ("ml-100k", "ml-100k", 943, 1_682, 100_000),
    ("ml-latest-small", "ml-latest-small", 610, 9_724, 100_836),
    ("amazon-beauty", "amazon14-beauty", 22_363, 12_101, 198_502),
    ("amazon-sports", "amazon14-sports", 35_598, 18_357, 296_337),
]


@pytest.mark.parametrize(("name", "folder", "users", "items", "events"), LOGS)
def test_numbers_of_the_public_logs(
    name: str, folder: str, users: int, items: int, events: int, real_data: Path, tmp_path: Path
) -> None:
    if not (real_data / folder).is_dir():
        pytest.skip(f"{real_data} holds no {folder}")
    report = prepare(name, tmp_path / "out", real_data / folder)
    values = report.statistics
    assert (values["users"], values["items"], values["events"]) == (users, items, events)
    test, catalogue = EventDataset.from_folder(tmp_path / "out", "test"), Catalogue.from_folder(tmp_path / "out")
    assert len(test) == users and test.num_events == events
    assert len(catalogue) == items and catalogue.counts.sum() == events - users
    assert (test.target_from == test.lengths - 1).all()


def test_ml_1m_keeps_the_order_of_the_published_file(real_data: Path, tmp_path: Path) -> None:
    raw = real_data / "ml-1m"
    if not (raw / "ml-1m.txt").is_file():
        pytest.skip(f"{real_data} holds no ml-1m")
    pairs = np.loadtxt(raw / "ml-1m.txt", dtype=np.int64)
    for source in (raw, raw / "ml-1m.txt"):
        prepare("ml-1m", tmp_path / "out", source, overwrite=True)
        dataset = EventDataset.from_folder(tmp_path / "out", "test")
        assert np.array_equal(dataset.rows(np.arange(len(dataset)))["item_id"], pairs[:, 1])
    titles = Catalogue.from_folder(tmp_path / "out").titles([1, 2])
    assert titles == ["Raiders of the Lost Ark (1981)", "Caddyshack (1980)"]
