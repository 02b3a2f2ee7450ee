"""The order of one source: its samples and rows, found by number.

An epoch visits the documents in a keyed order (:mod:`.epoch_order`); the order is cut into fixed chunks, and the
documents of each chunk become pieces (:mod:`.pieces`), the samples. A chunk's samples are packed by themselves, and a
small table says what each chunk holds (:mod:`.row_table`), so that any row or sample is found by a search and one
packed chunk.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from mm15_megatron.data.epoch_order import CHUNK_DOCUMENTS, EpochOrder, Shuffle
from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.data.ledger import Seen
from mm15_megatron.data.packing import MAX_SAMPLES_PER_ROW, PACKING_VERSION, PackingRules, Sizes, pack
from mm15_megatron.data.permutation import permute
from mm15_megatron.data.pieces import COUNTED, REASONS, Cut, Pieces, cut_documents
from mm15_megatron.data.row_table import ChunkTable
from mm15_megatron.data.samples import SampleRef
from mm15_megatron.errors import DataError

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]

CHUNK_SAMPLES: Final = 1 << 13  # of a mixed stream
_CHUNKS_KEPT: Final = 2
_SAMPLES: Final = COUNTED.index("samples")

T = TypeVar("T")


@dataclass(frozen=True)
class OrderOptions:
    """How samples are ordered.

    Attributes:
        seed: the run's seed.
        unit: row | sample | token, what the mixture chooses a source for (a token mixture chooses rows, with weights
            that :mod:`.blend` derived).
        batch_unit: rows | samples, what a step counts.
        shuffle: how epochs are shuffled.
        chunk_documents: documents that are packed together at most.
        chunk_samples: samples of a mixed stream that are packed together.
        tables: folder of the tables; None = in memory alone.
        writes: whether this process writes the tables.
    """

    seed: int
    unit: str = "row"
    batch_unit: str = "rows"
    shuffle: Shuffle = Shuffle()
    chunk_documents: int = CHUNK_DOCUMENTS
    chunk_samples: int = CHUNK_SAMPLES
    tables: Path | None = None
    writes: bool = False

    @property
    def mixes_samples(self) -> bool:
        """Whether a row holds samples of all sources."""
        return self.unit == "sample"

    def decides(self, rules: PackingRules) -> dict[str, object]:
        """Return what decides the content of rows, as JSON: no rank, worker or batch size."""
        return {
            "packing": PACKING_VERSION,
            "chunks": [self.chunk_documents, self.chunk_samples, MAX_SAMPLES_PER_ROW],
            "rules": {name: value for name, value in asdict(rules).items() if name != "normalisation"},
            "seed": self.seed,
            "unit": "sample" if self.mixes_samples else "row",
            "batch_unit": self.batch_unit,
            "shuffle": asdict(self.shuffle) if self.shuffle.mode == "blocks" else self.shuffle.mode,
        }


@dataclass(frozen=True)
class PackingReport:
    """What became of the documents of one source in the chunks begun so far (in a later epoch they count again).

    Attributes:
        source: name of the source.
        size: documents of the source.
        counts: a number for each name in :data:`~mm15_megatron.data.pieces.COUNTED`.
    """

    source: str
    size: int
    counts: dict[str, int]

    @property
    def epochs(self) -> int:
        """Epochs of the source that packing has begun."""
        return -(-self.counts["documents"] // self.size)

    @property
    def dropped(self) -> dict[str, int]:
        """Documents left out, by reason."""
        return {reason: self.counts[reason] for reason in REASONS if self.counts[reason]}

    @property
    def loses(self) -> bool:
        """Whether anything was left out or cut off."""
        lost = ("truncated", "untrained_pieces", *REASONS)
        return any(self.counts[name] for name in lost)

    def __str__(self) -> str:
        """Say it in one line."""
        c = self.counts
        return (
            f"source {self.source}: of {c['documents']} documents {c['kept']} kept as {c['samples']} samples, "
            f"{c['truncated']} truncated ({c['truncated_tokens']} tokens), dropped: {self.dropped}"
            + (f", {c['untrained_images']} images in a row without text left out" if c["untrained_pieces"] else "")
        )


class Recent(Generic[T]):
    """The last few results of a function of a chunk's number."""

    def __init__(self, make: Callable[[int], T]) -> None:
        self._make = make
        self._kept: OrderedDict[int, T] = OrderedDict()

    def __call__(self, chunk: int) -> T:
        """Return the result for a chunk."""
        if chunk not in self._kept:
            self._kept[chunk] = self._make(chunk)
            while len(self._kept) > _CHUNKS_KEPT:
                self._kept.popitem(last=False)
        return self._kept[chunk]


@dataclass(frozen=True)
class PackedRows:
    """Packed samples: row i holds samples ``starts[i]`` to ``starts[i + 1]`` and ``tiles[i]`` tiles."""

    sources: Int32
    documents: Int64
    first: Int32
    stop: Int32
    starts: Int64
    tiles: Int64

    def __len__(self) -> int:
        """Rows."""
        return len(self.starts) - 1

    def samples(self, row: int) -> tuple[SampleRef, ...]:
        """Return the samples of a row, in order."""
        at = slice(int(self.starts[row]), int(self.starts[row + 1]))
        columns = (self.sources, self.documents, self.first, self.stop)
        return tuple(SampleRef(*values) for values in zip(*(c[at].tolist() for c in columns), strict=True))


def pack_samples(sources: Int64, pieces: Pieces, rules: PackingRules, *, key: int | None) -> PackedRows:
    """Pack samples; rows stand in a keyed order, without a key in the order of their first samples."""
    row = pack(pieces.sizes, rules)
    _, first_of_row = np.unique(row, return_index=True)
    count = len(first_of_row)
    place = np.empty(count, np.int64)
    place[np.argsort(first_of_row)] = np.arange(count)
    if key is not None and count:
        place = permute(place, count, key=key)
    row = place[row]
    order = np.argsort(row, kind="stable")
    starts = np.searchsorted(row[order], np.arange(count + 1))
    tiles = np.concatenate(([0], np.cumsum(pieces.sizes.tiles[order])))[starts]
    return PackedRows(
        sources[order].astype(np.int32),
        pieces.documents[order],
        pieces.first[order].astype(np.int32),
        pieces.stop[order].astype(np.int32),
        starts,
        np.diff(tiles),
    )


class SourceStream:
    """The samples of one source, endless, in chunks.

    Args:
        reader: the source.
        index: its index in the mixture.
        rules: how documents become samples.
        options: how they are ordered.

    Attributes:
        epoch: the order of the documents.
        columns: names of the numbers of a line of the table: :data:`~mm15_megatron.data.pieces.COUNTED`, and rows.
    """

    columns: Final = (*COUNTED, "rows")

    def __init__(self, reader: IndexedSource, index: int, rules: PackingRules, options: OrderOptions) -> None:
        if reader.num_documents == 0:
            raise DataError(f"source {reader.name!r} holds no document", fix="build it again, or leave it out")
        self._reader = reader
        self._index = index
        self._rules = rules
        self._options = options
        self._whole: Cut | None = None
        self.epoch = EpochOrder(
            reader.num_documents,
            seed=options.seed,
            source=reader.manifest.digest,
            shuffle=options.shuffle,
            chunk=options.chunk_documents,
        )

    @property
    def digest(self) -> str:
        """SHA-256 of everything that decides the samples of this source, and its rows."""
        source = {"source": self._reader.manifest.digest, "columns": self.columns}
        return digest_of(self._options.decides(self._rules) | source)

    def samples(self, chunk: int) -> tuple[Pieces, Int64]:
        """Return the samples of a chunk in their order, and the account of its documents."""
        if self.epoch.chunks == 1:  # every epoch holds the same samples: only their order differs
            cut = self._whole = self._whole or cut_documents(self._reader, np.arange(self.epoch.size), self._rules)
        else:
            cut = cut_documents(self._reader, self.epoch.chunk(chunk), self._rules)
        if not self.epoch.shuffles:
            return cut.pieces, cut.counted
        count = len(cut.pieces.documents)  # the pieces of a long document part
        return cut.pieces.of(permute(np.arange(count), count, key=self.epoch.key(chunk, "samples"))), cut.counted

    def rows(self, chunk: int) -> tuple[PackedRows, Int64]:
        """Return the rows of a chunk, and the account of its documents."""
        pieces, counted = self.samples(chunk)
        key = self.epoch.key(chunk, "rows") if self.epoch.shuffles else None
        return pack_samples(
            np.full(len(pieces.documents), self._index, np.int64), pieces, self._rules, key=key
        ), counted

    def line(self, chunk: int) -> Int64:
        """Return a chunk's line of the table, int64 [columns]; rows are 0 where rows are of mixed sources."""
        if self._options.mixes_samples:
            return np.append(self.samples(chunk)[1], 0)
        rows, counted = self.rows(chunk)
        return np.append(counted, len(rows))


class OrderedSource:
    """One source of the mixture with its table; finds samples and rows by number.

    Attributes:
        name: name of the source.
        kind: captions | interleaved | text | conversations.
        size: its documents.
        content: digest of its files.
        chunks: chunks of an epoch.
        stream: its samples.
    """

    def __init__(self, reader: IndexedSource, index: int, rules: PackingRules, options: OrderOptions) -> None:
        self.name = reader.name
        self.kind = reader.kind
        self.size = reader.num_documents
        self.content = reader.manifest.digest
        self.stream = SourceStream(reader, index, rules, options)
        self.chunks = self.stream.epoch.chunks
        path = None if options.tables is None else options.tables / f"{reader.name}-{self.stream.digest[:16]}.rows"
        self.table = ChunkTable(path, columns=len(SourceStream.columns), measure=self._line, writes=options.writes)
        self._samples = Recent(self.stream.samples)
        self._rows = Recent(self.stream.rows)
        self._by_sample = options.mixes_samples
        self._begun = 0
        if len(self.table) >= self.chunks:
            self.check_usable()

    @property
    def report(self) -> PackingReport:
        """What became of the documents of the chunks begun so far."""
        return self.counts(self.table.before(self._begun))

    def counts(self, line: Int64) -> PackingReport:
        """Give the numbers of a sum of lines their names."""
        return PackingReport(self.name, self.size, dict(zip(COUNTED, line.tolist(), strict=False)))

    def seen(self, units: int) -> Seen:
        """Return how far the first ``units`` rows (or samples, where they are mixed) come."""
        if not units:
            return Seen(0.0, {}, 0)
        column = _SAMPLES if self._by_sample else len(COUNTED)
        chunk, before = self.table.find(units - 1, column=column)
        line, begun = self.table.line(chunk), self.counts(self.table.before(chunk + 1))
        share = (units - before) / int(line[column])
        documents = begun.counts["documents"] - (1 - share) * int(line[COUNTED.index("documents")])
        return Seen(documents / self.size, begun.dropped, begun.counts["truncated_tokens"])

    def rows(self, first: int, stop: int) -> tuple[list[tuple[SampleRef, ...]], Int64]:
        """Return the samples and the tiles of the rows [first, stop)."""
        tasks: list[tuple[SampleRef, ...]] = []
        tiles = np.zeros(stop - first, np.int64)
        while len(tasks) < stop - first:
            at = first + len(tasks)
            chunk, before = self.table.find(at, column=len(COUNTED))
            rows, counted = self._rows(chunk)
            self._check_line(chunk, np.append(counted, len(rows)))
            self._begun = max(self._begun, chunk + 1)
            here = range(at - before, min(stop - before, len(rows)))
            tiles[len(tasks) : len(tasks) + len(here)] = rows.tiles[here.start : here.stop]
            tasks += [rows.samples(row) for row in here]
        return tasks, tiles

    def samples(self, first: int, stop: int) -> Pieces:
        """Return the samples [first, stop)."""
        none = np.zeros(0, np.int64)
        parts = [Pieces(none, none, none, Sizes(none, none, none))]
        while first < stop:
            chunk, before = self.table.find(first, column=_SAMPLES)
            pieces, counted = self._samples(chunk)
            self._check_line(chunk, np.append(counted, 0))
            self._begun = max(self._begun, chunk + 1)
            end = min(stop - before, len(pieces.documents))
            parts.append(pieces.of(np.arange(first - before, end)))
            first = before + end
        return Pieces.joined(parts)

    def _line(self, chunk: int) -> Int64:
        if self._by_sample:
            line = np.append(self._samples(chunk)[1], 0)
        else:
            rows, counted = self._rows(chunk)
            line = np.append(counted, len(rows))
        if chunk + 1 == self.chunks:
            self._check_usable(self.table.before(chunk) + line)
        return line

    def _check_line(self, chunk: int, found: Int64) -> None:
        if not np.array_equal(self.table.line(chunk), found):
            raise DataError(
                f"chunk {chunk} of source {self.name!r} packs into {found[-1]} rows and {found[_SAMPLES]} samples, its "
                f"table says {self.table.line(chunk)[-1]} and {self.table.line(chunk)[_SAMPLES]}",
                fix=f"another program wrote {self.table.path}: remove it, or set data.plan_dir to a folder of your own",
            )

    def check_usable(self) -> None:
        """Check that an epoch holds something to train on.

        Raises:
            DataError: if no document fits a row.
        """
        self._check_usable(self.table.before(self.chunks))

    def _check_usable(self, epoch: Int64) -> None:
        found = self.counts(epoch)
        if found.counts["kept"] == 0:
            raise DataError(
                f"no document of source {self.name!r} fits a row: {found.dropped}",
                fix="raise data.seq_length, data.max_images or data.max_tiles, or leave the source out",
            )


def digest_of(decides: dict[str, object]) -> str:
    """Return the SHA-256 of JSON."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
