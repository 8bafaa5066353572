"""The processor encodes and decodes, and is the same after save and load, from a folder and from a hub repository."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from grzoo.data import DatasetSchema, FeatureSpec, GenRecProcessor
from grzoo.data.catalogue import Catalogue, hash_ids

HISTORIES = [["a", "b", "c"], [], ["c"]]
TIMES = [[1, 2, 3], [], [9]]


def make(mapping: str, **options: Any) -> GenRecProcessor:
    names = ["a", "b", "c"]
    ids = hash_ids(pa.array(names)) if mapping == "hash" else np.array([11, 12, 13])
    table = pa.table({"item_id": names, "id": ids, "count": [3, 2, 1], "title": ["A!", "B!", "C!"]})
    schema = DatasetSchema(name="x", features=(FeatureSpec(name="item_id", dtype="int64"),), id_mapping=mapping)
    return GenRecProcessor(Catalogue(table, mapping), schema, **options)


def test_padded_inputs() -> None:
    inputs = make("vocabulary")(HISTORIES, TIMES, request_timestamps=[4, 5, 10])
    assert inputs["input_ids"].tolist() == [[11, 12, 13], [0, 0, 0], [13, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 0]]
    assert inputs["timestamps"].tolist() == [[1, 2, 3], [0, 0, 0], [9, 0, 0]]
    assert inputs["request_timestamps"].tolist() == [4, 5, 10]
    assert all(value.dtype == torch.int64 for value in inputs.values())


def test_packed_inputs() -> None:
    inputs = make("vocabulary")(HISTORIES, TIMES, packed=True)
    assert inputs["input_ids"].tolist() == [[11, 12, 13, 13]] and inputs["timestamps"].tolist() == [[1, 2, 3, 9]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0]]
    assert inputs["cu_seq_lens_q"].tolist() == [0, 3, 3, 4] and inputs["cu_seq_lens_q"].dtype == torch.int32
    assert inputs["max_length_q"] == 3


def test_truncation_keeps_the_recent_events() -> None:
    inputs = make("vocabulary", max_length=2)(HISTORIES, TIMES, truncation=True)
    assert inputs["input_ids"].tolist() == [[12, 13], [0, 0], [13, 0]]
    assert make("vocabulary", max_length=2)(HISTORIES)["input_ids"].shape == (3, 3)


def test_decode_and_titles_keep_the_nesting() -> None:
    processor = make("vocabulary")
    assert processor.decode(torch.tensor([[11, 12], [13, 99]])) == [["a", "b"], ["c", None]]
    assert processor.titles(torch.tensor([13, 11])) == ["C!", "A!"]
    assert processor.titles(np.array([[13], [5]])) == [["C!"], ["unknown item 5"]]


def test_unknown_items() -> None:
    vocabulary, hashed = make("vocabulary"), make("hash")
    with pytest.raises(ValueError, match="no item 'z': .*unknown='skip'"):
        vocabulary([["a", "z"]])
    skipped = vocabulary([["z", "a"], ["z"]], [[1, 2], [3]], unknown="skip")
    assert skipped["input_ids"].tolist() == [[11], [0]] and skipped["timestamps"].tolist() == [[2], [0]]
    assert hashed([["z"]])["input_ids"].tolist() == [hash_ids(pa.array(["z"])).tolist()]
    with pytest.raises(ValueError, match="a vocabulary has no ids for unknown items"):
        make("vocabulary", unknown="keep")
    with pytest.raises(ValueError, match="unknown is 'drop'"):
        make("hash", unknown="drop")


def test_bad_calls() -> None:
    processor = make("vocabulary")
    with pytest.raises(ValueError, match=r"timestamps have the lengths \[2, 0, 1\]"):
        processor(HISTORIES, [[1, 2], [], [3]])
    with pytest.raises(ValueError, match="one time for each of the 3 histories"):
        processor(HISTORIES, request_timestamps=[1, 2])
    with pytest.raises(ValueError, match="return_tensors is 'tf'"):
        processor(HISTORIES, return_tensors="tf")
    with pytest.raises(ValueError, match="truncation needs a max_length"):
        processor(HISTORIES, truncation=True)
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        make("hash", max_length=0)
    assert processor([])["input_ids"].shape == (0, 0)


@pytest.mark.parametrize("mapping", ["vocabulary", "hash"])
def test_save_and_load(tmp_path: Path, mapping: str) -> None:
    saved = make(mapping, max_length=7)
    files = saved.save_pretrained(tmp_path / "model")
    assert sorted(Path(file).name for file in files) == ["items.parquet", "preprocessor_config.json", "schema.json"]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == sorted(Path(file).name for file in files)
    loaded = GenRecProcessor.from_pretrained(tmp_path / "model")
    assert loaded.max_length == 7 and loaded.unknown == saved.unknown and loaded.schema == saved.schema
    assert torch.equal(loaded(HISTORIES)["input_ids"], saved(HISTORIES)["input_ids"])
    assert GenRecProcessor.from_pretrained(str(tmp_path / "model"), max_length=3).max_length == 3


def test_a_dataset_folder_gives_a_processor(synthetic_folder: Path) -> None:
    processor = GenRecProcessor.from_dataset(synthetic_folder, max_length=5)
    (title,) = processor.titles(processor([[3]])["input_ids"][0])
    assert title.startswith("Item 00003 · ")


def test_a_folder_without_a_processor(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="preprocessor_config.json"):
        GenRecProcessor.from_pretrained(tmp_path)


def test_push_uploads_the_three_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[dict[str, Any]] = []

    class Repository:
        repo_id = "me/model"

    class Api:
        def __init__(self, token: str | None = None) -> None:
            assert token == "secret"

        def create_repo(self, name: str, **options: Any) -> Repository:
            assert name == "model"
            return Repository()

        def upload_folder(self, **options: Any) -> None:
            present = {path.name for path in Path(options["folder_path"]).iterdir()}
            uploads.append({"repo": options["repo_id"], "files": present & set(options["allow_patterns"])})

    monkeypatch.setattr("grzoo.data.processor.HfApi", Api)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "other.bin").write_text("")
    make("hash").save_pretrained(tmp_path / "model", push_to_hub=True, token="secret")
    assert uploads == [{"repo": "me/model", "files": {"preprocessor_config.json", "schema.json", "items.parquet"}}]
