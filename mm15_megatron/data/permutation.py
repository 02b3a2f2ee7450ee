"""Keyed bijections and keys: pseudo-random order that needs no memory and no state."""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np
import numpy.typing as npt

_ROUNDS: Final = 6
_MULTIPLIERS: Final = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # the finaliser of splitmix64


def derive_key(seed: int, *parts: int | str) -> int:
    """Return a 64-bit key that is a pure function of the seed and of what it is for."""
    return int.from_bytes(hashlib.sha256(repr((seed, *parts)).encode()).digest()[:8], "little")


def permute(positions: npt.NDArray[np.int64], size: int, *, key: int) -> npt.NDArray[np.int64]:
    """Apply a keyed bijection of [0, size) to ``positions`` (a Feistel network with cycle walking).

    Args:
        positions: int64, values in [0, size).
        size: size of the domain.
        key: 64-bit key; another key gives another order.
    """
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    keys = [np.uint64(derive_key(key, round_)) for round_ in range(_ROUNDS)]
    values = _feistel(positions.astype(np.uint64), half, keys)
    outside = np.flatnonzero(values >= np.uint64(size))
    while outside.size:  # the network permutes [0, 4 ** half): walk until the value is inside
        values[outside] = _feistel(values[outside], half, keys)
        outside = outside[values[outside] >= np.uint64(size)]
    return values.astype(np.int64)


def _feistel(values: npt.NDArray[np.uint64], half: np.uint64, keys: list[np.uint64]) -> npt.NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64-bit values."""
    values = (values ^ (values >> np.uint64(30))) * _MULTIPLIERS[0]
    values = (values ^ (values >> np.uint64(27))) * _MULTIPLIERS[1]
    return values ^ (values >> np.uint64(31))
