"""JSON records of annotation files: one array a file, one object a line, or rows of parquet; read piece by piece.

An array is parsed object by object from a window over the file, so a file of any size takes the memory of its largest
record. A large array is cut where records begin; finding those places takes one pass over the file.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.parquet as pq

from mm15_megatron.data.formats.base import UNIT_BYTES, Unit, input_files, json_lines, line_units
from mm15_megatron.data.formats.compressed import COMPRESSED, is_compressed, opened
from mm15_megatron.data.formats.tables import row_group_units, rows
from mm15_megatron.errors import DataError

ENDINGS: Final = (
    ".parquet", *(form + packed for form in (".json", ".jsonl") for packed in ("", *COMPRESSED))
)  # fmt: skip
"""Files that are looked for below a folder."""

CHUNK: Final = 2**20
LONGEST: Final = 2**29
"""Characters of one record: more means that the file is not an array of records."""

_BOM: Final = codecs.BOM_UTF8
_SPACE: Final = re.compile(r"[ \t\r\n]*")
_DECODER: Final = json.JSONDecoder()
_LONGEST_LITERAL: Final = 16
_ROWS: Final = 16
_FIX: Final = "write one JSON array of objects, or one object a line"


def record_units(paths: tuple[Path, ...], *, size: int = UNIT_BYTES) -> tuple[Unit, ...]:
    """Cut annotation files: arrays and lines at about ``size`` bytes, parquet files at their row groups.

    Raises:
        DataError: there are none, or one is neither of the three.
    """
    units: list[Unit] = []
    for path in input_files(paths, endings=ENDINGS):
        if path.suffix == ".parquet":
            units += row_group_units((path,), check=_any_columns)
        elif _is_array(path):
            units += _array_units(path, size=size)
        else:
            units += line_units((path,), size=size)
    return tuple(units)


def records(unit: Unit) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, record) in order; where is ``file:byte``, or ``file:row`` in a parquet file.

    Raises:
        DataError: the file is none of the three forms, or breaks off.
    """
    if unit.path.suffix == ".parquet":
        yield from _rows(unit)
    elif _is_array(unit.path):
        for at, record in array_records(unit):
            yield f"{unit.path.name}:{at}", record
    else:
        yield from json_lines(unit)


def _any_columns(schema: Any, path: Path) -> None:
    """Accept any columns: what a record lacks is found when it is read."""


def _is_array(path: Path) -> bool:
    with opened(path) as stream:
        head = stream.read(CHUNK).removeprefix(_BOM).lstrip()
    if head[:1] not in (b"[", b"{"):
        found = repr(head[:20]) if head else "nothing"
        raise DataError(f"{path} begins with {found}, not with a JSON array or object", fix=_FIX)
    return head[:1] == b"["


def _array_units(path: Path, *, size: int) -> list[Unit]:
    if is_compressed(path):
        return [Unit(path)]
    length, cuts = path.stat().st_size, [0]
    if length > size:
        for at, _ in array_records(Unit(path)):
            if at - cuts[-1] >= size:
                cuts.append(at)
    return [Unit(path, first, stop) for first, stop in zip(cuts, [*cuts[1:], length], strict=True)]


def array_records(unit: Unit, *, chunk: int = CHUNK) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (byte, object) of the objects of a JSON array that begin inside ``unit``.

    Args:
        unit: a piece of the file that begins at an object, or at the beginning.
        chunk: bytes read at once.

    Raises:
        DataError: it is not an array of objects in UTF-8, breaks off, or something follows it.
    """
    with opened(unit.path) as stream:
        window = _Window(stream, path=unit.path, at=unit.first, chunk=chunk)
        if unit.first == 0:
            window.skip("[")
            if window.peek() == "]":
                return window.end()
        while True:
            char = window.peek()
            if char and unit.stop is not None and window.at >= unit.stop:
                return None
            if char != "{":
                raise window.wrong(f"an object was expected, found {char!r}")
            yield window.at, window.object()
            if window.peek() == "]":
                return window.end()
            window.skip(",")


class _Window:
    """A moving piece of the text of a JSON array; ``at`` is the byte of the file at which it stands."""

    def __init__(self, stream: BinaryIO, *, path: Path, at: int, chunk: int) -> None:
        self._stream, self._path, self._chunk = stream, path, chunk
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._text, self._place = "", 0
        if at:
            stream.seek(at)
        elif (head := stream.read(len(_BOM))) == _BOM:
            at = len(_BOM)
        else:
            self._text = self._utf8.decode(head)
        self.at = at

    def peek(self) -> str:
        """Return the next character that is not space, without taking it; empty at the end of the file."""
        while True:
            spaces = _SPACE.match(self._text, self._place)
            assert spaces is not None
            self.at += spaces.end() - self._place
            self._place = spaces.end()
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more(self._chunk):
                return ""

    def skip(self, char: str) -> None:
        """Take ``char``, which must be next."""
        if (found := self.peek()) != char:
            raise self.wrong(f"{char!r} was expected, found {found!r}" if found else f"it ends without {char!r}")
        self._place += 1
        self.at += 1

    def end(self) -> None:
        """Take the closing bracket, after which nothing may follow."""
        self.skip("]")
        if found := self.peek():
            raise self.wrong(f"the array is over, but {found!r} follows")

    def object(self) -> dict[str, Any]:
        """Take one object."""
        size = self._chunk
        while True:
            try:
                value, stop = _DECODER.raw_decode(self._text, self._place)
                break
            except json.JSONDecodeError as error:
                # more text cannot mend an error that stands well before the end of what was read
                cut_off = error.msg.startswith("Unterminated") or error.pos + _LONGEST_LITERAL >= len(self._text)
                if not cut_off or len(self._text) - self._place > LONGEST or not self._more(size):
                    raise self.wrong(f"in the object there: {error.msg}") from error
                size *= 2
            except (ValueError, RecursionError) as error:
                raise self.wrong(f"in the object there: {error}") from error
        taken = self._text[self._place : stop]
        self._place = stop
        self.at += len(taken) if taken.isascii() else len(taken.encode())
        return dict(value)

    def wrong(self, what: str) -> DataError:
        """Return the error that says what is wrong at this place."""
        return DataError(f"{self._path} at byte {self.at}: {what}", fix=_FIX)

    def _more(self, size: int) -> bool:
        raw = self._stream.read(size)
        try:
            text = self._utf8.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            raise DataError(f"{self._path}, after byte {self.at}: {error}", fix="write it as UTF-8") from error
        self._text, self._place = self._text[self._place :] + text, 0
        return bool(raw)


def _rows(unit: Unit) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        names = pq.read_schema(unit.path).names
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{unit.path} is not a sound parquet file: {error}", fix="download it again") from error
    for where, values in rows(unit, names, batch=_ROWS):
        yield where, dict(zip(names, values, strict=True))
