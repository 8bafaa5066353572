"""Counter-based randomness on int64 tensors: a value is a pure function of the words it is keyed by (splitmix64).

Words and results are 64-bit, kept as signed int64 (two's complement); Python ints of any size are taken modulo 2^64.
"""

import torch
from torch import Tensor

Word = int | Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 0x632BE59BD9B4E019
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = 0xFFFFFFFFFFFFFFFF


def _signed(value: int) -> int:
    """The int64 that has the same 64 bits."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def shift_right(bits: Word, count: int) -> Word:
    """Logical right shift of a 64-bit word, 0 < count < 64."""
    if isinstance(bits, int):
        return (bits & _MASK) >> count
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _multiply(a: Word, factor: int) -> Word:
    return _signed(a * factor) if isinstance(a, int) else a * _signed(factor)


def _add(a: Word, b: Word) -> Word:
    if isinstance(a, int) and isinstance(b, int):
        return _signed(a + b)
    return (_signed(a) if isinstance(a, int) else a) + (_signed(b) if isinstance(b, int) else b)


def mix64(z: Word) -> Word:
    """The finaliser of splitmix64: a bijection of 64-bit words in which every input bit changes half of the output."""
    z = _multiply(z ^ shift_right(z, 30), _MIX_1)
    z = _multiply(z ^ shift_right(z, 27), _MIX_2)
    z = z ^ shift_right(z, 31)
    return _signed(z) if isinstance(z, int) else z


def fold(key: Word, word: Word) -> Word:
    """Fold one more word into a key; tensors broadcast."""
    return mix64(_add(_add(key, _GOLDEN), mix64(_add(word, _WORD))))


def keyed(*words: Word) -> Word:
    """Return 64 random bits for (words): fold(fold(0, a), b)... int when all words are ints, else int64 tensor.

    Example:
        bits = keyed(seed, step, torch.arange(5))  # int64 [5]
    """
    key: Word = 0
    for word in words:
        key = fold(key, word)
    return key


def string_key(text: str) -> int:
    """Return a 64-bit key of a text: FNV-1a of its UTF-8 bytes, then mix64."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & _MASK
    key = mix64(value)
    assert isinstance(key, int)
    return key


def uniform(bits: Tensor) -> Tensor:
    """Map bits int64 to float32 in [0, 1): the upper 24 bits times 2^-24."""
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24
