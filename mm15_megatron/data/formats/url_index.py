"""The index file URL -> bytes: its layout, and how it is built from what a download left on disk.

Layout, little-endian: header of 64 bytes (magic, number of URLs N, beginning of the names, beginning and length of the
JSON), ``high`` and ``low`` words of the keys (uint64 [N] each, sorted), values [N] (offset, size, file), paths of loose
files one after the other, JSON (tars with their sizes; what was counted). ``file`` is a place in the list of tars, or
``LOOSE``: then offset and size are those of the path among the names.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from mm15_megatron.data.formats.sorted_runs import RUN_RECORDS, RunWriter, Values, Words, words
from mm15_megatron.errors import DataError

MAGIC: Final = b"MM15URL1"
LOOSE: Final = 2**32 - 1
VALUE: Final = np.dtype([("offset", "<u8"), ("size", "<u4"), ("file", "<u4")])
_HEADER: Final = struct.Struct("<8sQQQQ24x")
_BUFFERED: Final = 2**16


@dataclass(frozen=True)
class IndexedFile:
    """A tar: path relative to the index, bytes when it was indexed."""

    path: str
    size: int


@dataclass(frozen=True)
class IndexHead:
    """What an index says of itself: number of URLs, where the names begin, the tars, and the counts of its building."""

    count: int
    names_at: int
    files: tuple[IndexedFile, ...]
    counts: dict[str, int]


def read_head(path: Path) -> IndexHead:
    """Read the header and the JSON of an index.

    Raises:
        DataError: if it is not an index, or not whole.
    """
    problem = DataError(f"{path} is not an index of URLs, or not whole", fix="build it again")
    size = path.stat().st_size
    with path.open("rb") as stream:
        raw = stream.read(_HEADER.size)
        if len(raw) < _HEADER.size:
            raise problem
        magic, count, names_at, json_at, json_size = _HEADER.unpack(raw)
        whole = names_at == _HEADER.size + count * (16 + VALUE.itemsize) <= json_at and json_at + json_size == size
        if magic != MAGIC or not whole or count < 1:
            raise problem
        stream.seek(json_at)
        try:
            about = json.loads(stream.read(json_size))
            files = tuple(IndexedFile(str(name), int(length)) for name, length in about["files"])
            return IndexHead(count, names_at, files, {str(k): int(v) for k, v in about["counts"].items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise problem from error


def columns(path: Path, *, count: int) -> tuple[Words, Words, Values]:
    """Map the three columns of an index into memory."""

    def column(dtype: npt.DTypeLike, offset: int) -> npt.NDArray[Any]:
        return np.memmap(path, dtype=dtype, mode="r", offset=_HEADER.size + offset, shape=(count,))

    return column("<u8", 0), column("<u8", 8 * count), column(VALUE, 16 * count)


class IndexWriter:
    """Collects (URL, place) and writes the index.

    Args:
        index: the file to write; it must not exist.
        work: an empty folder on the same disk.
        run_records: records held in memory while they are sorted.
    """

    def __init__(self, index: Path, *, work: Path, run_records: int = RUN_RECORDS) -> None:
        self._index = index
        self._work = work
        self._runs = RunWriter(work, values=VALUE, run_records=run_records)
        self._numbers: dict[Path, int] = {}
        self._files: list[IndexedFile] = []
        self._names = (work / "names").open("wb")
        self._keys: list[bytes] = []
        self._places: list[tuple[int, int, int]] = []
        self._limit = min(run_records, _BUFFERED)
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(self, *problem: object) -> None:
        self._names.close()

    def add_members(self, tar: Path, entries: list[tuple[bytes, int, int]]) -> None:
        """Add (key of the URL, offset, size) of images in a tar."""
        if not entries:
            return
        if tar not in self._numbers:
            self._numbers[tar] = len(self._files)
            self._files.append(IndexedFile(self._relative(tar), tar.stat().st_size))
        number = self._numbers[tar]
        self._append([key for key, _, _ in entries], [(offset, size, number) for _, offset, size in entries])

    def add_files(self, entries: list[tuple[bytes, Path]]) -> None:
        """Add (key of the URL, file)."""
        if not entries:
            return
        places = []
        for _, path in entries:
            name = os.fsencode(self._relative(path))
            places.append((self._names.tell(), len(name), LOOSE))
            self._names.write(name)
        self._append([key for key, _ in entries], places)

    def _append(self, keys: list[bytes], places: list[tuple[int, int, int]]) -> None:
        self._keys += keys
        self._places += places
        if len(self._keys) >= self._limit:
            self._flush()

    def _flush(self) -> None:
        if self._keys:
            self._runs.append(words(self._keys), np.array(self._places, dtype=VALUE))
        self._keys, self._places = [], []

    def _relative(self, path: Path) -> str:
        return os.path.relpath(path.resolve(), self._index.parent.resolve())

    def publish(self) -> dict[str, int]:
        """Sort, keep the first of every URL, publish the file, and return the counts.

        Raises:
            DataError: if there is no URL at all.
        """
        self._flush()
        self._names.close()
        if not self._runs.total:
            raise DataError(
                f"no image with a URL was found ({dict(self.counts) or 'no files'})",
                fix="name folders that hold what img2dataset wrote with its .json files, or a map",
            )
        count = self._write_columns()
        self.counts["urls"] = count
        self.counts["duplicates"] = self._runs.total - count
        self._join(count)
        return dict(self.counts)

    def _write_columns(self) -> int:
        count = 0
        with (
            (self._work / "high").open("wb") as high,
            (self._work / "low").open("wb") as low,
            (self._work / "values").open("wb") as values,
        ):
            for part in self._runs.merged():
                new_N = part.first_of_key()
                count += int(new_N.sum())
                high.write(part.high_N[new_N].astype("<u8").tobytes())
                low.write(part.low_N[new_N].astype("<u8").tobytes())
                values.write(part.values_N[new_N].astype(VALUE).tobytes())
        return count

    def _join(self, count: int) -> None:
        about = json.dumps({"files": [[f.path, f.size] for f in self._files], "counts": self.counts}).encode()
        whole = self._work / "index"
        with whole.open("wb") as stream:
            stream.write(b"\0" * _HEADER.size)
            for name in ("high", "low", "values"):
                _copy(self._work / name, stream)
            names_at = stream.tell()
            _copy(self._work / "names", stream)
            json_at = stream.tell()
            stream.write(about)
            stream.seek(0)
            stream.write(_HEADER.pack(MAGIC, count, names_at, json_at, len(about)))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(whole, self._index)


def _copy(path: Path, stream: Any) -> None:
    with path.open("rb") as source:
        shutil.copyfileobj(source, stream, 2**20)
