"""What packing found in each chunk of an order: a small table on disk, so that a resumed run finds its row at once.

A table is a pure function of its digest. It grows while a run packs, is written by one rank, atomically, and read by
all; a chunk that it lacks is packed again. Deleting it costs time, never correctness. The file is a SHA-256 of the
numbers and the numbers, int64 in lines of a fixed length.
"""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]

_LOGGER = logging.getLogger(__name__)

_DIGEST_BYTES: Final = hashlib.sha256().digest_size


class ChunkTable:
    """One line of whole numbers for each chunk of an order, in order.

    Args:
        path: the file; None = keep the table in memory alone.
        columns: numbers of a line.
        measure: computes the line of a chunk, int64 [columns].
        writes: whether this process writes the file.
        together: chunks that become known between two writes of the file.

    Attributes:
        path: as given.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        columns: int,
        measure: Callable[[int], Int64],
        writes: bool = False,
        together: int = 1,
    ) -> None:
        self.path = path
        self._measure = measure
        self._writes = writes
        self._together = together
        self._columns = columns
        self._known = 0
        self._buffer = np.zeros((16, columns), np.int64)  # sums before each chunk and behind the last
        self._append(self._stored())
        self._written = len(self)

    def __len__(self) -> int:
        """Chunks that are known."""
        return self._known

    def before(self, chunk: int) -> Int64:
        """Return the sums over all chunks before ``chunk``, int64 [columns]."""
        self.extend(chunk)
        return self._sums[chunk]

    def line(self, chunk: int) -> Int64:
        """Return the numbers of one chunk."""
        self.extend(chunk + 1)
        return self._sums[chunk + 1] - self._sums[chunk]

    def find(self, number: int, *, column: int) -> tuple[int, int]:
        """Return the chunk that holds item ``number`` of a column that counts items, and the items before the chunk."""
        while self._sums[-1, column] <= number:
            self.extend(len(self) + 1)
        chunk = int(np.searchsorted(self._sums[:, column], number, side="right")) - 1
        return chunk, int(self._sums[chunk, column])

    def extend(self, chunks: int) -> None:
        """Make the first ``chunks`` lines known."""
        if len(self) >= chunks:
            return
        while len(self) < chunks:
            self._append(self._measure(len(self))[None])
        # Rarer the longer it is: a table of a thousand short epochs is not written a thousand times.
        if len(self) - self._written >= max(self._together, self._written // 8):
            self.write()

    def add(self, line: Int64) -> None:
        """Append the line of the next chunk, computed elsewhere, int64 [columns]."""
        self._append(line[None])
        self.write()

    @property
    def _sums(self) -> Int64:
        return self._buffer[: self._known + 1]

    def _append(self, lines: Int64) -> None:
        stop = self._known + len(lines)
        while stop >= len(self._buffer):
            self._buffer = np.concatenate((self._buffer, np.zeros_like(self._buffer)))
        np.cumsum(lines, axis=0, out=self._buffer[self._known + 1 : stop + 1])
        self._buffer[self._known + 1 : stop + 1] += self._buffer[self._known]
        self._known = stop

    def _stored(self) -> Int64:
        nothing = np.zeros((0, self._columns), np.int64)
        if self.path is None or not self.path.is_file():
            return nothing
        content = self.path.read_bytes()
        digest, numbers = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(numbers).digest() != digest or len(numbers) % (8 * self._columns):
            return nothing  # damaged: what it would say is computed again
        return np.frombuffer(numbers, dtype="<i8").reshape(-1, self._columns).astype(np.int64)

    def write(self) -> None:
        """Write the file, unless another run with the same order already wrote more of it.

        A file that cannot be written is told of once: the table goes on in memory.
        """
        if self.path is None or not self._writes:
            return
        try:
            self._write(self.path)
        except OSError as error:
            self._writes = False
            _LOGGER.warning("the table %s cannot be written, and a resumed run will pack again: %s", self.path, error)

    def _write(self, path: Path) -> None:
        self._written = len(self)
        if len(self._stored()) >= len(self):
            return
        numbers = np.diff(self._sums, axis=0).astype("<i8").tobytes()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        try:
            with partial.open("wb") as stream:
                stream.write(hashlib.sha256(numbers).digest() + numbers)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
