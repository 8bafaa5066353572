"""What recommend.py says of a history."""

from pathlib import Path

from grzoo.data import GenRecProcessor
from grzoo.data.prepare import prepare
from grzoo.recipes.recommend import unknown_items


def test_items_of_text_that_the_catalogue_lacks_are_named(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("user_id,item_id,timestamp\n1,tea,1\n1,milk,2\n2,tea,3\n2,jam,4\n")
    prepare("event_log", tmp_path / "data", log, split="none")
    processor = GenRecProcessor.from_dataset(tmp_path / "data")
    assert unknown_items(["tea", "typo", "jam", "tee"], processor) == ["typo", "tee"]
    assert unknown_items([], processor) == []
