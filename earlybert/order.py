"""Order and chance without a table and without a state: pure functions of keys.

`permute` says which sample stands at a position of an epoch, `words` gives the random words that a sample's
masks are made of. The surprise: nothing here remembers anything, so a resumed run, another number of ranks
or a worker that prefetches gets the same answer by construction.
"""

from __future__ import annotations

import functools
import hashlib
import math
from typing import overload

import numpy as np

_ROUNDS = 8
_WORD = (1 << 64) - 1


def key_of(*parts: int | str) -> int:
    """Hash words and numbers to one 64-bit key, such as `key_of("order", seed, epoch)`."""
    digest = hashlib.sha256(repr(parts).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "little")


@overload
def permute(position: int, *, length: int, key: int) -> int: ...
@overload
def permute(position: np.ndarray, *, length: int, key: int) -> np.ndarray: ...
def permute(position: int | np.ndarray, *, length: int, key: int) -> int | np.ndarray:
    """Send a position, or an array of them, through a bijection of range(length) chosen by `key`.

    A Feistel network whose halves are numbers modulo a and b, where a * b is the smallest such product that
    holds `length`; results outside the range walk on along their cycle. Returns int64.
    """
    x = np.atleast_1d(np.asarray(position, dtype=np.int64)).astype(np.uint64)
    if x.size and int(x.max()) >= length:
        raise IndexError(f"position {int(x.max())} of {length}")
    a = math.isqrt(max(length - 1, 0)) + 1
    b = -(-length // a)
    keys = _round_keys(key)
    y = _feistel(x, a=a, b=b, keys=keys)
    while (outside := y >= length).any():
        y[outside] = _feistel(y[outside], a=a, b=b, keys=keys)
    result = y.astype(np.int64)
    return result if isinstance(position, np.ndarray) else int(result[0])


def words(count: int, *, seed: int, purpose: str, epoch: int, sample: int) -> np.ndarray:
    """Return `count` random 64-bit words that depend on the four keys alone (uint64 [count]).

    Philox with (seed, purpose) as its key and (sample, epoch) in the upper words of its counter: two
    samples' streams never overlap. Raw words, not numpy's distributions, whose streams may change between
    numpy's versions.
    """
    key = np.array([seed, _purpose_key(purpose)], dtype=np.uint64)
    counter = np.array([0, sample, epoch, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def scramble(x: np.ndarray, *, key: int) -> np.ndarray:
    """Hash each 64-bit word under a key (the finaliser of SplitMix64; a bijection of the words)."""
    z = x.astype(np.uint64) + np.uint64(key & _WORD)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@functools.lru_cache
def _purpose_key(purpose: str) -> int:
    return key_of(purpose)


@functools.lru_cache
def _round_keys(key: int) -> tuple[int, ...]:
    return tuple(key_of("round", key, index) for index in range(_ROUNDS))


def _feistel(x: np.ndarray, *, a: int, b: int, keys: tuple[int, ...]) -> np.ndarray:
    left: np.ndarray = x // np.uint64(b)
    right: np.ndarray = x % np.uint64(b)
    for index, key in enumerate(keys):
        if index % 2 == 0:
            left = (left + scramble(right, key=key) % np.uint64(a)) % np.uint64(a)
        else:
            right = (right + scramble(left, key=key) % np.uint64(b)) % np.uint64(b)
    return left * np.uint64(b) + right
