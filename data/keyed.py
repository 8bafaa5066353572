"""Counter-based randomness in numpy: a 64-bit key is a function of the words it belongs to, never of call order.

`mix64` is the finaliser of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014);
`fold` adds one word to a key. All arithmetic is modulo 2^64, and `grzoo.embeddings.keyed` gives the same bits on
torch tensors.

    key = keyed(seed, step, user)          # uint64, words broadcast
    uniform(fold(key, site))               # [0, 1)
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

UInt64 = NDArray[np.uint64]

_MASK = (1 << 64) - 1
_KEY_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_WORD_INCREMENT = np.uint64(0x632BE59BD9B4E019)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_CACHED_WORDS = 1 << 14  # a block and its shifted copy stay in a core's cache


def as_words(values: ArrayLike) -> UInt64:
    """`values` (ints of any sign and size, or integer arrays) modulo 2^64, uint64 of the same shape."""
    if isinstance(values, int):
        return np.asarray(values & _MASK, dtype=np.uint64)
    array: NDArray[Any] = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise ValueError(
            f"keys are made of integers, got dtype {array.dtype}; pass int64, or string_key(text) for text"
        )
    return array.astype(np.uint64, copy=False)


def _mix_in_place(z: UInt64) -> UInt64:
    z ^= z >> np.uint64(30)
    np.multiply(z, _MULTIPLIER_1, out=z)
    z ^= z >> np.uint64(27)
    np.multiply(z, _MULTIPLIER_2, out=z)
    z ^= z >> np.uint64(31)
    return z


def mix64(z: ArrayLike) -> UInt64:
    """A bijection of 64-bit words in which every input bit moves every output bit; uint64, shape of `z`."""
    return _mix_in_place(np.array(as_words(z)))


def fold(key: ArrayLike, x: ArrayLike) -> UInt64:
    """The key `key` with one more word `x`: `mix64(key + C1 + mix64(x + C2))`; uint64, broadcast of both shapes."""
    word = _mix_in_place(np.array(np.add(as_words(x), _WORD_INCREMENT)))
    return _mix_in_place(np.array(np.add(np.add(as_words(key), _KEY_INCREMENT), word)))


def word_table(size: int) -> UInt64:
    """`mix64(x + C2)` of the words x = 0..size - 1, uint64 [size]: what `fold` mixes into a key for x."""
    return _mix_in_place(np.arange(size, dtype=np.uint64) + _WORD_INCREMENT)


def fold_repeated(keys: UInt64, counts: NDArray[np.int64], table: UInt64, x: NDArray[np.int64], out: UInt64) -> None:
    """Write `fold` of each key, repeated `counts` times (int [n]), with the words `x` (int64 [sum]) into `out`.

    table: `word_table` of more words than the largest of `x`.
    """
    repeated: UInt64 = np.repeat(keys + _KEY_INCREMENT, counts)
    for first in range(0, len(out), _CACHED_WORDS):
        part = slice(first, first + _CACHED_WORDS)
        np.take(table, x[part], out=out[part], mode="clip")
        out[part] += repeated[part]
        _mix_in_place(out[part])


def keyed(*words: ArrayLike) -> UInt64:
    """The key of a sequence of words, `fold(fold(fold(0, a), b), c)`; uint64, broadcast of all shapes."""
    key = as_words(0)
    for word in words:
        key = fold(key, word)
    return key


def string_key(text: str) -> int:
    """The word of a text: FNV-1a over its UTF-8 bytes, then `mix64`; an int in [0, 2^64)."""
    value = 0xCBF29CE484222325
    for byte in text.encode("utf-8"):
        value = ((value ^ byte) * 0x100000001B3) & _MASK
    return int(mix64(value))


def uniform(bits: ArrayLike) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 24 random bits: `(bits >> 40) * 2^-24`."""
    return (as_words(bits) >> np.uint64(40)).astype(np.float64) * 2.0**-24


def below(bits: ArrayLike, limit: int) -> NDArray[np.int64]:
    """Uniform integers in [0, limit): the high word of the 128-bit product `bits * limit`, int64.

    Raises ValueError unless 0 < limit < 2^32 (the product is made of two 32-bit halves).
    """
    if not 0 < limit < 1 << 32:
        raise ValueError(f"below() draws from 1 to 2^32 - 1 values, got limit={limit}")
    words, factor, half = as_words(bits), np.uint64(limit), np.uint64(32)
    low = (words & np.uint64(0xFFFFFFFF)) * factor
    low >>= half
    high = words >> half
    high *= factor
    high += low
    high >>= half
    return high.view(np.int64)


SITE_ORDER = string_key("grzoo/epoch-order")
SITE_BLOCK = string_key("grzoo/epoch-order-of-blocks")
SITE_LENGTH = string_key("grzoo/stochastic-length")
SITE_NEGATIVE = string_key("grzoo/negative")
SITE_SHARED_NEGATIVE = string_key("grzoo/shared-negative")
