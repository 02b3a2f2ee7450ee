"""Which source comes next: a weighted, evenly spread choice that is a pure function of the index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from mm15_megatron.data.permutation import derive_key
from mm15_megatron.errors import DataError

Int64 = npt.NDArray[np.int64]

_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)  # 2 ** 64 / golden ratio: its multiples spread most evenly
_BLOCK: Final = 1 << 16


class Mixture:
    """Choose a source for each index by weight.

    Index i falls on point ``key + i / golden ratio`` (modulo 1), and the sources divide the circle by weight: shares
    are exact up to a few units over *any* stretch of indices, so even short runs see the mixture they asked for.

    Args:
        weights: positive weights, normalised here.
        seed: seeds the starting point.

    Raises:
        DataError: if there is no weight, or one is not positive and finite.
    """

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        values = np.asarray(weights, dtype=np.float64)
        if values.size == 0 or not np.isfinite(values).all() or (values <= 0).any():
            raise DataError(
                f"mixture weights {list(weights)}", fix="give at least one source, each with a positive weight"
            )
        self.shares = values / values.sum()
        ends = [int(share * 2**64) for share in np.cumsum(self.shares)[:-1]]
        self._ends = np.array([min(end, 2**64 - 1) for end in ends], dtype=np.uint64)
        self._key = np.uint64(derive_key(seed, "mixture"))
        self._counts: list[Int64] = [np.zeros(values.size, np.int64)]  # before each block of indices
        self._last = (0, self._counts[0])  # index and counts of the latest question: the next one is rarely far

    def choose(self, first: int, stop: int) -> Int64:
        """Return the source of each index in [first, stop), int64."""
        points = np.arange(first, stop, dtype=np.uint64) * _GOLDEN + self._key
        return np.searchsorted(self._ends, points, side="right")

    def count_before(self, index: int) -> Int64:
        """Return how often each source was chosen before ``index``, int64 [sources]."""
        at, counts = self._last
        if not at <= index < at + _BLOCK:
            at, counts = self._block_before(index)
        self._last = (index, counts + self._count(at, index))
        return self._last[1].copy()

    def _block_before(self, index: int) -> tuple[int, Int64]:
        block = index // _BLOCK
        while len(self._counts) <= block:
            at = (len(self._counts) - 1) * _BLOCK
            self._counts.append(self._counts[-1] + self._count(at, at + _BLOCK))
        return block * _BLOCK, self._counts[block]

    def _count(self, first: int, stop: int) -> Int64:
        return np.bincount(self.choose(first, stop), minlength=len(self.shares)).astype(np.int64)
