"""Rows of parquet files: a unit is one row group, which is read a few rows at a time.

What is held in memory is those rows and one page of each column. Writers close pages by bytes only after a batch of
rows (Arrow: 1,024), so a row group of many large images may have pages of hundreds of megabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from mm15_megatron.data.formats.base import Unit, input_files
from mm15_megatron.errors import DataError, did_you_mean

_BUFFER: Final = 2**20
_IMAGES: Final = ("jpg", "png", "webp")


@contextmanager
def _table(path: Path) -> Iterator[Any]:
    try:
        with pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as table:
            yield table
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a sound parquet file: {error}", fix="download or write it again") from error


def table_schema(path: Path) -> Any:
    """Return the Arrow schema of a parquet file.

    Raises:
        DataError: it is not parquet.
    """
    with _table(path) as table:
        return table.schema_arrow


def image_column(path: Path) -> str | None:
    """Return the column in which img2dataset's ``output_format=parquet`` keeps images; None = there is none.

    Raises:
        DataError: the file is not parquet.
    """
    schema = table_schema(path)
    return next((name for name in _IMAGES if name in schema.names and is_bytes(schema.field(name).type)), None)


def column_type(schema: Any, column: str, *, path: Path) -> Any:
    """Return the Arrow type of a column.

    Raises:
        DataError: there is no such column, or there are two.
    """
    if schema.names.count(column) != 1:
        raise DataError(
            f"{path} has {schema.names.count(column)} columns {column!r}",
            fix=f"name the right column: {did_you_mean(column, schema.names)}",
        )
    kind = schema.field(column).type
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_text(kind: Any) -> bool:
    """Whether an Arrow type holds texts."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_bytes(kind: Any) -> bool:
    """Whether an Arrow type holds bytes of any length."""
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def check_text_column(schema: Any, column: str, *, path: Path) -> None:
    """Check that a column holds texts.

    Raises:
        DataError: it does not, or there is no such column.
    """
    kind = column_type(schema, column, path=path)
    if not is_text(kind):
        raise DataError(f"{path}: column {column!r} holds {kind}, not texts", fix="name a column of texts")


def row_group_units(paths: tuple[Path, ...], *, check: Callable[[Any, Path], None]) -> tuple[Unit, ...]:
    """Cut parquet files at their row groups.

    Args:
        paths: files, and folders of files that end in ``.parquet``.
        check: called with the Arrow schema of every file and its path; raises where a column is not as expected.

    Raises:
        DataError: a file is missing or is not parquet, or ``check`` raises it.
    """
    units: list[Unit] = []
    for path in input_files(paths, endings=(".parquet",)):
        with _table(path) as table:
            check(table.schema_arrow, path)
            units += [Unit(path, group, group + 1) for group in range(table.num_row_groups)]
    return tuple(units)


def rows(unit: Unit, columns: Sequence[str], *, batch: int) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield (where, values) of the rows of a unit; where is ``file:row``, counted from the beginning of the file.

    Args:
        unit: row groups of a file.
        columns: their values are given in this order, as Python values.
        batch: rows that are held at once.

    Raises:
        DataError: the file is damaged.
    """
    with _table(unit.path) as table:
        stop = table.num_row_groups if unit.stop is None else unit.stop
        row = sum(table.metadata.row_group(group).num_rows for group in range(unit.first))
        for piece in table.iter_batches(
            batch_size=batch, row_groups=list(range(unit.first, stop)), columns=list(columns), use_threads=False
        ):
            for values in zip(*(piece.column(name).to_pylist() for name in columns), strict=True):
                yield f"{unit.path.name}:{row}", values
                row += 1
