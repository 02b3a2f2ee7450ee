"""Images that occur too often in a dataset (spacers, avatars, banners), found by one pass over it.

MM1's appendix leaves out images whose URL or MD5 occurs more than 10 times in the dataset. Here the MD5 decides: with a
store of one file a URL, images of equal URL have equal MD5, so the rule for URLs is contained in it. Not contained: a
URL that was downloaded several times under several names with different bytes (MMC4's ``image_name``). Every occurrence
counts, also those within one document.

Legend: N images; 2 = (high, low) words of the MD5.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from functools import partial
from hashlib import md5
from pathlib import Path
from typing import Final

import numpy as np

from mm15_megatron.data.formats.base import Format, Found, Interleaved, Unit, opened_items
from mm15_megatron.data.formats.sorted_runs import RUN_RECORDS, RunWriter, Values, Words, find, ordered_map, words
from mm15_megatron.errors import DataError

MORE_THAN: Final = 10
"""MM1's number, as recollected."""

_COUNT: Final = np.dtype("<u8")


def _digest(data: bytes) -> bytes:
    return md5(data, usedforsecurity=False).digest()


@dataclass(frozen=True)
class FrequentImages:
    """The images that are too frequent, by MD5; opened at the first question, in each process.

    Args:
        path: what :func:`count_images` wrote.

    Raises:
        DataError: if there is no such file.
    """

    path: Path
    _open: list[tuple[Words, Words]] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.path.is_file():
            raise DataError(f"{self.path} does not exist", fix="count the images of the dataset first")

    def __reduce__(self) -> tuple[type[FrequentImages], tuple[Path]]:
        """Carry the path alone."""
        return (FrequentImages, (self.path,))

    def contains(self, data: bytes) -> bool:
        """Tell whether an image of exactly these bytes is too frequent.

        Raises:
            DataError: if the file is not what :func:`count_images` writes.
        """
        if not self._open:
            self._open.append(self._read())
        high_N, low_N = self._open[0]
        return find(high_N, low_N, _digest(data)) >= 0

    def _read(self) -> tuple[Words, Words]:
        try:
            table = np.load(self.path, mmap_mode="r" if self.path.stat().st_size > 2**12 else None)
        except (ValueError, OSError, EOFError) as error:
            raise DataError(f"{self.path} is not a table of images: {error}", fix="count them again") from error
        if not isinstance(table, np.ndarray) or table.ndim != 2 or len(table) != 2 or table.dtype != np.uint64:
            raise DataError(
                f"{self.path} does not hold uint64 (2, N) but {str(table)[:60]}", fix="count the images again"
            )
        return table[0], table[1]


@dataclass(frozen=True)
class ImageCountReport:
    """Images seen, different ones among them, and how many of these are too frequent."""

    images: int
    different: int
    frequent: int


def count_images(
    reader: Format, path: Path, *, more_than: int = MORE_THAN, workers: int = 1, run_records: int = RUN_RECORDS
) -> ImageCountReport:
    """Count the images of all records of ``reader`` and write those that occur more than ``more_than`` times.

    Args:
        reader: of interleaved documents, without filters of its own.
        path: the file to write: uint64 (2, N) in numpy's format, sorted.
        more_than: occurrences that are still accepted.
        workers: processes.
        run_records: images sorted in memory at a time.

    Raises:
        DataError: if ``path`` exists, the reader is of another kind, or its input is damaged.
    """
    if path.exists():
        raise DataError(f"{path} exists", fix="remove it to count again")
    if reader.kind != "interleaved":
        raise DataError(f"the reader gives {reader.kind}", fix="count the images of interleaved documents")
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        runs = RunWriter(work, values=_COUNT, run_records=run_records)
        for keys_N2, counts_N in ordered_map(partial(_count_unit, reader), reader.units(), workers=workers):
            runs.append(keys_N2, counts_N)
        images = different = 0
        tables = []
        for part in runs.merged():
            starts = np.flatnonzero(part.first_of_key())
            sums = np.add.reduceat(part.values_N, starts) if len(starts) else part.values_N
            images, different = images + int(sums.sum()), different + len(starts)
            often = starts[sums > more_than]
            tables.append(np.stack([part.high_N[often], part.low_N[often]]))
        table = np.concatenate(tables, axis=1) if tables else np.zeros((2, 0), dtype=np.uint64)
        with (work / "table").open("wb") as stream:
            np.save(stream, table)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(work / "table", path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return ImageCountReport(images, different, table.shape[1])


def _count_unit(reader: Format, unit: Unit) -> tuple[Words, Values]:
    """Return the different images of a unit, [N, 2], and how often each occurs, [N]."""
    counts: dict[bytes, int] = {}
    for found in opened_items(reader.read(unit)):
        if isinstance(found, Found) and isinstance(found.record, Interleaved):
            for part in found.record.parts:
                if isinstance(part, bytes):
                    key = _digest(part)
                    counts[key] = counts.get(key, 0) + 1
    return words(list(counts)), np.fromiter(counts.values(), dtype=_COUNT, count=len(counts))
