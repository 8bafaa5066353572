"""Law 3 for exports: what is damaged or forged is refused by name, mapped or read; what lies beside is left alone."""

import json
from pathlib import Path

import pytest
import torch
from grzoo.embeddings.io import INDEX_NAME
from grzoo.models import AutoModelForRetrieval

SHARD = "embeddings-00002-of-"


@pytest.fixture
def export(micro_model, tmp_path, monkeypatch):
    """An export with several shards, its model, and room around it."""
    import functools

    import grzoo.models.base as base

    model = micro_model()
    with torch.no_grad():
        model.embeddings({"candidate_ids": torch.arange(100)}, insert=True)
    monkeypatch.setattr(base, "save_tables", functools.partial(base.save_tables, max_shard_bytes=1000))
    folder = tmp_path / "export"
    model.eval().save_pretrained(folder)
    return folder, model


def shard_of(folder: Path) -> Path:
    return next(folder.glob(f"{SHARD}*"))


def edit_index(folder: Path, change) -> None:
    path = folder / INDEX_NAME
    index = json.loads(path.read_text())
    change(index["metadata"])
    path.write_text(json.dumps(index))


def forge_header(folder: Path, claimed: int) -> None:
    shard_of(folder).write_bytes(claimed.to_bytes(8, "little") + shard_of(folder).read_bytes()[8:])


def link_out(folder: Path) -> None:
    shard_of(folder).symlink_to(shard_of(folder).rename(folder.parent / "elsewhere.safetensors"))


def name_shard(folder: Path, name: str) -> None:
    edit_index(folder, lambda metadata: metadata["shards"][1].update(file=name))


def twice(metadata) -> None:
    metadata["shards"].insert(1, metadata["shards"][1])


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shard_of(f).write_bytes(shard_of(f).read_bytes()[:-1]), "header describes"),
        (lambda f: shard_of(f).write_bytes(b""), "cut short or no safetensors file"),
        (lambda f: shard_of(f).unlink(), "embeddings-00002-of"),
        (lambda f: forge_header(f, 2**60), "a header of 1152921504606846976"),
        (lambda f: edit_index(f, lambda metadata: metadata.update(format_version=7)), "version 7, this program reads"),
        (lambda f: edit_index(f, lambda metadata: metadata.update(hash_version=7)), "hash version: the files have 7"),
        (lambda f: edit_index(f, twice), "do not cover each bucket once"),
        (lambda f: name_shard(f, "../export/embeddings-00002-of-00003.safetensors"), "names '../export"),
        (lambda f: name_shard(f, "/etc/hostname"), "names '/etc/hostname' as a shard"),
        (link_out, "is a link to .* outside of"),
    ],
)
def test_damage_is_refused_by_name(export, damage, message, trainable):
    folder, _ = export
    damage(folder)
    with pytest.raises((ValueError, OSError), match=message):
        AutoModelForRetrieval.from_pretrained(folder, trainable=trainable)


def test_a_flipped_bit_is_found_where_the_rows_are_read(export):
    folder, _ = export
    content = bytearray(shard_of(folder).read_bytes())
    content[-5] ^= 8
    shard_of(folder).write_bytes(content)
    with pytest.raises(ValueError, match=f"the checksum of {SHARD}.* is wrong"):
        AutoModelForRetrieval.from_pretrained(folder, trainable=True)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_stray_shard_is_left_alone(export, trainable):
    folder, model = export
    (folder / "embeddings-00009-of-00009.safetensors").write_bytes(shard_of(folder).read_bytes())
    loaded = AutoModelForRetrieval.from_pretrained(folder, trainable=trainable)
    assert torch.equal(loaded.embeddings.ids("items"), model.embeddings.ids("items"))
