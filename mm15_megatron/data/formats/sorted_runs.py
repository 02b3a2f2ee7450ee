"""Sorting more keys than memory holds: sorted runs on disk, merged range by range.

A key is 16 bytes of a hash, kept as two uint64 (high, low), so equal ranges of ``high`` hold about equally many. Equal
keys come out in the order in which they went in.

Legend: N records; 2 = (high, low).
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from mm15_megatron.errors import DataError

Words = npt.NDArray[np.uint64]
Values = npt.NDArray[Any]
Item = TypeVar("Item")
Result = TypeVar("Result")

RUN_RECORDS: Final = 2**22
_KEY_BYTES: Final = 16
_PER_WORKER: Final = 4


def key_of(data: bytes) -> bytes:
    """Return the 16-byte key of ``data``."""
    return blake2b(data, digest_size=_KEY_BYTES).digest()


def words(keys: Sequence[bytes]) -> Words:
    """Return 16-byte keys as uint64 [N, 2]."""
    return np.frombuffer(b"".join(keys), dtype=">u8").astype(np.uint64).reshape(-1, 2)


@dataclass(frozen=True)
class Sorted:
    """Records of one range, sorted by key: ``high`` and ``low`` uint64 [N], ``values`` [N]."""

    high_N: Words
    low_N: Words
    values_N: Values

    def first_of_key(self) -> npt.NDArray[np.bool_]:
        """Return a mask [N], True where a key stands for the first time."""
        new_N = np.ones(len(self.high_N), dtype=np.bool_)
        new_N[1:] = (self.high_N[1:] != self.high_N[:-1]) | (self.low_N[1:] != self.low_N[:-1])
        return new_N


class RunWriter:
    """Collect records and sort them run by run.

    Args:
        folder: an empty folder for the runs; its owner removes it.
        values: dtype of the value of a record.
        run_records: records held in memory.
    """

    def __init__(self, folder: Path, *, values: np.dtype[Any], run_records: int = RUN_RECORDS) -> None:
        self._folder = folder
        self._dtype = values
        self._limit = run_records
        self._pending: list[tuple[Words, Values]] = []
        self._waiting = 0
        self._runs = 0
        self.total = 0

    def append(self, keys_N2: Words, values_N: Values) -> None:
        """Add records.

        Raises:
            DataError: if there are not as many keys as values.
        """
        if len(keys_N2) != len(values_N):
            raise DataError(f"{len(keys_N2)} keys and {len(values_N)} values", fix="give one value a key")
        self._pending.append((keys_N2, values_N))
        self._waiting += len(keys_N2)
        self.total += len(keys_N2)
        if self._waiting >= self._limit:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        part = _sort(
            np.concatenate([keys[:, 0] for keys, _ in self._pending]),
            np.concatenate([keys[:, 1] for keys, _ in self._pending]),
            np.concatenate([values for _, values in self._pending]).astype(self._dtype),
        )
        for name, column in (("high", part.high_N), ("low", part.low_N), ("values", part.values_N)):
            np.save(self._folder / f"{self._runs:06d}.{name}.npy", column)
        self._runs += 1
        self._pending, self._waiting = [], 0

    def merged(self) -> Iterator[Sorted]:
        """Yield all records in order of key, about a run's worth at a time; no key is in two pieces."""
        self._flush()
        pieces = max(1, -(-self.total // self._limit))
        edges = [(i * 2**64) // pieces for i in range(pieces + 1)]
        for first, stop in zip(edges[:-1], edges[1:], strict=True):
            parts = [self._slice(run, first, stop) for run in range(self._runs)]
            if parts:
                yield _sort(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _slice(self, run: int, first: int, stop: int) -> tuple[Words, Words, Values]:
        high, low, values = (
            np.load(self._folder / f"{run:06d}.{name}.npy", mmap_mode="r") for name in ("high", "low", "values")
        )
        a = int(np.searchsorted(high, np.uint64(first)))
        b = len(high) if stop == 2**64 else int(np.searchsorted(high, np.uint64(stop)))
        return np.array(high[a:b]), np.array(low[a:b]), np.array(values[a:b])


def _sort(high: Words, low: Words, values: Values) -> Sorted:
    order = np.lexsort((low, high))  # stable
    return Sorted(high[order], low[order], values[order])


def find(high_N: Words, low_N: Words, key: bytes) -> int:
    """Return the place of ``key`` in sorted columns, or -1."""
    high, low = (int(word) for word in words([key])[0])
    at = int(np.searchsorted(high_N, np.uint64(high)))
    while at < len(high_N) and int(high_N[at]) == high:
        if int(low_N[at]) == low:
            return at
        at += 1
    return -1


def ordered_map(work: Callable[[Item], Result], items: Sequence[Item], *, workers: int) -> Iterator[Result]:
    """Yield ``work(item)`` in the order of ``items``, by ``workers`` processes; at most a few results wait in memory.

    Raises:
        DataError: for fewer than one worker, and whatever ``work`` raises.
    """
    if workers < 1:
        raise DataError(f"{workers} workers", fix="ask for one or more")
    if workers == 1 or len(items) < 2:
        yield from map(work, items)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("forkserver")) as pool:
        for start in range(0, len(items), workers * _PER_WORKER):
            yield from pool.map(work, items[start : start + workers * _PER_WORKER])
