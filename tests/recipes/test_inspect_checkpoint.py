"""inspect_checkpoint: what is there, what is damaged, what differs; pickles stay closed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from grzoo.embeddings import DynamicEmbeddingCollection, FeatureConfig, SparseAdam, TableConfig
from grzoo.embeddings.engine import folder as folders
from grzoo.embeddings.files import write_text
from grzoo.embeddings.io import save_tables
from grzoo.embeddings.tensor_file import save_tensors
from grzoo.recipes.inspect_checkpoint import main


def checkpoint(
    target: Path, *, rows: int = 50, value: float = 1.0, weight: float = 0.0, step: int = 3, updates: int = 0
) -> Path:
    tables = DynamicEmbeddingCollection(
        [TableConfig(name="item", embedding_dim=4), TableConfig(name="user", embedding_dim=2)],
        [FeatureConfig(name="a", table="item")],
        backend="naive",
    )
    optimizer = SparseAdam(tables, 0.1)
    tables.import_rows("item", {"ids": torch.arange(rows) * 7919, "rows": torch.full((rows, 4), value)})
    for _ in range(updates):  # of three rows' state, by gradients of zero
        (tables({"a": torch.arange(3) * 7919})["a"].sum() * 0).backward()
        optimizer.step()
    temporary = folders.start(target)
    files = save_tables(tables, temporary, state=True, max_shard_bytes=1000)
    state = {"counters": {"global_steps": step}, "written_by": {"world_size": 2}}
    files["state.json"] = write_text(temporary / "state.json", json.dumps(state))
    name = "dense-00001-of-00001.safetensors"
    files[name] = save_tensors(temporary / name, {"model.w": torch.full((3,), weight)})
    folders.publish(target, files, step)
    del optimizer
    return target


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, dict[str, Any]]:
    status = main([*map(str, arguments), "--json"])
    out = capsys.readouterr().out
    return status, json.loads(out) if out else {}


def test_a_checkpoint_is_described_and_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "checkpoint-3")
    status, result = run(capsys, folder)
    report = result["folders"][0]
    assert status == 0 and report["complete"] and report["step"] == 3 and report["dense"] == {"model.w": [3]}
    item = report["tables"]["item"]
    assert (item["rows"], item["embedding_dim"]) == (50, 4) and item["columns"]["exp_avg"] == ["float32", 4]
    assert set(item["columns"]) == {"ids", "rows", "exp_avg", "exp_avg_sq", "step", "bucket_offsets"}
    assert main([str(folder)]) == 0 and "checksums match" in capsys.readouterr().out


def test_damage_gives_status_1_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "checkpoint-3")
    shard = max(folder.glob("embeddings-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    status, result = run(capsys, folder)
    assert status == 1 and shard.name in result["folders"][0]["problems"][0]
    (folder / folders.COMPLETE).unlink()
    status, result = run(capsys, folder)
    assert status == 1 and "never finished" in result["folders"][0]["problems"][0]


def test_differences_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = checkpoint(tmp_path / "checkpoint-1")
    status, result = run(capsys, first, checkpoint(tmp_path / "checkpoint-2"))
    assert status == 0 and result["difference"]["equal"]
    other = checkpoint(tmp_path / "checkpoint-3", rows=55, value=1.5, weight=-2.0)
    status, result = run(capsys, first, other)
    difference = result["difference"]
    assert status == 1 and not difference["equal"] and difference["dense"]["changed"] == {"model.w": 2.0}
    assert difference["tables"]["item"] == {
        "only_in_first": 0, "only_in_second": 5, "rows_changed": 50, "largest_difference": 0.5, "state_changed": 0,
    }  # fmt: skip
    assert main([str(first), str(other)]) == 1 and "5 only in the second" in capsys.readouterr().out


def test_a_difference_of_the_optimizer_state_alone_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, other = checkpoint(tmp_path / "checkpoint-1"), checkpoint(tmp_path / "checkpoint-2", updates=1)
    status, result = run(capsys, first, other)
    table = result["difference"]["tables"]["item"]
    assert status == 1 and (table["rows_changed"], table["state_changed"]) == (0, 3)


def test_the_tables_of_an_export_are_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "checkpoint-3")
    (folder / folders.COMPLETE).unlink()
    (folder / "config.json").write_text("{}")
    assert run(capsys, folder)[0] == 0
    shard = max(folder.glob("embeddings-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    status, result = run(capsys, folder)
    assert status == 1 and f"checksum of {shard.name} is wrong" in result["folders"][0]["problems"][0]


def test_what_is_no_checkpoint_gives_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, tmp_path)[0] == 2


def test_a_pickle_is_named_and_not_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "checkpoint-3")
    (folder / "optim.pt").write_bytes(b"not even one")
    status, result = run(capsys, folder)
    assert status == 1 and "may be a pickle and was not opened" in result["folders"][0]["problems"][-1]
