"""Law 1: keyed bits are the documented function, whether of ints or of tensors, and look random."""

import pytest
import torch
from grzoo.embeddings.keyed import fold, keyed, mix64, string_key, uniform

MASK = 2**64 - 1
WORDS = [0, 1, -1, 5, 2**63 - 1, -(2**63), 1 << 52]


def reference_mix64(z: int) -> int:
    z &= MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def reference_fold(key: int, word: int) -> int:
    return reference_mix64(key + 0x9E3779B97F4A7C15 + reference_mix64(word + 0x632BE59BD9B4E019))


def test_mix64_and_fold_are_the_documented_functions() -> None:
    for word in WORDS:
        assert int(mix64(word)) & MASK == reference_mix64(word)
        assert int(fold(word, 77)) & MASK == reference_fold(word, 77)
        assert int(keyed(word, 77)) & MASK == reference_fold(reference_fold(0, word), 77)
    # The published splitmix64 stream of seed 0: finaliser of multiples of the golden ratio.
    assert int(mix64(0x9E3779B97F4A7C15)) & MASK == 0xE220A8397B1DCDAF


def test_tensors_give_what_ints_give_and_broadcast() -> None:
    words = torch.tensor(WORDS)
    grid = keyed(9, words[:, None], words)
    assert isinstance(grid, torch.Tensor) and grid.dtype == torch.int64
    assert grid.tolist() == [[keyed(9, a, b) for b in WORDS] for a in WORDS]
    assert len(set(grid.flatten().tolist())) == len(WORDS) ** 2


def test_string_key_is_fnv1a_then_mix64() -> None:
    # FNV-1a 64 of "a" is af63dc4c8601ec8c (published test vector).
    assert string_key("a") & MASK == reference_mix64(0xAF63DC4C8601EC8C)
    assert string_key("ä") != string_key("a")


def test_uniform_fills_the_unit_interval() -> None:
    bits = keyed(1, torch.arange(100_000))
    assert isinstance(bits, torch.Tensor)
    values = uniform(bits)
    assert values.dtype == torch.float32 and 0 <= values.min() and values.max() < 1
    assert values.mean().item() == pytest.approx(0.5, abs=0.005)
    counts = torch.histc(values, bins=16, min=0, max=1)
    assert (counts - 6250).abs().max() < 400  # five standard deviations
    assert uniform(torch.tensor([-1, 0])).tolist() == [1 - 2**-24, 0.0]
