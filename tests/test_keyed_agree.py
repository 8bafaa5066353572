"""Law 1: the torch and the numpy keyed generators are one function."""

import numpy as np
import torch
from grzoo.data import keyed as numpy_keyed
from grzoo.embeddings import keyed as torch_keyed

WORDS = [0, 1, -1, 2**63 - 1, -(2**63), 1 << 52, 12345678901234567]
MASK = 2**64 - 1


def words() -> np.ndarray:
    random = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, size=1000, endpoint=True)
    return np.concatenate([np.array(WORDS, dtype=np.int64), random])


def same(tensor: object, array: object) -> bool:
    assert isinstance(tensor, torch.Tensor)
    return np.array_equal(tensor.numpy().view(np.uint64), np.asarray(array).astype(np.uint64))


def test_mix64_and_keyed_agree_on_arrays_that_broadcast() -> None:
    ours, theirs = torch.from_numpy(words()), words().view(np.uint64)
    assert same(torch_keyed.mix64(ours), numpy_keyed.mix64(theirs))
    assert same(torch_keyed.keyed(7, ours[:, None], ours[:9]), numpy_keyed.keyed(7, theirs[:, None], theirs[:9]))
    assert same(torch_keyed.fold(ours, 5), numpy_keyed.fold(theirs, 5))


def test_python_integers_agree_with_arrays_of_both() -> None:
    for word in WORDS:
        expected = torch_keyed.keyed(3, word)
        assert isinstance(expected, int)
        assert expected & MASK == int(numpy_keyed.keyed(3, word)) & MASK
        assert torch_keyed.keyed(3, torch.tensor([word])).tolist() == [expected]  # type: ignore[union-attr]


def test_string_keys_agree() -> None:
    for text in ("", "item", "Größe", "名前"):
        assert torch_keyed.string_key(text) & MASK == numpy_keyed.string_key(text) & MASK
