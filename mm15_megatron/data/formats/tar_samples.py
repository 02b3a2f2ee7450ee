"""Samples of a tar: members that stand together and share a key, as WebDataset groups them.

The key of ``train/000012.seg.png`` is ``train/000012`` and its suffix ``seg.png``: the name is cut at the first dot of
its last part. Python's ``tarfile`` ends quietly at a header it cannot read and at the first end marker; here neither
loses anything unseen: what stands at the end is looked at.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from mm15_megatron.errors import DataError

_PIECE: Final = 2**20
_AGAIN: Final = "download or write it again"


class TarCut(Exception):  # noqa: N818 - it is a place, which the reader turns into an error or into a skip
    """An archive ends before its end marker; ``name`` is the member that is cut, None between two members."""

    def __init__(self, name: str | None) -> None:
        super().__init__(name)
        self.name = name


@dataclass(frozen=True)
class Sample:
    """Members of one key.

    Attributes:
        key: what their names share.
        files: bytes by suffix (lower case), in the order of the archive.
        whole: False if the archive is cut right behind it, so that members of it may be missing.
    """

    key: str
    files: dict[str, bytes]
    whole: bool = True


def split_name(name: str) -> tuple[str, str] | None:
    """Return (key, suffix) of a member, or None if its name has none: hidden files, files without an ending."""
    stem, dot, suffix = name.rpartition("/")[2].partition(".")
    if not stem or not dot:
        return None
    return name[: len(name) - len(suffix) - 1].removeprefix("./"), suffix.lower()


def samples(path: Path, *, wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """Yield the samples of an archive in order; only members whose suffix is ``wanted`` are read.

    Raises:
        TarCut: the archive is cut; the sample before the cut has been given unless a member of its own is cut.
        DataError: it is not a tar, is broken, or gives a member twice.
    """
    key: str | None = None
    files: dict[str, bytes] = {}

    def wanted_name(name: str) -> bool:
        parts = split_name(name)
        return parts is not None and wanted(parts[1])

    try:
        for name, data in members(path, wanted=wanted_name):
            parts = split_name(name)
            if parts is None:
                continue
            if key is not None and parts[0] != key:
                yield Sample(key, files)
                files = {}
            key = parts[0]
            if data is not None and parts[1] in files:
                raise DataError(f"{path} holds {name} twice in one sample", fix="give every member a name of its own")
            if data is not None:
                files[parts[1]] = data
    except TarCut as cut:
        parts = None if cut.name is None else split_name(cut.name)
        if key is not None and (parts is None or parts[0] != key):
            yield Sample(key, files, whole=parts is not None)
        raise
    if key is not None:
        yield Sample(key, files)


def members(path: Path, *, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes | None]]:
    """Yield (name, bytes) of the regular files of an uncompressed archive; None for those that are not ``wanted``.

    Raises:
        TarCut: the archive is cut.
        DataError: it is not a tar, or is broken in the middle.
    """
    length = path.stat().st_size
    with path.open("rb") as stream:
        archive = _archive(stream, path=path, length=length)
        before = -1
        while (member := _next(archive, stream, path=path, length=length)) is not None:
            if member.size < 0 or archive.offset <= before:
                raise DataError(f"{path}: member {member.name!r} has an impossible size {member.size}", fix=_AGAIN)
            before = archive.offset
            archive.members.clear()  # type: ignore[attr-defined]  # it would remember them all
            # a sparse member may claim any size
            if not member.isreg() or member.issparse():
                continue
            if member.offset_data + member.size > length:
                raise TarCut(member.name)
            data = None
            if wanted(member.name):
                stream.seek(member.offset_data)
                data = stream.read(member.size)
            yield member.name, data
        _check_end(stream, archive.offset, path=path)


def _archive(stream: BinaryIO, *, path: Path, length: int) -> tarfile.TarFile:
    if length < tarfile.BLOCKSIZE:
        raise TarCut(None)
    head = stream.read(tarfile.BLOCKSIZE)
    stream.seek(0)
    try:
        return tarfile.open(fileobj=stream, mode="r:")
    except (tarfile.TarError, ValueError) as error:
        try:
            tarfile.TarInfo.frombuf(head, tarfile.ENCODING, "surrogateescape")
        except tarfile.TarError:
            raise DataError(f"{path} is not an uncompressed tar: {error}", fix="give plain .tar files") from error
        raise _broken(stream, path=path, length=length, error=error) from error


def _next(archive: tarfile.TarFile, stream: BinaryIO, *, path: Path, length: int) -> tarfile.TarInfo | None:
    try:
        return archive.next()
    except (tarfile.TarError, ValueError) as error:
        raise _broken(stream, path=path, length=length, error=error) from error


def _broken(stream: BinaryIO, *, path: Path, length: int, error: Exception) -> Exception:
    """What a header that could not be read means: where the file ends, a cut."""
    if stream.tell() >= length:
        return TarCut(None)
    return DataError(f"{path} is broken before byte {stream.tell()}: {error}", fix=_AGAIN)


def _check_end(stream: BinaryIO, offset: int, *, path: Path) -> None:
    stream.seek(offset)
    marker = stream.read(tarfile.BLOCKSIZE)
    if len(marker) < tarfile.BLOCKSIZE:
        raise TarCut(None)
    if any(marker):
        raise DataError(f"{path} is broken: no member begins at byte {offset}", fix=_AGAIN)
    while piece := stream.read(_PIECE):
        if piece.count(0) != len(piece):
            raise DataError(f"{path} goes on behind its end marker at byte {offset}", fix="split joined archives")
