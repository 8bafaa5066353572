"""Read-only tables in their files: the same answers as in memory, opened without reading, refused for training."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from grzoo.embeddings import DynamicEmbeddingCollection, FeatureConfig, SparseSGD, TableConfig
from grzoo.embeddings.hashing import NUM_BUCKETS, bucket
from grzoo.embeddings.index import INDEX_NAME
from grzoo.embeddings.io import load_tables, map_tables, save_tables
from grzoo.embeddings.tensor_file import file_order

EXTREME = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
IDS = torch.cat([EXTREME, torch.arange(1, 400) * 7919])


def build(backend: str = "naive") -> DynamicEmbeddingCollection:
    tables = [
        TableConfig(name="item", embedding_dim=4, unknown="initial"),
        TableConfig(name="user", embedding_dim=4),
        TableConfig(name="wide", embedding_dim=6, unknown="shared"),
        TableConfig(name="empty", embedding_dim=6),
    ]
    features = [FeatureConfig(name=name, table=name) for name in ("item", "user", "wide", "empty")]
    return DynamicEmbeddingCollection(tables, features, backend=backend).eval()


@pytest.fixture(params=[3000, 2 << 30], ids=["many files", "one file"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tables = build()
    tables.prepare([{"item": IDS, "user": IDS[::3], "wide": IDS[:50]}], insert=True)
    save_tables(tables, tmp_path, state=False, max_shard_bytes=request.param)
    return tmp_path


def opened(folder: Path) -> tuple[DynamicEmbeddingCollection, DynamicEmbeddingCollection]:
    """Mapped, and in memory."""
    mapped, loaded = build(), build()
    map_tables(mapped, folder)
    load_tables(loaded, folder)
    return mapped, loaded


def test_mapped_tables_answer_like_loaded_ones(folder: Path) -> None:
    mapped, loaded = opened(folder)
    wanted = torch.cat([IDS, IDS + 1, torch.arange(20), EXTREME.flip(0)]).view(2, -1)
    batch: dict[str, Any] = {name: wanted for name in mapped.features} | {"empty": wanted[:0]}
    with torch.no_grad():
        ours, theirs = mapped(batch), loaded(batch)
    for name in batch:
        assert torch.equal(ours[name], theirs[name]), name
    for name in mapped.table_names:
        assert mapped.num_rows(name) == loaded.num_rows(name)
        torch.testing.assert_close(mapped.export_rows(name), loaded.export_rows(name), rtol=0, atol=0)


def test_mapped_tables_save_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    mapped, loaded = opened(folder)
    for tables, name in ((mapped, "a"), (loaded, "b")):
        save_tables(tables, tmp_path / name, state=False)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_bfloat16_rows_in_the_files_are_half_the_bytes(folder: Path, tmp_path: Path) -> None:
    _, loaded = opened(folder)
    save_tables(loaded, tmp_path / "half", state=False, row_dtype="bfloat16")
    mapped, again = opened(tmp_path / "half")
    for tables in (mapped, again):
        found = tables.export_rows("item")["rows"]
        assert torch.equal(found, loaded.export_rows("item")["rows"].bfloat16().float())
    with pytest.raises(ValueError, match="row_dtype must be one of.*'int8'"):
        save_tables(loaded, tmp_path, state=False, row_dtype="int8")


def test_changing_a_mapped_table_names_the_remedy(folder: Path) -> None:
    mapped, _ = opened(folder)
    before = mapped.export_rows("item")
    new = {"ids": torch.tensor([5]), "rows": torch.ones(1, 4)}
    for change in (
        lambda: mapped.prepare([{"item": torch.tensor([12345])}], insert=True),
        lambda: mapped.import_rows("item", new),
        lambda: SparseSGD(mapped, lr=0.1),
    ):
        with pytest.raises(ValueError, match="read-only.*trainable=True"):
            change()
    torch.testing.assert_close(mapped.export_rows("item"), before, rtol=0, atol=0)
    mapped.train()
    with pytest.raises(ValueError, match="no sparse optimizer"):
        mapped({"item": IDS})


def test_tables_with_an_optimizer_are_not_mapped(folder: Path) -> None:
    tables = build()
    optimizer = SparseSGD(tables, lr=0.1)
    with pytest.raises(ValueError, match="use load_tables"):
        map_tables(tables, folder)
    assert optimizer is tables.optimizer


def test_a_copy_shares_the_files_and_outlives_the_original(folder: Path) -> None:
    mapped, loaded = opened(folder)
    twin = copy.deepcopy(mapped)
    mapped.close()
    torch.testing.assert_close(twin.export_rows("item"), loaded.export_rows("item"), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="closed"):
        mapped.num_rows("item")


LARGE = """
import json, resource, sys, time
import torch
from grzoo.embeddings import DynamicEmbeddingCollection, FeatureConfig, TableConfig
from grzoo.embeddings.io import map_tables

def in_memory():
    return sum(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(("RssAnon", "RssFile"))) * 1024

tables = DynamicEmbeddingCollection(
    [TableConfig(name="item", embedding_dim=64)], [FeatureConfig(name="ids", table="item")], backend="naive"
).eval()
with torch.no_grad():
    tables({"ids": torch.arange(10)})
before, began = in_memory(), time.perf_counter()
map_tables(tables, sys.argv[1])
seconds = time.perf_counter() - began
with torch.no_grad():
    rows = tables({"ids": torch.tensor([17, 18, 10**9])})["ids"]
print(json.dumps([seconds, in_memory() - before, rows.sum(1).tolist(), tables.num_rows()]))
"""


def test_opening_and_looking_up_touch_few_pages_of_a_large_file(tmp_path: Path) -> None:
    """600 MB of rows, nearly all of them a hole in the file, in a process of its own."""
    count, dim, marked = 2_300_000, 64, 17
    ids = torch.arange(count)
    ids = ids[torch.argsort(bucket(ids), stable=True)]
    offsets = torch.cat(
        [torch.zeros(1, dtype=torch.int64), torch.bincount(bucket(ids), minlength=NUM_BUCKETS).cumsum(0)]
    )
    layout = {
        "item.ids": (torch.int64, (count,)),
        "item.rows": (torch.float32, (count, dim)),
        "item.bucket_offsets": (torch.int64, (NUM_BUCKETS + 1,)),
    }
    assert file_order(layout) == ["item.bucket_offsets", "item.ids", "item.rows"]
    ends = [0, offsets.nbytes, offsets.nbytes + ids.nbytes, offsets.nbytes + ids.nbytes + 4 * count * dim]
    header = {
        name: {
            "dtype": "F32" if "rows" in name else "I64",
            "shape": list(layout[name][1]),
            "data_offsets": ends[k : k + 2],
        }
        for k, name in enumerate(file_order(layout))
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    place = int((ids == marked).nonzero())
    file = "embeddings-00001-of-00001.safetensors"
    with (tmp_path / file).open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text + offsets.numpy().tobytes() + ids.numpy().tobytes())
        stream.truncate(8 + len(text) + ends[-1])
        stream.seek(8 + len(text) + ends[2] + 4 * dim * place)
        stream.write(torch.ones(dim).numpy().tobytes())
    empty = DynamicEmbeddingCollection([TableConfig(name="item", embedding_dim=dim)], [], backend="naive")
    save_tables(empty, tmp_path / "empty", state=False)
    index = json.loads((tmp_path / "empty" / INDEX_NAME).read_text())
    index["metadata"] |= {"rows": {"item": count}}
    index["metadata"]["shards"][0] |= {"rows": {"item": count}}
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))

    done = subprocess.run([sys.executable, "-c", LARGE, str(tmp_path)], capture_output=True, text=True, check=True)
    seconds, grown, sums, rows = json.loads(done.stdout.splitlines()[-1])
    assert sums == [dim, 0, 0] and rows == count
    assert grown < 20 << 20 and seconds < 5, (grown, seconds)  # of 600 MB; a few milliseconds on a quiet machine
