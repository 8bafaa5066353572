"""Keys are a function of their words: compared with arithmetic on Python integers."""

import numpy as np
import pytest
from grzoo.data.keyed import below, fold, fold_repeated, keyed, mix64, string_key, uniform, word_table

MASK = 2**64 - 1
WORDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF]


def reference_mix(z: int) -> int:
    z &= MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def reference_fold(key: int, word: int) -> int:
    return reference_mix(key + 0x9E3779B97F4A7C15 + reference_mix(word + 0x632BE59BD9B4E019))


def test_mix64_and_fold_equal_integer_arithmetic() -> None:
    words = np.array(WORDS, dtype=np.int64)
    assert mix64(words).tolist() == [reference_mix(word) for word in WORDS]
    assert fold(words[:, None], words).tolist() == [[reference_fold(a & MASK, b) for b in WORDS] for a in WORDS]


def test_keyed_folds_its_words_from_left_to_right() -> None:
    expected = reference_fold(reference_fold(reference_fold(0, 3), -4), 5)
    assert int(keyed(3, -4, 5)) == expected
    assert keyed(3, np.array([-4]), 5).tolist() == [expected]


def test_arguments_are_not_changed() -> None:
    words = np.arange(4, dtype=np.uint64)
    mix64(words), fold(words, words), below(words, 7)
    assert words.tolist() == [0, 1, 2, 3]


def test_fold_repeated_equals_fold() -> None:
    keys, counts = keyed(7, np.arange(4)), np.array([3, 0, 40_000, 1])
    words = np.arange(counts.sum(), dtype=np.int64)[::-1] % 999
    out = np.empty(len(words), dtype=np.uint64)
    fold_repeated(keys, counts, word_table(999), words, out)
    assert np.array_equal(out, fold(np.repeat(keys, counts), words))


def test_string_key_is_fnv_1a_then_mix64() -> None:
    assert string_key("") == reference_mix(0xCBF29CE484222325)
    assert string_key("a") == reference_mix(0xAF63DC4C8601EC8C)  # published FNV-1a 64 test vector


def test_below_is_the_high_word_of_the_product() -> None:
    bits = mix64(np.arange(1000))
    for limit in (1, 2, 3416, 2**32 - 1):
        assert below(bits, limit).tolist() == [(int(word) * limit) >> 64 for word in bits]


def test_uniform_has_24_bits() -> None:
    assert uniform(np.array([0, MASK], dtype=np.uint64)).tolist() == [0.0, 1 - 2**-24]


def test_bits_look_random() -> None:
    values = uniform(keyed(0, np.arange(100)[:, None], np.arange(100)))
    assert abs(values.mean() - 0.5) < 0.02 and abs(values.std() - 12**-0.5) < 0.02


@pytest.mark.parametrize("limit", [0, -1, 2**32])
def test_below_refuses_limits_outside_32_bits(limit: int) -> None:
    with pytest.raises(ValueError, match=f"limit={limit}"):
        below(np.arange(3), limit)


def test_floats_are_no_words() -> None:
    with pytest.raises(ValueError, match="float64"):
        keyed(1, np.array([0.5]))
