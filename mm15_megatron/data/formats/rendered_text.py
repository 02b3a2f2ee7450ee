"""RenderedText: handwritten-looking text on a rendered sheet of paper, with its lines.

Read from: the dataset card of ``wendlerc/RenderedText`` (12 million images of 1024 x 1024, archives in the root folder
and in ``remaining/``) and public training code on it: an archive holds ``<key>.png`` and ``<key>.json`` with the lines
in order under ``ocr_annotation.text``; the parquet conversion has the columns ``png`` and ``json``. Not confirmed: the
names of the other annotations (boxes of lines and characters, font, colour, rotation), which are not used. The images
are PNG; ``jpg`` and ``jpeg`` are read as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from mm15_megatron.data.formats.base import Found, Interleaved, Skipped, Unit, input_files
from mm15_megatron.data.formats.fields import fault_of
from mm15_megatron.data.formats.ocr_pages import documents, joined, parse_json
from mm15_megatron.data.formats.tables import column_type, row_group_units, rows
from mm15_megatron.data.formats.tar_samples import check_limit
from mm15_megatron.errors import DataError

IMAGES: Final = ("png", "jpg", "jpeg")
ROWS_AT_ONCE: Final = 16


@dataclass(frozen=True)
class RenderedText:
    """Reader of RenderedText archives and parquet files.

    Attributes:
        paths: archives and parquet files, or folders of them.
        max_member_bytes: a sample with a larger member of its archive is left out and counted.
    """

    paths: tuple[Path, ...]
    max_member_bytes: int = 2**28

    def __post_init__(self) -> None:
        """Check the option.

        Raises:
            DataError: it is not positive.
        """
        check_limit(self.max_member_bytes)

    @property
    def kind(self) -> str:
        """Kind of dataset that the records make."""
        return "interleaved"

    def units(self) -> tuple[Unit, ...]:
        """Return one unit an archive and one a row group of a parquet file.

        Raises:
            DataError: there is no file, or a parquet file cannot be opened.
        """
        units: list[Unit] = []
        for path in input_files(self.paths, endings=(".tar", ".parquet")):
            units += row_group_units((path,), check=_check_schema) if path.suffix == ".parquet" else [Unit(path)]
        return tuple(units)

    def read(self, unit: Unit) -> Iterator[Found | Skipped]:
        """Read the images of a unit in order: each image, then its lines.

        Raises:
            DataError: the file is broken, or an annotation has another structure.
        """
        parquet = unit.path.suffix == ".parquet"
        for sample in _parquet_samples(unit) if parquet else _tar_samples(unit, largest=self.max_member_bytes):
            if isinstance(sample, Skipped):
                yield sample
                continue
            where, image, annotation = sample
            if image is None:
                yield Skipped("no image", where)
            elif annotation is None:
                yield Skipped("no json", where)
            else:
                text = _lines(annotation, where=f"{unit.path.parent}/{where}")
                fault = fault_of(text, noun="text")
                yield Skipped(fault, where) if fault else Found(Interleaved((image, text)), where)


def _lines(annotation: dict[str, Any], *, where: str) -> str:
    ocr = annotation.get("ocr_annotation")
    texts = ocr.get("text") if isinstance(ocr, dict) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"{where} has the fields {sorted(annotation)} and no list of texts in ocr_annotation.text",
            fix="this is not the published format: check the file",
        )
    return joined(texts, "\n")


Sample = tuple[str, bytes | None, dict[str, Any] | None]
"""Where a sample stands, its image and its annotation; None = missing."""


def _tar_samples(unit: Unit, *, largest: int) -> Iterator[Sample | Skipped]:
    for sample in documents(unit, suffixes=(*IMAGES, "json"), largest=largest):
        if isinstance(sample, Skipped):
            yield sample
            continue
        key, files = sample.key, sample.files
        image = next((files[suffix] for suffix in IMAGES if suffix in files), None)
        data = files.get("json")
        annotation = None if data is None else parse_json(data, where=f"{unit.path}:{key}")
        yield f"{unit.path.name}:{key}", image, annotation


def _check_schema(schema: Any, path: Path) -> None:
    _image_column(schema.names, path=path)
    column_type(schema, "json", path=path)


def _image_column(names: list[str], *, path: Path) -> str:
    for name in IMAGES:
        if name in names:
            return name
    raise DataError(f"{path} has the columns {names}, expected png and json", fix="name files of this dataset")


def _parquet_samples(unit: Unit) -> Iterator[Sample]:
    try:
        names = pq.read_schema(unit.path).names
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{unit.path} is not a sound parquet file: {error}", fix="download it again") from error
    column = _image_column(names, path=unit.path)
    for where, (image, annotation) in rows(unit, [column, "json"], batch=ROWS_AT_ONCE):
        if annotation is not None and not isinstance(annotation, dict):
            raise DataError(
                f"{unit.path.parent}/{where}: json is a {type(annotation).__name__}, expected a struct",
                fix="this is not the published format: check the file",
            )
        data = image.get("bytes") if isinstance(image, dict) else image
        yield where, data if isinstance(data, bytes) else None, annotation
