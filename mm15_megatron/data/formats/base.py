"""What every reader of a format has in common: units of input, records, and what is left out and why.

A reader is a frozen dataclass with its options. ``units`` cuts the input into pieces that are read independently, in an
order that depends on the input alone; ``read`` goes through one of them. So any number of processes, on any number of
machines, gives the same documents in the same order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from mm15_megatron.data.formats.compressed import is_compressed, opened
from mm15_megatron.data.sft import Conversation
from mm15_megatron.errors import DataError

UNIT_BYTES: Final = 256 * 2**20
"""Text files are cut into units of at most about this size."""
_UNITS, _SMALL_UNIT_BYTES = 256, 8 * 2**20


@dataclass(frozen=True)
class Unit:
    """A piece of the input that one process reads from its beginning to its end.

    Attributes:
        path: the file.
        first: where it begins: a byte of a text file, a row group of a parquet file; 0 = at the beginning.
        stop: where it ends, exclusive, in the same measure; None = at the end of the file.
    """

    path: Path
    first: int = 0
    stop: int | None = None

    @property
    def name(self) -> str:
        """Where it is, for people."""
        return f"{self.path}" if self.first == 0 and self.stop is None else f"{self.path} [{self.first}, {self.stop})"


@dataclass(frozen=True)
class Caption:
    """An image and its caption."""

    image: bytes
    text: str


@dataclass(frozen=True)
class Interleaved:
    """Paragraphs (str) and encoded images (bytes) in the order in which they stand in a document."""

    parts: tuple[str | bytes, ...]


@dataclass(frozen=True)
class Text:
    """A document without images."""

    text: str


Record = Caption | Interleaved | Text | Conversation
"""One document, before it is tokenised."""


@dataclass(frozen=True)
class Found:
    """A record, and where in the input it stands (``shard-00000.tar:000012345``), for reports and errors."""

    record: Record
    where: str
    repaired: tuple[str, ...] = ()
    """Short reasons, one for each thing that was left out of the record itself (an image, a paragraph); counted."""


@dataclass(frozen=True)
class Skipped:
    """A document that is left out; ``reason`` is a short phrase without values, by which it is counted."""

    reason: str
    where: str


@dataclass(frozen=True)
class Pending:
    """A document that is still to be read, by a library that a hostile file may end or stall with its process.

    Who takes it knows where it stands before that happens, and may pass it over; ``read`` gives what it holds.
    """

    where: str
    read: Callable[[], Iterator[Found | Skipped]]


Item = Found | Skipped | Pending
"""What a reader gives, the same in number and order whenever it reads a unit."""


class Format(Protocol):
    """A reader."""

    @property
    def kind(self) -> str:
        """Kind of dataset that its records make: captions | interleaved | text | conversations."""
        ...

    def units(self) -> tuple[Unit, ...]:
        """Cut the input.

        Raises:
            DataError: there is no input, or it is not this format at all.
        """
        ...

    def read(self, unit: Unit) -> Iterator[Item]:
        """Read one unit in order; documents that native code decodes are given as ``Pending``.

        Raises:
            DataError: the unit is not this format (a wrong schema, a broken archive); what is wrong with a single
                document is a ``Skipped`` instead where the format's users expect such documents (a failed download).
        """
        ...


def opened_items(items: Iterable[Item]) -> Iterator[Found | Skipped]:
    """Yield what a reader gives, with every ``Pending`` read in its place."""
    for item in items:
        if isinstance(item, Pending):
            yield from item.read()
        else:
            yield item


def input_files(paths: tuple[Path, ...], *, endings: tuple[str, ...]) -> tuple[Path, ...]:
    """Return the files named, and those below the folders named that end in one of ``endings``, sorted by path.

    Raises:
        DataError: a path does not exist, is named twice by two ways, holds no such file, or links in a circle.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = [at / name for at, names in folders_below(path) for name in names if name.endswith(endings)]
            inside = sorted(one for one in below if one.is_file())
            if not inside:
                raise DataError(
                    f"{path} holds no file that ends in {' or '.join(endings)}", fix="name the right folder"
                )
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{path} does not exist", fix="name files or folders that do")
    real = [path.resolve() for path in found]
    twice = sorted({str(path) for path in real if real.count(path) > 1}) if len(set(real)) < len(real) else []
    if twice:
        raise DataError(f"{', '.join(twice[:3])} is named twice", fix="name every file once")
    return tuple(found)


def folders_below(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield (folder, sorted names of what is no folder) of a folder and all below it, through links, in sorted order.

    Raises:
        DataError: a link leads back to a folder above it.
    """
    yield from _folders(folder, above=())


def _folders(folder: Path, *, above: tuple[str, ...]) -> Iterator[tuple[Path, list[str]]]:
    real = os.path.realpath(folder)
    if real in above:
        raise DataError(f"{folder} leads back to {real}, which holds it", fix="remove the link")
    with os.scandir(folder) as entries:
        found = sorted((entry.name, entry.is_dir()) for entry in entries)
    yield folder, [name for name, is_folder in found if not is_folder]
    for name, is_folder in found:
        if is_folder:
            yield from _folders(folder / name, above=(*above, real))


def line_units(paths: tuple[Path, ...], *, size: int = UNIT_BYTES) -> tuple[Unit, ...]:
    """Cut text files at bytes; :func:`lines` finds the next beginning of a line from there.

    A compressed file is one unit. What fits into few units of ``size`` is cut into more and smaller ones, so that many
    processes can share it; the cuts depend on the files alone.

    Args:
        paths: the files.
        size: bytes of a unit at most.

    Raises:
        DataError: ``size`` is not positive.
    """
    if size < 1:
        raise DataError(f"a unit of {size} bytes", fix="give a positive size")
    size = min(size, max(_SMALL_UNIT_BYTES, sum(path.stat().st_size for path in paths) // _UNITS))
    units = []
    for path in paths:
        if is_compressed(path):
            units.append(Unit(path))
            continue
        length = path.stat().st_size
        units += [Unit(path, at, min(at + size, length)) for at in range(0, max(length, 1), size)]
    return tuple(units)


def lines(unit: Unit) -> Iterator[tuple[str, str]]:
    """Yield (where, line) of the lines that begin inside ``unit``; where is ``file:byte``; empty lines are passed over.

    Raises:
        DataError: a line is not UTF-8, or a compressed file is damaged.
    """
    with opened(unit.path) as stream:
        if unit.first:
            stream.seek(unit.first - 1)
            stream.readline()  # the rest of a line that began before
        at = stream.tell()
        while unit.stop is None or at < unit.stop:
            raw = stream.readline()
            if not raw:
                return
            where = f"{unit.path.name}:{at}"
            at += len(raw)
            try:
                line = raw.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise DataError(f"{unit.path}, line at byte {at}: {error}", fix="write it as UTF-8") from error
            if line:
                yield where, line


def json_lines(unit: Unit) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, object) of the JSON lines of a unit.

    Raises:
        DataError: a line is not a JSON object.
    """
    for where, line in lines(unit):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{unit.path} at {where}: {error}", fix="write one JSON object a line") from error
        if not isinstance(value, dict):
            raise DataError(
                f"{unit.path} at {where} holds a {type(value).__name__}", fix="write one JSON object a line"
            )
        yield where, value
