"""Captions in JSON lines beside a folder of images, and in parquet files with image bytes or paths.

Sources: Hugging Face's guide to image datasets (``metadata.jsonl`` with ``file_name``, relative to the folder of that
file, and further fields of any name, ``text`` or ``caption`` in its examples); the storage of its Image feature in
``datasets/features/image.py``: a struct of ``bytes`` and ``path``, either of which may be null; ``ParquetSampleWriter``
in img2dataset's ``img2dataset/writer.py``: image bytes in a column ``jpg``, caption in ``txt``, ``status``, and null
bytes where the download failed (``image_column="jpg", caption_column="txt", status_column="status"``; the format
``img2dataset`` finds these by itself).

Columns that hold lists of captions or of images are refused by their type.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from mm15_megatron.data.formats.base import (
    UNIT_BYTES,
    Caption,
    Found,
    Skipped,
    Unit,
    input_files,
    json_lines,
    line_units,
)
from mm15_megatron.data.formats.fields import (
    MISSING_IMAGE,
    RAISE,
    SKIP,
    check_choice,
    check_named,
    fault_of,
    read_inside,
    status_fault,
    text_field,
)
from mm15_megatron.data.formats.tables import check_text_column, column_type, is_bytes, is_text, row_group_units, rows
from mm15_megatron.errors import DataError

NO_IMAGE: Final = "no image"
_ROWS: Final = 16


@dataclass(frozen=True)
class JsonlCaptions:
    """Reader of JSON lines that name image files. Captions lose the white space around them.

    Attributes:
        paths: files, or folders of files that end in ``.jsonl`` (also compressed: ``.jsonl.gz``, ``.jsonl.zst``).
        root: folder below which the images lie; None = the folder of each file.
        image_field: field with the path of the image, relative to the root.
        caption_field: field with the caption.
        missing: what to do about an image file that does not exist: ``raise`` or ``skip``.
        unit_bytes: size of a unit.
    """

    paths: tuple[Path, ...]
    root: Path | None = None
    image_field: str = "file_name"
    caption_field: str = "text"
    missing: str = RAISE
    unit_bytes: int = UNIT_BYTES

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            DataError: one is impossible.
        """
        check_choice("missing", self.missing, (RAISE, SKIP))
        check_named(image_field=self.image_field, caption_field=self.caption_field)
        _check_root(self.root)

    @property
    def kind(self) -> str:
        """Kind of dataset."""
        return "captions"

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
            DataError: a line is not a JSON object or lacks a field, or names an image that is missing or not below the
                root.
        """
        root = self.root or unit.path.parent
        for where, row in json_lines(unit):
            place = f"{unit.path} at {where}"
            name = text_field(row, self.image_field, place=place)
            text = text_field(row, self.caption_field, place=place)
            reason = fault_of(text, noun="caption")
            if not name or text is None or reason is not None:
                yield Skipped(NO_IMAGE if not name else str(reason), where)
                continue
            data = read_inside(root, name, place=place, missing=self.missing)
            yield Skipped(MISSING_IMAGE, where) if data is None else Found(Caption(data, text.strip()), where)


@dataclass(frozen=True)
class ParquetCaptions:
    """Reader of parquet files; a unit is a row group. Captions lose the white space around them.

    Attributes:
        paths: files, or folders of files that end in ``.parquet``.
        image_column: image bytes, paths (texts), or structs of ``bytes`` and ``path``.
        caption_column: captions.
        status_column: rows in which this column is neither null nor ``success`` are left out, by status.
        root: folder below which image files lie; None = the folder of each parquet file.
        missing: what to do about an image file that does not exist: ``raise`` or ``skip``.
    """

    paths: tuple[Path, ...]
    image_column: str = "image"
    caption_column: str = "text"
    status_column: str | None = None
    root: Path | None = None
    missing: str = RAISE

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            DataError: one is impossible.
        """
        check_choice("missing", self.missing, (RAISE, SKIP))
        check_named(image_column=self.image_column, caption_column=self.caption_column)
        if self.status_column is not None:
            check_named(status_column=self.status_column)
        if len(set(self._columns)) < len(self._columns):
            raise DataError(f"the columns are {', '.join(self._columns)}", fix="name each column once")
        _check_root(self.root)

    @property
    def kind(self) -> str:
        """Kind of dataset."""
        return "captions"

    @property
    def _columns(self) -> tuple[str, ...]:
        return (self.image_column, self.caption_column, *([self.status_column] if self.status_column else []))

    def units(self) -> tuple[Unit, ...]:
        """One unit a row group.

        Raises:
            DataError: there is no file, one is not parquet, or a column is missing or of another type.
        """
        return row_group_units(self.paths, check=self._check)

    def read(self, unit: Unit) -> Iterator[Found | Skipped]:
        """Read the rows of a unit.

        Raises:
            DataError: the file is damaged, or a row names an image that is missing or outside the root.
        """
        root = self.root or unit.path.parent
        for where, (image, text, *status) in rows(unit, self._columns, batch=_ROWS):
            reason = status_fault(status[0]) if status else None
            reason = reason or fault_of(text, noun="caption")
            fields = image if isinstance(image, dict) else {"path" if isinstance(image, str) else "bytes": image}
            data, name = fields.get("bytes"), fields.get("path") or ""
            if reason is not None or (data is None and not name):
                yield Skipped(reason or NO_IMAGE, where)
                continue
            if data is None:
                data = read_inside(root, name, place=f"{unit.path} at {where}", missing=self.missing)
            yield Skipped(MISSING_IMAGE, where) if data is None else Found(Caption(data, text.strip()), where)

    def _check(self, schema: Any, path: Path) -> None:
        kind = column_type(schema, self.image_column, path=path)
        if pa.types.is_struct(kind):
            inside = {field.name: field.type for field in kind}
            sound = inside.keys() & {"bytes", "path"} and all(
                good(inside[name]) for name, good in (("bytes", is_bytes), ("path", is_text)) if name in inside
            )
        else:
            sound = is_bytes(kind) or is_text(kind)
        if not sound:
            raise DataError(
                f"{path}: column {self.image_column!r} holds {kind}",
                fix="name a column of image bytes, of paths, or of structs of bytes and path",
            )
        for column in self._columns[1:]:
            check_text_column(schema, column, path=path)


def _check_root(root: Path | None) -> None:
    if root is not None and not root.is_dir():
        raise DataError(f"root {root} is not a folder", fix="name the folder of the images")
