"""S20-S22, S24 in one process (tests/distributed has several ranks): files are complete, sorted, checked and ours."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from grzoo.embeddings import (
    DynamicEmbeddingCollection,
    FeatureConfig,
    SparseAdagrad,
    SparseAdam,
    SparseOptimizer,
    TableConfig,
)
from grzoo.embeddings.files import DamagedFile
from grzoo.embeddings.hashing import NUM_BUCKETS, bucket
from grzoo.embeddings.io import INDEX_NAME, load_tables, read_index, save_tables, shard_files
from grzoo.embeddings.shards import plan_shards
from safetensors.torch import load_file, save_file
from torch import Tensor

EXTREME = torch.tensor([0, -1, 2**63 - 1, -(2**63)])


def build(**item: Any) -> DynamicEmbeddingCollection:
    tables = [
        TableConfig(**({"name": "item", "embedding_dim": 4} | item)),
        TableConfig(name="user", embedding_dim=2),
        TableConfig(name="empty", embedding_dim=2),
    ]
    features = [FeatureConfig(name="a", table="item"), FeatureConfig(name="b", table="user")]
    return DynamicEmbeddingCollection(tables, features, backend="naive")


def trained(rows: int = 300) -> tuple[DynamicEmbeddingCollection, SparseOptimizer]:
    tables = build()
    optimizer = SparseAdam(tables, 0.1)
    ids = torch.cat([EXTREME, torch.arange(rows)[1:]])
    for k in (1, 2):
        batch = tables({"a": ids[::k], "b": ids[:10]})
        (batch["a"].square().sum() + batch["b"].sum()).backward()
        optimizer.step()
    return tables, optimizer


def everything(tables: DynamicEmbeddingCollection) -> dict[str, dict[str, Tensor]]:
    return {name: tables.export_rows(name) for name in tables.table_names}


def assert_equal(a: DynamicEmbeddingCollection, b: DynamicEmbeddingCollection) -> None:
    torch.testing.assert_close(everything(a), everything(b), rtol=0, atol=0)


@pytest.mark.parametrize("max_shard_bytes", [1, 3000, 2 << 30])
def test_s21_saved_state_comes_back_bit_for_bit(tmp_path: Path, max_shard_bytes: int) -> None:
    tables, optimizer = trained(20 if max_shard_bytes == 1 else 300)
    save_tables(tables, tmp_path / "new" / "folder", state=True, max_shard_bytes=max_shard_bytes)
    other = build()
    attached = SparseAdam(other, 0.1)
    load_tables(other, tmp_path / "new" / "folder")
    assert_equal(other, tables)
    assert attached is other.optimizer and optimizer is tables.optimizer
    without = build()  # no optimizer yet: the state waits for one
    load_tables(without, tmp_path / "new" / "folder")
    SparseAdam(without, 0.1)
    assert_equal(without, tables)


def test_without_state_rows_start_with_fresh_state(tmp_path: Path) -> None:
    tables, _optimizer = trained()
    save_tables(tables, tmp_path, state=True)
    other = build()
    attached = SparseAdagrad(other, 0.1, initial_accumulator_value=0.5)
    load_tables(other, tmp_path, state=False)
    ours, theirs = other.export_rows("item"), tables.export_rows("item")
    assert torch.equal(ours["rows"], theirs["rows"]) and attached is other.optimizer
    assert (ours["sum"] == 0.5).all() and (ours["step"] == 0).all()


def test_s24_the_files_are_as_documented(tmp_path: Path) -> None:
    tables, _optimizer = trained()
    save_tables(tables, tmp_path, state=True, max_shard_bytes=5000)
    index = json.loads((tmp_path / INDEX_NAME).read_text())["metadata"]
    files = [shard["file"] for shard in index["shards"]]
    n = len(files)
    assert n > 2 and files == [f"embeddings-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    assert set(os.listdir(tmp_path)) == {INDEX_NAME, *files} and shard_files(read_index(tmp_path)) == files
    assert index["rows"] == {"item": 303, "user": 10, "empty": 0}
    assert (index["format_version"], index["hash_version"], index["num_buckets"]) == (1, 1, 65536)
    assert index["optimizer"]["name"] == "SparseAdam" and [t["name"] for t in index["tables"]] == tables.table_names
    for shard in index["shards"]:
        content = load_file(tmp_path / shard["file"])
        names = {"ids", "rows", "exp_avg", "exp_avg_sq", "step", "bucket_offsets"}
        assert set(content) == {f"{t}.{n}" for t in tables.table_names for n in names}
        ids, offsets = content["item.ids"], content["item.bucket_offsets"]
        first, end = shard["buckets"]
        counts = torch.bincount(bucket(ids) - first, minlength=end - first)
        assert offsets.tolist() == [0, *counts.cumsum(0).tolist()] and len(ids) == shard["rows"]["item"]
        assert (tmp_path / shard["file"]).stat().st_mode & 0o777 == 0o666 & ~current_umask()
    save_tables(tables, tmp_path, state=False)
    assert set(os.listdir(tmp_path)) == {INDEX_NAME, "embeddings-00001-of-00001.safetensors"}  # the old shards went
    assert set(load_file(tmp_path / "embeddings-00001-of-00001.safetensors")) == {
        f"{t}.{n}" for t in tables.table_names for n in ("ids", "rows", "bucket_offsets")
    }


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_s21_files_do_not_depend_on_history(tmp_path: Path) -> None:
    ids = torch.cat([EXTREME, torch.arange(300)[1:]])
    for name, order in (("a", ids), ("b", ids.flip(0))):
        tables = build().eval()
        tables.prepare([{"a": part} for part in order.split(37)], insert=True)
        save_tables(tables, tmp_path / name, state=False, max_shard_bytes=2000)
    files = sorted(os.listdir(tmp_path / "a"))
    assert len(files) > 2 and files == sorted(os.listdir(tmp_path / "b"))
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_loading_replaces_rows_and_forgets_pending_gradients(tmp_path: Path) -> None:
    tables, _optimizer = trained()
    save_tables(tables, tmp_path, state=True)
    other = build()
    optimizer = SparseAdam(other, 0.1)
    other({"a": torch.tensor([123456])})["a"].sum().backward()
    load_tables(other, tmp_path)
    optimizer.step()
    assert_equal(other, tables)


def test_plan_cuts_at_buckets_and_ignores_empty_ones() -> None:
    weights = torch.zeros(NUM_BUCKETS, dtype=torch.int64)
    assert [(s.first, s.end) for s in plan_shards(weights, 10)] == [(0, NUM_BUCKETS)]
    weights[[0, 5, 6, 100, 65535]] = torch.tensor([4, 6, 1, 25, 3])
    plan = plan_shards(weights, 10)
    assert [(s.first, s.end) for s in plan] == [(0, 6), (6, 100), (100, 101), (101, NUM_BUCKETS)]
    assert plan[3].file == "embeddings-00004-of-00004.safetensors"


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    tables, _optimizer = trained(10)
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "0123", tmp_path / "models--x" / "blobs"
    save_tables(tables, snapshot, state=False)
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.symlink_to(file.rename(blobs / str(number)))
    other = build()
    load_tables(other, snapshot)
    assert torch.equal(other.export_rows("item")["rows"], tables.export_rows("item")["rows"])


def test_a_save_that_dies_over_an_older_one_leaves_nothing_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the old index would speak of new shards."""
    tables, _optimizer = trained(50)
    save_tables(tables, tmp_path, state=False, max_shard_bytes=300)

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("grzoo.embeddings.saving._publish", dies)
        with pytest.raises(KeyboardInterrupt):
            save_tables(trained(60)[0], tmp_path, state=False, max_shard_bytes=300)
    with pytest.raises(ValueError, match="missing"):
        load_tables(build(), tmp_path)


# ---------------------------------------------------------------------- refusals


def damage_index(**changes: Any) -> Any:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX_NAME).read_text())
        index["metadata"].update(changes)
        (folder / INDEX_NAME).write_text(json.dumps(index))

    return damage


def damage_shard(change: Any) -> Any:
    def damage(folder: Path) -> None:
        file = folder / "embeddings-00001-of-00001.safetensors"
        content = load_file(file)
        change(content)
        save_file(content, file)

    return damage


def swap_ids(content: dict[str, Tensor]) -> None:
    content["item.ids"][[0, 1]] = content["item.ids"][[1, 0]]


def repeat_id(content: dict[str, Tensor]) -> None:
    content["item.ids"][1] = content["item.ids"][0]


def shift_offsets(content: dict[str, Tensor]) -> None:
    content["item.bucket_offsets"][-1] -= 1


def drop_row(content: dict[str, Tensor]) -> None:
    content["item.exp_avg"] = content["item.exp_avg"][1:].clone()


def ids_in_two_shards(folder: Path) -> None:
    """The shard twice, as the first and the second half of the buckets."""
    index = json.loads((folder / INDEX_NAME).read_text())
    (shard,) = index["metadata"]["shards"]
    second = shard | {"file": "embeddings-00002-of-00002.safetensors", "buckets": [NUM_BUCKETS // 2, NUM_BUCKETS]}
    index["metadata"]["shards"] = [shard | {"buckets": [0, NUM_BUCKETS // 2]}, second]
    (folder / INDEX_NAME).write_text(json.dumps(index))
    for half in index["metadata"]["shards"]:
        content = load_file(folder / shard["file"])
        first, end = half["buckets"]
        for table in ("item", "user", "empty"):
            offsets = torch.searchsorted(bucket(content[f"{table}.ids"]), torch.arange(first, end + 1))
            offsets[0], offsets[-1] = 0, len(content[f"{table}.ids"])
            content[f"{table}.bucket_offsets"] = offsets
        save_file(content, folder / half["file"])


def ids_last(folder: Path) -> None:
    """The tensors of the shard in the opposite order: a safetensors file as good as any."""
    file = folder / "embeddings-00001-of-00001.safetensors"
    header, body = {}, b""
    for name, values in sorted(load_file(file).items(), key=lambda item: (item[0].endswith("ids"), item[0])):
        data = values.contiguous().view(torch.uint8).numpy().tobytes() if values.numel() else b""
        dtype = {torch.int64: "I64", torch.int32: "I32", torch.float32: "F32"}[values.dtype]
        offsets = [len(body), len(body) + len(data)]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": offsets}
        body += data
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)


def link_out(file: Path) -> None:
    """The same bytes, but somewhere else."""
    file.symlink_to(file.rename(file.parents[1] / "elsewhere.safetensors"))


def claim(file: Path, header_bytes: int) -> None:
    """A header that says it is this long."""
    file.write_bytes(header_bytes.to_bytes(8, "little") + file.read_bytes()[8:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / INDEX_NAME).unlink(), "missing"),
        (lambda folder: (folder / INDEX_NAME).write_text("{"), "not an index"),
        (damage_index(format_version=99), "version 99, this program reads version 1"),
        (damage_index(hash_version=2), "hash version: the files have 2, this collection has 1"),
        (damage_index(num_buckets=10), "number of buckets: the files have 10"),
        (damage_index(seed=5), "seed: the files have 5, this collection has 0"),
        (damage_index(shards=[]), "do not cover"),
        (damage_index(rows={"item": 9, "user": 10, "empty": 0}), "should have 9 rows, its shards hold 303"),
        (lambda folder: next(folder.glob("*-of-*")).unlink(), "cannot load tables"),
        (lambda folder: next(folder.glob("*-of-*")).write_bytes(b"no"), "cut short or no safetensors"),
        (lambda folder: (folder / INDEX_NAME).write_text("[" * 10**6), "not an index"),
        (damage_index(shards=[{"file": "../embeddings-00001-of-00001.safetensors"}]), "names '../emb.* as a shard"),
        (damage_index(shards=[{"file": "/etc/hostname"}]), "names '/etc/hostname' as a shard"),
        (damage_index(shards=[{"file": 7}]), "names 7 as a shard"),
        (damage_index(shards=[{}]), "not an index"),
        (damage_index(shards=[[1]]), "not an index"),
        (damage_index(tables=7), "cannot load tables"),
        (damage_index(optimizer=[]), "cannot load tables|optimizer: the files"),
        (damage_index(rows=None), "cannot load tables"),
        (lambda folder: link_out(next(folder.glob("*-of-*"))), "is a link to .* outside of"),
        (lambda folder: claim(next(folder.glob("*-of-*")), 2**60), "a header of 1152921504606846976"),
        (lambda folder: claim(next(folder.glob("*-of-*")), 2**63 + 5), "a header of 9223372036854775813"),
        (damage_shard(swap_ids), "out of order"),
        (damage_shard(repeat_id), "repeated"),
        (damage_shard(shift_offsets), "lead from 0 to 303 rows"),
        (damage_shard(drop_row), "'exp_avg' of table 'item'.* has shape \\[302, 4\\], it should have \\[303, 4\\]"),
        (damage_shard(lambda content: content.pop("item.step")), "has no tensor 'item.step'"),
        (
            damage_shard(lambda content: content.update({"item.exp_avg": content["item.exp_avg"].double()})),
            "'exp_avg' of table 'item'.* is torch.float64, it should be torch.float32",
        ),
        (ids_last, "has its ids behind other columns"),
        (ids_in_two_shards, "ids are repeated, out of order or in the wrong shard"),
    ],
)
def test_s22_damage_is_refused_and_the_tables_stay(tmp_path: Path, damage: Any, message: str) -> None:
    tables, _optimizer = trained()
    tmp_path = tmp_path / "saved"
    save_tables(tables, tmp_path, state=True)
    damage(tmp_path)
    other = build()
    attached = SparseAdam(other, 0.1)
    with torch.no_grad():
        other({"a": torch.tensor([77])})
    before = everything(other)
    with pytest.raises(ValueError, match=message):
        load_tables(other, tmp_path)
    torch.testing.assert_close(everything(other), before, rtol=0, atol=0)
    assert attached is other.optimizer


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"embedding_dim": 5}, "embedding_dim of table 'item': the files have 4, this collection has 5"),
        ({"initializer": {"kind": "constant", "value": 0.0}}, "initializer of table 'item'"),
        ({"init_key": "x"}, "init_key"),
        ({"name": "goods"}, "tables: the files have \\['empty', 'item', 'user'\\]"),
    ],
)
def test_s22_other_configs_are_refused(tmp_path: Path, item: dict[str, Any], message: str) -> None:
    tables, _optimizer = trained(10)
    save_tables(tables, tmp_path, state=False)
    other = DynamicEmbeddingCollection(
        [TableConfig(**({"name": "item", "embedding_dim": 4} | item)), *list(tables.tables.values())[1:]], []
    )
    with pytest.raises(ValueError, match=message):
        load_tables(other, tmp_path)


def test_s22_another_optimizer_or_no_state_is_refused(tmp_path: Path) -> None:
    tables, _optimizer = trained(10)
    save_tables(tables, tmp_path / "state", state=True)
    save_tables(tables, tmp_path / "bare", state=False)
    other = build()
    with pytest.raises(ValueError, match="none is attached"):
        save_tables(other, tmp_path, state=True)
    attached = SparseAdagrad(other, 0.1)
    with pytest.raises(ValueError, match="SparseAdam.*attached is.*SparseAdagrad"):
        load_tables(other, tmp_path / "state")
    with pytest.raises(ValueError, match="no optimizer state"):
        load_tables(other, tmp_path / "bare", state=True)
    load_tables(other, tmp_path / "bare")
    assert other.num_rows("item") == 13 and attached is other.optimizer


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        save_tables(build(), tmp_path / "file", state=False)


# ---------------------------------------------------------------------- warm start


def test_some_tables_load_under_other_names_without_state(tmp_path: Path) -> None:
    saved, _optimizer = trained(30)
    save_tables(saved, tmp_path, state=True)
    tables = [TableConfig(name="video", embedding_dim=4, init_key="item"), TableConfig(name="creator", embedding_dim=4)]
    other = DynamicEmbeddingCollection(tables, [FeatureConfig(name="a", table="video")], seed=9, backend="naive")
    attached = SparseAdagrad(other, 0.1)
    load_tables(other, tmp_path, state=False, tables=["video"], rename={"video": "item"})
    ours, theirs = other.export_rows("video"), saved.export_rows("item")
    assert torch.equal(ours["ids"], theirs["ids"]) and torch.equal(ours["rows"], theirs["rows"])
    assert (ours["sum"] == 0).all() and other.num_rows("creator") == 0 and attached is other.optimizer
    load_tables(other, tmp_path, state=False, tables=["video", "creator"], rename={"video": "item", "creator": "item"})
    for name in ("video", "creator"):
        assert torch.equal(other.export_rows(name)["rows"], theirs["rows"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tables": ["video"]}, r"no tables \['video'\] to load: this collection has \['empty', 'item', 'user'\]"),
        ({"rename": {"item": "film"}}, r"the files have \['empty', 'item', 'user'\].*rename="),
        ({"rename": {"item": "user"}}, r"the files have \['empty', 'item', 'user'\]"),
        ({"tables": ["item"], "rename": {"item": "user"}}, "embedding_dim of table 'item': the files have 2, this.* 4"),
    ],
)
def test_impossible_warm_starts_name_both_sides(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    saved, _optimizer = trained(10)
    save_tables(saved, tmp_path, state=False)
    with pytest.raises(ValueError, match=message):
        load_tables(build(), tmp_path, **options)


# ---------------------------------------------------------------------- checksums


@pytest.mark.parametrize("state", [True, False])
def test_checksums_are_compared_on_the_way(tmp_path: Path, state: bool) -> None:
    """Every byte counts: also those of tensors that are not wanted, beside tables without rows."""
    tables, _optimizer = trained(100)
    files = save_tables(tables, tmp_path, state=True, max_shard_bytes=4000)
    load_tables(build(), tmp_path, state=state, fingerprints=files)
    shard = next(name for name in sorted(files) if name.endswith(".safetensors"))
    content = (tmp_path / shard).read_bytes()
    for at in range(9, len(content), len(content) // 8):
        (tmp_path / shard).write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
        with pytest.raises(DamagedFile):
            load_tables(build(), tmp_path, state=state, fingerprints=files)


def test_an_export_has_the_checksums_of_its_tables(tmp_path: Path) -> None:
    tables, _optimizer = trained(100)
    save_tables(tables, tmp_path, state=False, max_shard_bytes=2000)
    load_tables(build(), tmp_path)
    shard = max(tmp_path.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=f"checksum of {shard.name} is wrong"):
        load_tables(build(), tmp_path)
