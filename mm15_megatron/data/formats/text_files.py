"""Documents without images: JSON lines, parquet columns, plain text.

Sources: Megatron-LM's ``tools/preprocess_data.py`` (one JSON object a line; ``--json-keys``, by default ``text``, names
the field; one line is one document); public text corpora have the same layout, plain, ``.gz`` or ``.zst``. Texts are
given as they are, white space included; only an empty one, or one of white space alone, is left out. Megatron-LM takes
a list of sentences too; here a text is a string. Plain text has no marks of documents: an option says what one is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mm15_megatron.data.formats.base import (
    UNIT_BYTES,
    Found,
    Skipped,
    Text,
    Unit,
    input_files,
    json_lines,
    line_units,
)
from mm15_megatron.data.formats.compressed import opened
from mm15_megatron.data.formats.fields import check_choice, check_named, fault_of, text_field
from mm15_megatron.data.formats.tables import check_text_column, row_group_units, rows
from mm15_megatron.errors import DataError

FILE: Final = "file"
BLANK_LINES: Final = "blank-lines"
_ROWS: Final = 256
_BOM: Final = b"\xef\xbb\xbf"


def _outcome(text: str | None, where: str) -> Found | Skipped:
    reason = fault_of(text, noun="text")
    return Skipped(reason or "no text", where) if text is None or reason is not None else Found(Text(text), where)


@dataclass(frozen=True)
class JsonlText:
    """Reader of JSON lines.

    Attributes:
        paths: files, or folders of files that end in ``.jsonl``, ``.jsonl.gz`` or ``.jsonl.zst``; a compressed file is
            one unit.
        field: field with the text.
        unit_bytes: size of a unit.
    """

    paths: tuple[Path, ...]
    field: str = "text"
    unit_bytes: int = UNIT_BYTES

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            DataError: one is impossible.
        """
        check_named(field=self.field)

    @property
    def kind(self) -> str:
        """Kind of dataset."""
        return "text"

    def units(self) -> tuple[Unit, ...]:
        """Cut the files at lines.

        Raises:
            DataError: there is none.
        """
        endings = (".jsonl", ".jsonl.gz", ".jsonl.zst")
        return line_units(input_files(self.paths, endings=endings), size=self.unit_bytes)

    def read(self, unit: Unit) -> Iterator[Found | Skipped]:
        """Read the lines of a unit.

        Raises:
            DataError: a line is not a JSON object, or its field is absent or no text; a compressed file is damaged.
        """
        for where, row in json_lines(unit):
            yield _outcome(text_field(row, self.field, place=f"{unit.path} at {where}"), where)


@dataclass(frozen=True)
class ParquetText:
    """Reader of parquet files; a unit is a row group.

    Attributes:
        paths: files, or folders of files that end in ``.parquet``.
        column: column with the texts.
    """

    paths: tuple[Path, ...]
    column: str = "text"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            DataError: one is impossible.
        """
        check_named(column=self.column)

    @property
    def kind(self) -> str:
        """Kind of dataset."""
        return "text"

    def units(self) -> tuple[Unit, ...]:
        """One unit a row group.

        Raises:
            DataError: there is no file, one is not parquet, or the column is missing or holds no texts.
        """
        return row_group_units(self.paths, check=self._check)

    def read(self, unit: Unit) -> Iterator[Found | Skipped]:
        """Read the rows of a unit.

        Raises:
            DataError: the file is damaged.
        """
        for where, (text,) in rows(unit, (self.column,), batch=_ROWS):
            yield _outcome(text, where)

    def _check(self, schema: Any, path: Path) -> None:
        check_text_column(schema, self.column, path=path)


@dataclass(frozen=True)
class PlainText:
    """Reader of plain text in UTF-8; the line ends at the end of a document are not part of it.

    Attributes:
        paths: files, or folders of files that end in ``.txt``, ``.txt.gz`` or ``.txt.zst``.
        documents: ``file``: each file is one document and one unit; ``blank-lines``: one or more blank lines stand
            between documents.
        unit_bytes: size of a unit of files that hold many documents.
        max_bytes: a longer document is refused, for it is held in memory and most likely many documents.
    """

    paths: tuple[Path, ...]
    documents: str = FILE
    unit_bytes: int = UNIT_BYTES
    max_bytes: int = UNIT_BYTES

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            DataError: one is impossible.
        """
        check_choice("documents", self.documents, (FILE, BLANK_LINES))
        if self.max_bytes < 1:
            raise DataError(f"max_bytes is {self.max_bytes}", fix="give a positive number")

    @property
    def kind(self) -> str:
        """Kind of dataset."""
        return "text"

    def units(self) -> tuple[Unit, ...]:
        """Cut the files at bytes, or not at all where each is one document.

        Raises:
            DataError: there is none.
        """
        files = input_files(self.paths, endings=(".txt", ".txt.gz", ".txt.zst"))
        return tuple(map(Unit, files)) if self.documents == FILE else line_units(files, size=self.unit_bytes)

    def read(self, unit: Unit) -> Iterator[Found | Skipped]:
        """Read the documents of a unit.

        Raises:
            DataError: a document is not UTF-8 or longer than ``max_bytes``.
        """
        if self.documents == FILE:
            with opened(unit.path) as stream:
                pieces = iter([(0, stream.read(self.max_bytes + 1))])
        else:
            pieces = _between_blank_lines(unit, limit=self.max_bytes)
        for at, raw in pieces:
            place = f"{unit.path}, document at byte {at}"
            if len(raw) > self.max_bytes:
                raise DataError(f"{place} is longer than {self.max_bytes} bytes", fix="say what a document is")
            try:
                text = raw.removeprefix(_BOM if at == 0 else b"").decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: {error}", fix="write it as UTF-8") from error
            where = unit.path.name if self.documents == FILE else f"{unit.path.name}:{at}"
            yield _outcome(text.rstrip("\r\n"), where)


def _between_blank_lines(unit: Unit, *, limit: int) -> Iterator[tuple[int, bytes]]:
    """Yield (byte, document) of the documents of a unit, each at most one line longer than ``limit``.

    A document belongs to the unit in which the last blank line before it begins (the beginning of the file counts as
    one), so that a unit can tell its first document without looking at what stands before it.
    """
    with opened(unit.path) as stream:
        if unit.first:
            stream.seek(unit.first - 1)
            stream.readline()
        blank = None if unit.first else -1  # where the last blank line began; None = none seen in this unit yet
        start, document = 0, bytearray()
        while True:
            at = stream.tell()
            line = stream.readline(limit + 1)
            if line and line.strip():
                if blank is None:
                    if unit.stop is not None and at >= unit.stop:
                        return
                    continue
                if not document:
                    if unit.stop is not None and blank >= unit.stop:
                        return
                    start = at
                document += line
                if len(document) <= limit:
                    continue
            if document:
                yield start, bytes(document)
                document.clear()
            if not line:
                return
            blank = at
            if unit.stop is not None and blank >= unit.stop:
                return
