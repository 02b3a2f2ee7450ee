"""Samples of a tar: members that stand together and share a key, as WebDataset groups them.

The key of ``train/000012.seg.png`` is ``train/000012`` and its suffix ``seg.png``: the name is cut at the first dot of
its last part. Python's ``tarfile`` ends quietly at a header it cannot read and at the first end marker; here neither
loses anything unseen: what stands at the end is looked at. A member is held whole, so each reader has a limit for it.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from mm15_megatron.errors import DataError

TOO_LARGE: Final = "larger than max_member_bytes"
_PIECE: Final = 2**20
_AGAIN: Final = "download or write it again"


class TarCut(Exception):  # noqa: N818 - it is a place, which the reader turns into an error or into a skip
    """An archive ends before its end marker; ``name`` is the member that is cut, None between two members."""

    def __init__(self, name: str | None) -> None:
        super().__init__(name)
        self.name = name

    def error(self, path: Path, *, fix: str = _AGAIN) -> DataError:
        """Return the error for readers that do not take a cut archive."""
        where = "without end marker" if self.name is None else f"inside {self.name!r}"
        return DataError(f"{path} ends {where}", fix=fix)


@dataclass(frozen=True)
class Member:
    """A regular file of an archive.

    Attributes:
        name: with its folders.
        offset: where its bytes begin in the archive.
        size: bytes.
        data: its bytes; None = not asked for, or too many.
        too_large: they were asked for, and are more than the reader takes.
    """

    name: str
    offset: int
    size: int
    data: bytes | None = None
    too_large: bool = False


@dataclass(frozen=True)
class Sample:
    """Members of one key.

    Attributes:
        key: what their names share.
        members: by suffix (lower case), in the order of the archive.
        whole: False if the archive is cut right behind it, so that members of it may be missing.
    """

    key: str
    members: dict[str, Member]
    whole: bool = True

    @property
    def files(self) -> dict[str, bytes]:
        """The bytes that were read, by suffix."""
        return {suffix: member.data for suffix, member in self.members.items() if member.data is not None}

    @property
    def too_large(self) -> bool:
        """Whether a member was not read for its size."""
        return any(member.too_large for member in self.members.values())


def check_limit(max_member_bytes: int) -> None:
    """Check the option.

    Raises:
        DataError: it is not positive.
    """
    if max_member_bytes < 1:
        raise DataError(f"max_member_bytes is {max_member_bytes}", fix="use 1 or more")


def split_name(name: str) -> tuple[str, str] | None:
    """Return (key, suffix) of a member, or None if its name has none: hidden files, files without an ending."""
    stem, dot, suffix = name.rpartition("/")[2].partition(".")
    if not stem or not dot:
        return None
    return name[: len(name) - len(suffix) - 1].removeprefix("./"), suffix.lower()


def samples(path: Path, *, wanted: Callable[[str], bool], largest: int) -> Iterator[Sample]:
    """Yield the samples of an archive in order.

    Args:
        path: the archive.
        wanted: whether members of a suffix are read.
        largest: members of more bytes are not read.

    Raises:
        TarCut: the archive is cut; the sample before the cut has been given unless a member of its own is cut.
        DataError: it is not a tar, is broken, or gives a member twice.
    """
    key: str | None = None
    inside: dict[str, Member] = {}

    def wanted_name(name: str) -> bool:
        parts = split_name(name)
        return parts is not None and wanted(parts[1])

    try:
        for member in members(path, wanted=wanted_name, largest=largest):
            parts = split_name(member.name)
            if parts is None:
                continue
            if key is not None and parts[0] != key:
                yield Sample(key, inside)
                inside = {}
            key = parts[0]
            if wanted(parts[1]) and parts[1] in inside:
                raise DataError(
                    f"{path} holds {member.name} twice in one sample", fix="give every member a name of its own"
                )
            inside.setdefault(parts[1], member)
    except TarCut as cut:
        parts = None if cut.name is None else split_name(cut.name)
        if key is not None and (parts is None or parts[0] != key):
            yield Sample(key, inside, whole=parts is not None)
        raise
    if key is not None:
        yield Sample(key, inside)


def members(path: Path, *, wanted: Callable[[str], bool], largest: int) -> Iterator[Member]:
    """Yield the regular files of an uncompressed archive in order.

    Args:
        path: the archive.
        wanted: whether the file of a name is read.
        largest: files of more bytes are not read.

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
            asked, data = wanted(member.name), None
            if asked and member.size <= largest:
                stream.seek(member.offset_data)
                data = stream.read(member.size)
            yield Member(member.name, member.offset_data, member.size, data, too_large=asked and member.size > largest)
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
