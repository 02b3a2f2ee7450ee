"""Row r of training, as a pure function of (seed, mixture, r): which documents of which sources it holds.

An epoch of a source visits its documents in a keyed order; the order is cut into fixed chunks, and each chunk is
packed by itself, so any row is found by a search over chunks and one packed table.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.mixture import Mixture
from mm15_megatron.data.packing import (
    MAX_SAMPLES_PER_ROW,
    PACKING_VERSION,
    Measured,
    PackingRules,
    pack_rows,
    select,
)
from mm15_megatron.data.permutation import derive_key, permute
from mm15_megatron.errors import DataError

Int64 = npt.NDArray[np.int64]

CHUNK_DOCUMENTS: Final = 1 << 20  # of one source's epoch
CHUNK_SAMPLES: Final = 1 << 13  # of a mixed stream
_TABLES_KEPT: Final = 4


@dataclass(frozen=True)
class RowTask:
    """The content of one row: its global index and its (source index, document) pairs in order."""

    row: int
    samples: tuple[tuple[int, int], ...]


@dataclass
class PackingReport:
    """What packing did with the documents of one source so far (documents seen again in a later epoch count again).

    Attributes:
        source: name of the source.
        size: documents of the source.
        documents: documents looked at.
        kept: documents that went into rows.
        truncated: documents whose text was cut at the end.
        truncated_tokens: tokens cut.
        dropped: documents left out, by reason.
    """

    source: str
    size: int
    documents: int = 0
    kept: int = 0
    truncated: int = 0
    truncated_tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def epochs(self) -> int:
        """Epochs of the source that packing has begun."""
        return -(-self.documents // self.size)

    def __str__(self) -> str:
        """Say it in one line."""
        return (
            f"source {self.source}: of {self.documents} documents {self.kept} kept, {self.truncated} truncated "
            f"({self.truncated_tokens} tokens), dropped: {dict(self.dropped)}"
        )


class EpochOrder:
    """The endless order of one source: position p is document ``p % n`` of epoch ``p // n``, shuffled by a key.

    Inside an epoch no document repeats.
    """

    def __init__(self, documents: int, *, seed: int, source: int, shuffle: bool) -> None:
        self.size = documents
        self._seed = seed
        self._source = source
        self._shuffle = shuffle

    def documents(self, first: int, stop: int) -> Int64:
        """Return the documents at positions [first, stop), int64."""
        parts = []
        for epoch in range(first // self.size, -(-stop // self.size)):
            at = epoch * self.size
            positions = np.arange(max(first, at) - at, min(stop, at + self.size) - at, dtype=np.int64)
            key = derive_key(self._seed, "epoch", self._source, epoch)
            parts.append(permute(positions, self.size, key=key) if self._shuffle else positions)
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


class Stream(Protocol):
    """An endless sequence of chunks of samples."""

    def chunk(self, index: int) -> tuple[Int64, Int64]:
        """Return (source index, document) of each sample of a chunk, two int64 arrays of one length."""
        ...


class SourceStream:
    """One source's epochs, each cut into chunks of at most ``CHUNK_DOCUMENTS``."""

    def __init__(self, order: EpochOrder, *, source: int) -> None:
        self._order = order
        self._source = source
        self._chunks = -(-order.size // CHUNK_DOCUMENTS)

    def chunk(self, index: int) -> tuple[Int64, Int64]:
        """Return one chunk; chunks never cross an epoch."""
        epoch, part = divmod(index, self._chunks)
        first = epoch * self._order.size + part * CHUNK_DOCUMENTS
        stop = min(first + CHUNK_DOCUMENTS, (epoch + 1) * self._order.size)
        documents = self._order.documents(first, stop)
        return np.full(len(documents), self._source, np.int64), documents


class MixedStream:
    """Samples of all sources, mixed by weight, in chunks of ``CHUNK_SAMPLES``."""

    def __init__(self, orders: Sequence[EpochOrder], mixture: Mixture) -> None:
        self._orders = orders
        self._mixture = mixture

    def chunk(self, index: int) -> tuple[Int64, Int64]:
        """Return one chunk."""
        first = index * CHUNK_SAMPLES
        sources = self._mixture.choose(first, first + CHUNK_SAMPLES)
        seen = self._mixture.count_before(first)
        documents = np.zeros(len(sources), np.int64)
        for source, order in enumerate(self._orders):
            mine = sources == source
            at = int(seen[source])
            documents[mine] = order.documents(at, at + int(np.count_nonzero(mine)))
        return sources, documents


@dataclass(frozen=True)
class _Table:
    """One packed chunk: row i holds samples ``starts[i]`` to ``starts[i + 1]`` and ``tiles[i]`` tiles."""

    sources: Int64
    documents: Int64
    starts: Int64
    tiles: Int64


class PackedStream:
    """The rows of a stream, found by number; tables are made when they are needed, and a few are kept."""

    def __init__(
        self, stream: Stream, readers: Sequence[IndexedSource], rules: PackingRules, reports: Sequence[PackingReport]
    ) -> None:
        self._stream = stream
        self._readers = readers
        self._rules = rules
        self._reports = reports
        self._ends: list[int] = []  # rows up to and including each chunk
        self._tables: OrderedDict[int, _Table] = OrderedDict()

    def row(self, number: int) -> tuple[tuple[int, int], ...]:
        """Return the (source index, document) pairs of row ``number``."""
        table, within = self._find(number)
        picked = slice(int(table.starts[within]), int(table.starts[within + 1]))
        return tuple(zip(table.sources[picked].tolist(), table.documents[picked].tolist(), strict=True))

    def tiles(self, first: int, stop: int) -> Int64:
        """Return the tiles of each of the rows [first, stop), int64; neither tokens nor images are read."""
        parts = [np.zeros(0, np.int64)]
        while first < stop:
            table, within = self._find(first)
            parts.append(table.tiles[within : within + stop - first])
            first += len(parts[-1])
        return np.concatenate(parts)

    def _find(self, number: int) -> tuple[_Table, int]:
        """Return the table that holds row ``number``, and the row's place in it."""
        while not self._ends or self._ends[-1] <= number:
            chunk = len(self._ends)
            table = self._remember(chunk, self._pack(chunk, count=True))
            self._ends.append((self._ends[-1] if self._ends else 0) + len(table.starts) - 1)
        chunk = int(np.searchsorted(self._ends, number, side="right"))
        table = self._tables.get(chunk) or self._remember(chunk, self._pack(chunk, count=False))
        return table, number - (self._ends[chunk - 1] if chunk else 0)

    def _remember(self, chunk: int, table: _Table) -> _Table:
        self._tables[chunk] = table
        while len(self._tables) > _TABLES_KEPT:
            self._tables.popitem(last=False)
        return table

    def _pack(self, chunk: int, *, count: bool) -> _Table:
        sources, documents = self._stream.chunk(chunk)
        sizes = np.zeros((3, len(sources)), np.int64)
        fits = np.zeros(len(sources), np.bool_)
        for source in np.unique(sources).tolist():
            mine = np.flatnonzero(sources == source)
            selected = select(self._readers[source], documents[mine], self._rules)
            kept = mine[selected.kept]
            fits[kept] = True
            found = selected.measured
            sizes[:, kept] = found.lengths, found.images, found.tiles
            if count:
                report = self._reports[source]
                report.documents += len(mine)
                report.kept += len(kept)
                report.truncated += selected.truncated
                report.truncated_tokens += selected.truncated_tokens
                report.dropped.update(selected.dropped)
                self._check_usable(source)
        measured = Measured(*sizes[:, fits])
        starts = pack_rows(measured, self._rules)
        before = np.concatenate(([0], np.cumsum(measured.tiles)))[starts]
        return _Table(sources[fits], documents[fits], starts, np.diff(before))

    def _check_usable(self, source: int) -> None:
        report = self._reports[source]
        if report.kept == 0 and report.documents >= report.size:
            raise DataError(
                f"no document of source {report.source!r} fits a row: {dict(report.dropped)}",
                fix="raise data.seq_length, data.max_images or data.max_tiles, or leave the source out",
            )


class RowOrder:
    """Row r -> its samples, whatever the number of ranks and workers.

    Args:
        readers: the sources of the mixture.
        weights: one weight a source.
        rules: how documents become rows.
        seed: the run's seed.
        unit: ``row`` = a row holds samples of one source, ``sample`` = of all.
        shuffle: visit each epoch's documents in a keyed order.

    Attributes:
        reports: one :class:`PackingReport` a source.
        digest: SHA-256 of everything that decides row r (:func:`order_digest`).

    Raises:
        DataError: if a source is empty, or none of its documents fits a row.
    """

    def __init__(
        self,
        readers: Sequence[IndexedSource],
        weights: Sequence[float],
        rules: PackingRules,
        *,
        seed: int,
        unit: str,
        shuffle: bool,
    ) -> None:
        for reader in readers:
            if reader.num_documents == 0:
                raise DataError(f"source {reader.name!r} holds no document", fix="build it again, or leave it out")
        self.reports = tuple(PackingReport(reader.name, reader.num_documents) for reader in readers)
        self._mixture = Mixture(weights, seed=seed)
        contents = [reader.manifest.digest for reader in readers]
        shares = self._mixture.shares.tolist()
        self.digest = order_digest(rules, contents, shares, seed=seed, unit=unit, shuffle=shuffle)
        orders = [
            EpochOrder(reader.num_documents, seed=seed, source=index, shuffle=shuffle)
            for index, reader in enumerate(readers)
        ]
        self._by_row = unit == "row"
        streams: list[Stream] = (
            [SourceStream(order, source=index) for index, order in enumerate(orders)]
            if self._by_row
            else [MixedStream(orders, self._mixture)]
        )
        self._packed = [PackedStream(stream, readers, rules, self.reports) for stream in streams]

    def row(self, index: int) -> RowTask:
        """Return the content of row ``index``."""
        if not self._by_row:
            return RowTask(index, self._packed[0].row(index))
        source = int(self._mixture.choose(index, index + 1)[0])
        number = int(self._mixture.count_before(index)[source])
        return RowTask(index, self._packed[source].row(number))

    def tiles(self, first: int, stop: int) -> Int64:
        """Return the tiles of each of the rows [first, stop), int64; neither tokens nor images are read."""
        if not self._by_row:
            return self._packed[0].tiles(first, stop)
        sources, seen = self._mixture.choose(first, stop), self._mixture.count_before(first)
        found = np.zeros(len(sources), np.int64)
        for source, packed in enumerate(self._packed):
            mine, at = sources == source, int(seen[source])
            found[mine] = packed.tiles(at, at + int(np.count_nonzero(mine)))
        return found

    def rows_before_repeat(self, limit: int) -> int:
        """Return how many rows from row 0 on show no document twice, at most ``limit`` (work grows with it)."""
        seen: set[tuple[int, int]] = set()
        for index in range(limit):
            samples = self.row(index).samples
            if not seen.isdisjoint(samples):
                return index
            seen.update(samples)
        return limit


def order_digest(
    rules: PackingRules,
    contents: Sequence[str],
    shares: Sequence[float],
    *,
    seed: int,
    unit: str,
    shuffle: bool,
) -> str:
    """Digest everything that decides row r: content, not names or paths; no rank, worker or batch size.

    Args:
        rules: how documents become rows.
        contents: digest of each source's manifest, in the order of the mixture.
        shares: share of each source; they sum to 1.
        seed: see :class:`RowOrder`.
        unit: see :class:`RowOrder`.
        shuffle: see :class:`RowOrder`.
    """
    decides = {
        "packing": PACKING_VERSION,
        "chunks": [CHUNK_DOCUMENTS, CHUNK_SAMPLES, MAX_SAMPLES_PER_ROW],
        "rules": {name: value for name, value in asdict(rules).items() if name != "normalisation"},
        "seed": seed,
        "unit": unit,
        "shuffle": shuffle,
        "sources": list(zip(contents, shares, strict=True)),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
