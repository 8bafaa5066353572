"""Law 2: original ids and model ids are one-to-one, and any int64 is a valid id."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from grzoo.data import Catalogue
from grzoo.data.catalogue import hash_ids
from grzoo.data.keyed import fold

NAMES = ["a", "Ünï", ""]


def catalogue(item_ids: list[Any], ids: Any, mapping: str, **columns: Any) -> Catalogue:
    counts = list(range(len(item_ids)))
    return Catalogue(pa.table({"item_id": item_ids, "id": ids, "count": counts, **columns}), mapping)


def test_hashes_are_signed_xxh3() -> None:
    expected = [int(np.uint64(xxhash.xxh3_64_intdigest(name.encode())).astype(np.int64)) for name in NAMES]
    assert hash_ids(pa.array(NAMES)).tolist() == expected


def test_encode_and_decode_are_inverse() -> None:
    ids = fold(0, np.arange(100)).view(np.int64)
    items = catalogue([f"item {i}" for i in range(100)], ids, "vocabulary")
    encoded, known = items.encode(["item 7", "item 99", "item 0"])
    assert known.all() and encoded.tolist() == ids[[7, 99, 0]].tolist()
    assert items.decode(encoded) == ["item 7", "item 99", "item 0"]
    assert items.index_of(np.array([[ids[3], 12345]])).tolist() == [[3, -1]]


@pytest.mark.parametrize("item", [-(2**63), 2**63 - 1, 0, -1])
def test_any_int64_is_an_id(item: int) -> None:
    items = catalogue([item], [item], "identity")
    assert items.encode([item])[0].tolist() == [item] and items.decode([item]) == [item]


def test_unknown_ids() -> None:
    hashed = catalogue(["a"], hash_ids(pa.array(["a"])), "hash")
    assert hashed.encode(["a", "b"])[0].tolist() == hash_ids(pa.array(["a", "b"])).tolist()
    assert hashed.encode(["a", "b"])[1].tolist() == [True, False]
    assert catalogue([5], [5], "identity").encode([6, 5])[0].tolist() == [6, 5]
    assert catalogue(["a"], [1], "vocabulary").encode(["b"])[0].tolist() == [0]
    assert hashed.decode([17]) == [None]


def test_titles_fall_back_to_original_ids() -> None:
    items = catalogue([10, 20], [1, 2], "vocabulary", title=["Heat", None])
    assert items.titles(np.array([[1, 2], [3, 1]])) == ["Heat", "20", "unknown item 3", "Heat"]
    assert catalogue(["a"], [1], "vocabulary").titles([1]) == ["a"]


def test_ids_of_the_wrong_type_are_refused() -> None:
    with pytest.raises(ValueError, match="item id 'a' does not fit: .* are integers"):
        catalogue([1], [1], "identity").encode(["a"])
    with pytest.raises(ValueError, match="item id 1 does not fit: .* are text"):
        catalogue(["a"], [1], "vocabulary").encode([1])
    assert catalogue([1], [1], "identity").encode([np.int64(1)])[0].tolist() == [1]


def test_a_catalogue_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model ids repeat"):
        catalogue([1, 2], [3, 3], "vocabulary")
    with pytest.raises(ValueError, match=r"lacks the columns \['count'\]"):
        Catalogue(pa.table({"item_id": [1], "id": [1]}), "identity")
    with pytest.raises(FileNotFoundError, match="holds no catalogue"):
        Catalogue.from_folder(tmp_path)


def test_saved_catalogues_are_equal(tmp_path: Path) -> None:
    items = catalogue([10, 20], [1, 2], "vocabulary", title=["Heat", None], genres=[["Crime"], []])
    items.save(tmp_path)
    assert Catalogue.from_folder(tmp_path, "vocabulary").table.equals(items.table)


def test_an_empty_catalogue_knows_nothing() -> None:
    empty = Catalogue(
        pa.table({"item_id": pa.array([], pa.int64()), "id": pa.array([], pa.int64()), "count": []}), "identity"
    )
    assert len(empty) == 0 and empty.index_of([1, 2]).tolist() == [-1, -1]
    assert empty.encode([4])[0].tolist() == [4]
