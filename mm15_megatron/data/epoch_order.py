"""The order of a source's documents: an endless sequence of epochs, each shuffled by a key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from mm15_megatron.data.permutation import derive_key, permute

Int64 = npt.NDArray[np.int64]

CHUNK_DOCUMENTS: Final = 1 << 20  # of one source's epoch that are packed together


@dataclass(frozen=True)
class Shuffle:
    """How an epoch's documents are shuffled.

    ``full`` reads documents from all over the files. ``blocks`` reads whole blocks of neighbours: blocks come in a
    keyed order, and documents are shuffled inside windows of a few blocks, so that a window's bytes are read once and
    from few places. ``none`` keeps the stored order.

    Attributes:
        mode: full | blocks | none.
        block: documents of a block.
        window: blocks of a window.
    """

    mode: str = "full"
    block: int = 1024
    window: int = 64


class EpochOrder:
    """Position p is document ``p % size`` of epoch ``p // size``, shuffled; inside an epoch no document repeats.

    Args:
        documents: documents of the source.
        seed: the run's seed.
        source: what tells this source's keys from another's: the digest of its content.
        shuffle: how epochs are shuffled.
        chunk: documents that are packed together at most; with ``blocks`` a chunk is a window.

    Attributes:
        size: documents of an epoch.
        chunks: chunks of an epoch.
    """

    def __init__(
        self, documents: int, *, seed: int, source: str, shuffle: Shuffle, chunk: int = CHUNK_DOCUMENTS
    ) -> None:
        self.size = documents
        self._seed = seed
        self._source = source
        self._shuffle = shuffle
        self._chunk = shuffle.block * shuffle.window if shuffle.mode == "blocks" else chunk
        self.chunks = -(-documents // self._chunk)

    @property
    def shuffles(self) -> bool:
        """Whether the stored order is left."""
        return self._shuffle.mode != "none"

    def key(self, chunk: int, what: str) -> int:
        """Return a key that belongs to one chunk of this source."""
        return derive_key(self._seed, what, self._source, chunk)

    def chunk(self, index: int) -> Int64:
        """Return the documents of chunk ``index``, int64; chunks count through all epochs and never cross one."""
        epoch, part = divmod(index, self.chunks)
        first = part * self._chunk
        positions = np.arange(first, min(first + self._chunk, self.size), dtype=np.int64)
        key = derive_key(self._seed, "epoch", self._source, epoch)
        if self._shuffle.mode == "none":
            return positions
        if self._shuffle.mode == "full":
            return permute(positions, self.size, key=key)
        return self._window(positions, part, key=key)

    def _window(self, positions: Int64, window: int, *, key: int) -> Int64:
        """Blocks in keyed order, the documents of a window shuffled; the short block at the end comes last."""
        block, whole = self._shuffle.block, self.size // self._shuffle.block
        mixed = permute(positions - positions[0], len(positions), key=derive_key(key, "window", window)) + positions[0]
        number, within = mixed // block, mixed % block
        full = number < whole
        number[full] = permute(number[full], whole, key=key) if whole else number[full]
        return number * block + within
