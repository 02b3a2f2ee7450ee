"""Which source comes next: a weighted, evenly spread choice that is a pure function of the index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from mm15_megatron.data.permutation import derive_key
from mm15_megatron.errors import DataError

Int64 = npt.NDArray[np.int64]

_GOLDEN: Final = 0x9E3779B97F4A7C15  # 2 ** 64 / golden ratio: its multiples spread most evenly
_CIRCLE: Final = 2**64


@dataclass(frozen=True)
class Weights:
    """Weights that hold from one index on, until the next ones.

    Attributes:
        first: the index.
        values: one weight a source, not negative; normalised by :class:`Mixture`.
    """

    first: int
    values: tuple[float, ...]


class Mixture:
    """Choose a source for each index by weight.

    Index i falls on point ``key + i / golden ratio`` (modulo 1), and the sources divide the circle by weight: shares
    are exact up to a few units over *any* stretch of indices, so even short runs see the mixture they asked for. How
    often a source was chosen before an index has a closed form: nothing is stored, and no index is far away.

    Args:
        schedule: weights by index, ascending, the first from index 0 on.
        seed: seeds the starting point.

    Attributes:
        shares: (first index, share of each source) of each part of the schedule.

    Raises:
        DataError: if there is no weight, one is negative or not finite, a part has none above 0, or the parts are not
            in order.
    """

    def __init__(self, schedule: Sequence[Weights], *, seed: int) -> None:
        firsts = [part.first for part in schedule]
        if not firsts or firsts[0] != 0 or firsts != sorted(set(firsts)):
            raise DataError(f"the mixture's schedule starts at {firsts}", fix="give parts from index 0 on, in order")
        shares = []
        for part in schedule:
            values = np.asarray(part.values, dtype=np.float64)
            if values.size == 0 or not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
                raise DataError(
                    f"mixture weights {list(part.values)}", fix="give at least one source, and weights that are not < 0"
                )
            shares.append((part.first, values / values.sum()))
        self.shares = tuple(shares)
        self._firsts = firsts
        self._ends = [_ends(values) for _, values in shares]
        self._key = derive_key(seed, "mixture")
        self._sources = shares[0][1].size

    def choose(self, first: int, stop: int) -> Int64:
        """Return the source of each index in [first, stop), int64."""
        parts = [np.zeros(0, np.int64)]
        for part, (start, end) in enumerate(self._parts(stop)):
            if end > max(first, start):
                indices = np.arange(max(first, start), end, dtype=np.uint64)
                points = indices * np.uint64(_GOLDEN) + np.uint64(self._key)
                # an end of 2 ** 64 lies behind every point: of the ends before it, none is reached by such a source
                ends = np.array([e for e in self._ends[part] if e < _CIRCLE], dtype=np.uint64)
                parts.append(np.searchsorted(ends, points, side="right"))
        return np.concatenate(parts)

    def count_before(self, index: int) -> Int64:
        """Return how often each source was chosen before ``index``, int64 [sources]."""
        below = np.zeros(self._sources + 1, np.int64)  # how often a point fell below each end
        for part, (start, end) in enumerate(self._parts(index)):
            ends = [0, *self._ends[part], _CIRCLE]
            below += [self._points_below(e, end) - self._points_below(e, start) for e in ends]
        return np.diff(below)

    def _parts(self, stop: int) -> list[tuple[int, int]]:
        """Return the range of indices before ``stop`` that each part of the schedule rules."""
        edges = [*self._firsts[1:], stop]
        return [(start, min(end, stop)) for start, end in zip(self._firsts, edges, strict=True) if start < stop]

    def _points_below(self, end: int, count: int) -> int:
        """Return how many of the first ``count`` indices have a point in [0, end).

        x mod m < e exactly if floor(x / m) - floor((x - e) / m) is 1, for 0 <= e <= m.
        """
        reached = _floor_sum(count, slope=_GOLDEN, offset=self._key)
        return reached - _floor_sum(count, slope=_GOLDEN, offset=self._key - end)


def _ends(values: npt.NDArray[np.float64]) -> list[int]:
    """Return where the stretch of each source but the last ends; rounding leaves none to sources of weight 0."""
    last = int(np.flatnonzero(values)[-1])
    ends = np.cumsum(values).tolist()
    return [_CIRCLE if i >= last else min(round(end * _CIRCLE), _CIRCLE) for i, end in enumerate(ends[:-1])]


def _floor_sum(count: int, *, slope: int, offset: int) -> int:
    """Return the sum of floor((slope * i + offset) / 2 ** 64) over i in [0, count), in logarithmic time.

    Euclid's algorithm on the lattice points below a line: whole multiples are taken out, then the axes are swapped.
    """
    total, modulus = 0, _CIRCLE
    while True:
        total += count * (count - 1) // 2 * (slope // modulus) + count * (offset // modulus)
        slope, offset = slope % modulus, offset % modulus
        top = slope * count + offset
        if top < modulus:
            return total
        count, offset = divmod(top, modulus)
        slope, modulus = modulus, slope
