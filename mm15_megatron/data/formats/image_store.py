"""Where the bytes of an image come from when a document holds only its URL or its name.

OBELICS and MMC4 publish URLs; their users download the images themselves, most with img2dataset. What is read here
(img2dataset's README, ``writer.py`` and ``downloader.py`` at github.com/rom1504/img2dataset):

- ``output_format=webdataset``: ``00000.tar`` with ``000000000.jpg``, ``.json`` and, with captions, ``.txt`` a sample;
  the JSON holds ``url``, ``key``, ``status``, sizes. Failed downloads are only in the parquet file beside it.
- ``output_format=files``: the same files in a folder ``00000``.
- any other layout, by a map: JSON lines or parquet with the URL and the file, or the tar and its member.

``url_sources.build_url_index`` writes one index file, sorted by a 16-byte hash of the URL; :class:`UrlStore` looks URLs
up in it and reads the bytes where they lie. The index names the files relative to itself, so both may move together.
img2dataset's default ``resize_mode=border`` pads images to squares: download with ``keep_ratio`` or ``no``, for filters
that look at sizes and for training. ``output_format=parquet`` and ``tfrecord`` cannot be indexed, and are refused. Not
confirmed: that every release of img2dataset names the field ``url`` whatever ``--url_col`` says (the code read does).
"""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Final, Protocol

from mm15_megatron.data.formats.fields import path_inside
from mm15_megatron.data.formats.sorted_runs import find, key_of
from mm15_megatron.data.formats.url_index import LOOSE, IndexHead, columns, read_head
from mm15_megatron.errors import DataError

_OPEN_FILES: Final = 64


class ImageSource(Protocol):
    """Bytes of an image by its URL or name."""

    def get(self, key: str) -> bytes | None:
        """Return the encoded bytes, or None if there are none for ``key``."""
        ...


@dataclass(frozen=True)
class ImageFolder:
    """Images by their path below a folder, which no name may leave by ``..``; links that lie in it are followed.

    Args:
        root: the folder.

    Raises:
        DataError: if it is not a folder.
    """

    root: Path

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            raise DataError(f"{self.root} is not a folder", fix="name the folder of images")

    def get(self, key: str) -> bytes | None:
        """Return the bytes of the file ``key``, or None if there is none.

        Raises:
            DataError: if ``key`` leaves the folder.
        """
        path = path_inside(self.root, key)
        return path.read_bytes() if os.path.isfile(path) else None


@dataclass(frozen=True)
class UrlStore:
    """Images by URL, through an index that :func:`~mm15_megatron.data.formats.url_sources.build_url_index` wrote.

    Opened at the first lookup; a copy sent to another process opens it there.

    Args:
        index: the index file.

    Raises:
        DataError: if there is no such file.
    """

    index: Path
    _open: list[_OpenIndex] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.index.is_file():
            raise DataError(f"{self.index} does not exist", fix="build the index of the downloaded images first")

    def __reduce__(self) -> tuple[type[UrlStore], tuple[Path]]:
        """Carry the path alone."""
        return (UrlStore, (self.index,))

    def get(self, key: str) -> bytes | None:
        """Return the bytes of the image of the URL ``key``, or None if it was not downloaded.

        Raises:
            DataError: if the index is damaged, or a file that it names is gone or has changed.
        """
        if not self._open:
            self._open.append(_OpenIndex(self.index))
        return self._open[0].get(key)


class _OpenIndex:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._head: IndexHead = read_head(path)
        self._high_N, self._low_N, self._values_N = columns(path, count=self._head.count)
        self._names = FileIO(path)
        self._tars: OrderedDict[int, FileIO] = OrderedDict()
        weakref.finalize(self, _close, self._names, self._tars)

    def get(self, url: str) -> bytes | None:
        at = find(self._high_N, self._low_N, key_of(url.strip().encode("utf-8", "surrogatepass")))
        if at < 0:
            return None
        offset, size, number = (int(x) for x in self._values_N[at])
        if number == LOOSE:
            return self._loose(offset, size)
        data = os.pread(self._tar(number).fileno(), size, offset)
        if len(data) != size:
            raise self._changed(self._head.files[number].path, f"holds {len(data)} of {size} bytes at {offset}")
        return data

    def _loose(self, offset: int, size: int) -> bytes:
        name = os.fsdecode(os.pread(self._names.fileno(), size, self._head.names_at + offset))
        try:
            return (self._path.parent / name).read_bytes()
        except OSError as error:
            raise self._changed(name, f"cannot be read ({error})") from error

    def _tar(self, number: int) -> FileIO:
        if number in self._tars:
            self._tars.move_to_end(number)
            return self._tars[number]
        file = self._head.files[number]
        try:
            stream = FileIO(self._path.parent / file.path)
        except OSError as error:
            raise self._changed(file.path, f"cannot be read ({error})") from error
        if (size := os.fstat(stream.fileno()).st_size) != file.size:
            stream.close()
            raise self._changed(file.path, f"has {size} bytes, {file.size} when it was indexed")
        self._tars[number] = stream
        if len(self._tars) > _OPEN_FILES:
            self._tars.popitem(last=False)[1].close()
        return stream

    def _changed(self, name: str, how: str) -> DataError:
        return DataError(
            f"{self._path}: {name} {how}", fix="put the files back beside the index, or build the index again"
        )


def _close(names: FileIO, tars: OrderedDict[int, FileIO]) -> None:
    for stream in (names, *tars.values()):
        stream.close()
