"""Row r of training, as a pure function of (seed, mixture, r): which samples of which sources it holds.

Each source has an order of its own (:mod:`.source_order`). Their samples become rows in one of three ways:

- rows of one source: each chunk is packed by itself, and the mixture chooses a source for each row;
- rows of mixed sources: the mixture chooses a source for each sample; ``CHUNK_SAMPLES`` of them are packed together;
- batches of samples: the mixture chooses a source for each sample, and the samples of a step are packed together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from mm15_megatron.data.ledger import Seen
from mm15_megatron.data.mixture import Mixture
from mm15_megatron.data.packing import PackingRules, Sizes
from mm15_megatron.data.permutation import derive_key
from mm15_megatron.data.pieces import Pieces
from mm15_megatron.data.row_table import ChunkTable
from mm15_megatron.data.samples import SampleRef
from mm15_megatron.data.source_order import (
    OrderedSource,
    OrderOptions,
    PackedRows,
    PackingReport,
    Recent,
    digest_of,
    pack_samples,
)

Int64 = npt.NDArray[np.int64]

_CHUNKS_WRITTEN_TOGETHER: Final = 64


@dataclass(frozen=True)
class RowTask:
    """The content of one row: its number and its samples in order; a row without samples fills up a step."""

    row: int
    samples: tuple[SampleRef, ...]


@dataclass(frozen=True)
class RowRange:
    """Some rows: their content, and the tiles of each, int64 [R]; neither tokens nor images were read."""

    tasks: tuple[RowTask, ...]
    tiles_R: Int64


class RowOrder:
    """What a step consists of, whatever the number of ranks and workers.

    Args:
        sources: the sources of the mixture.
        mixture: chooses a source for each row or sample.
        rules: how samples share rows.
        options: how they are ordered.

    Attributes:
        sources: as given.
        mixture: as given.
        digest: SHA-256 of everything that decides which samples come when.

    Raises:
        DataError: if none of a source's documents fits a row.
    """

    def __init__(
        self, sources: Sequence[OrderedSource], mixture: Mixture, rules: PackingRules, options: OrderOptions
    ) -> None:
        self.sources = tuple(sources)
        self.mixture = mixture
        self._rules = rules
        self._options = options
        shares = [[first, values.tolist()] for first, values in mixture.shares]
        contents = [source.content for source in sources]
        self.digest = digest_of(options.decides(rules) | {"sources": contents, "shares": shares})
        path = None if options.tables is None else options.tables / f"mixture-{self.digest[:16]}.rows"
        self._mixed_table = ChunkTable(
            path,
            columns=1,
            measure=lambda chunk: np.array([len(self._mixed(chunk))]),
            writes=options.writes and options.mixes_samples and options.batch_unit == "rows",
            together=_CHUNKS_WRITTEN_TOGETHER,
        )
        self._mixed = Recent(self._mixed_chunk)

    @property
    def reports(self) -> tuple[PackingReport, ...]:
        """What became of the documents of the chunks begun so far, one report a source."""
        return tuple(source.report for source in self.sources)

    def step(self, first: int, units: int) -> RowRange:
        """Return the rows of the step that takes units [first, first + units): rows, or samples, packed here."""
        if self._options.batch_unit == "rows":
            return self.rows(first, first + units)
        sources, pieces = self._chosen_samples(first, first + units)
        rows = pack_samples(sources, pieces, self._rules, key=self._key("step", first))
        return RowRange(tuple(RowTask(first + i, rows.samples(i)) for i in range(len(rows))), rows.tiles)

    def row(self, index: int) -> RowTask:
        """Return the content of row ``index``."""
        return self.rows(index, index + 1).tasks[0]

    def rows(self, first: int, stop: int) -> RowRange:
        """Return the rows [first, stop)."""
        if self._options.mixes_samples:
            return self._mixed_rows(first, stop)
        chosen, seen = self.mixture.choose(first, stop), self.mixture.count_before(first)
        tasks: list[RowTask | None] = [None] * len(chosen)
        tiles = np.zeros(len(chosen), np.int64)
        for index, source in enumerate(self.sources):
            mine, at = np.flatnonzero(chosen == index), int(seen[index])
            samples, tiles[mine] = source.rows(at, at + len(mine))
            for place, held in zip(mine.tolist(), samples, strict=True):
                tasks[place] = RowTask(first + place, held)
        return RowRange(tuple(task for task in tasks if task is not None), tiles)

    def seen(self, consumed: int) -> tuple[Seen, ...]:
        """Return how far a run that consumed so many units has come in each source."""
        samples = consumed
        if self._options.mixes_samples and self._options.batch_unit == "rows" and consumed:
            # the samples of the rows consumed, as if a mixed chunk's rows were alike
            chunk, before = self._mixed_table.find(consumed - 1, column=0)
            rows = int(self._mixed_table.line(chunk)[0])
            samples = chunk * self._options.chunk_samples
            samples += (consumed - before) * self._options.chunk_samples // rows
        counts = self.mixture.count_before(samples).tolist()
        return tuple(source.seen(count) for source, count in zip(self.sources, counts, strict=True))

    def mixed_sizes(self) -> tuple[int, Sizes]:
        """Return the rows that the first samples of the mixture become, ``chunk_samples`` of them, and their sizes."""
        pieces = self._chosen_samples(0, self._options.chunk_samples)[1]
        return len(self._mixed(0)), pieces.sizes

    def rows_before_repeat(self, limit: int) -> int:
        """Return how many rows from row 0 on show no document twice, at most ``limit`` (work grows with it).

        Pieces of one document are no repetition.
        """
        seen: set[SampleRef] = set()
        for index in range(limit):
            samples = self.row(index).samples
            if not seen.isdisjoint(samples):
                return index
            seen.update(samples)
        return limit

    def _chosen_samples(self, first: int, stop: int) -> tuple[Int64, Pieces]:
        chosen, seen = self.mixture.choose(first, stop), self.mixture.count_before(first)
        parts, places = [], []
        for index, source in enumerate(self.sources):
            mine, at = np.flatnonzero(chosen == index), int(seen[index])
            parts.append(source.samples(at, at + len(mine)))
            places.append(mine)
        return chosen, Pieces.joined(parts).of(np.argsort(np.concatenate(places)))

    def _mixed_chunk(self, chunk: int) -> PackedRows:
        first = chunk * self._options.chunk_samples
        sources, pieces = self._chosen_samples(first, first + self._options.chunk_samples)
        return pack_samples(sources, pieces, self._rules, key=self._key("mixed rows", chunk))

    def _key(self, what: str, number: int) -> int | None:
        shuffles = self._options.shuffle.mode != "none"
        return derive_key(self._options.seed, what, number) if shuffles else None

    def _mixed_rows(self, first: int, stop: int) -> RowRange:
        tasks: list[RowTask] = []
        tiles = [np.zeros(0, np.int64)]
        while len(tasks) < stop - first:
            at = first + len(tasks)
            chunk, before = self._mixed_table.find(at, column=0)
            rows = self._mixed(chunk)
            here = range(at - before, min(stop - before, len(rows)))
            tasks += [RowTask(before + row, rows.samples(row)) for row in here]
            tiles.append(rows.tiles[here.start : here.stop])
        return RowRange(tuple(tasks), np.concatenate(tiles))
