"""OBELICS: web documents as parallel lists of texts and image URLs, in parquet.

Looked up: the dataset card (huggingface.co/datasets/HuggingFaceM4/OBELICS) and the scripts that made it
(github.com/huggingface/OBELICS, ``build_obelics/13_final_processing.py``). Columns: ``images`` (list of URL or null),
``texts`` (list of text or null), exactly one of both set at every place; ``metadata`` (a JSON list parallel to them:
for an image document_url, unformatted_src, src, formatted_filename, alt_text, original_width, original_height, ...;
null for a text); ``general_metadata`` (a JSON object: url, warc_filename, ...). The URL in ``images`` is the ``src`` of
the metadata, so neither metadata column is read.

Some texts hold a paragraph ``END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED``, where a page turns to another topic; its authors
replaced it by the end-of-text token in training (appendix A.1 of arXiv 2306.16527). Here it ends the document
(``end_mark="split"``) or is taken out ("remove"). How MM1 treated it is not known. Not confirmed: how large the row
groups of the published files are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from mm15_megatron.data.formats.base import Found, Skipped, Unit
from mm15_megatron.data.formats.image_store import ImageSource
from mm15_megatron.data.formats.interleaved_filters import InterleavedFilters
from mm15_megatron.data.formats.interleaving import Assembly, Reference
from mm15_megatron.data.formats.tables import column_type, is_text, row_group_units, rows
from mm15_megatron.errors import DataError

END_MARK: Final = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"
NEITHER: Final = "place with neither text nor image"
_COLUMNS: Final = ("images", "texts")
_BATCH: Final = 256


@dataclass(frozen=True)
class Obelics:
    """A reader of OBELICS.

    Args:
        paths: parquet files, or folders of them.
        images: where the downloaded images are, by URL.
        on_missing: drop-image | drop-document.
        end_mark: split | remove.
        filters: filters of images and documents; None = none.

    Raises:
        DataError: for another value of an option.
    """

    paths: tuple[Path, ...]
    images: ImageSource
    on_missing: str = "drop-image"
    end_mark: str = "split"
    filters: InterleavedFilters | None = None

    def __post_init__(self) -> None:
        if self.end_mark not in ("split", "remove"):
            raise DataError(f"end_mark is {self.end_mark!r}", fix="choose split or remove")
        self._assembly()  # checks on_missing

    def _assembly(self) -> Assembly:
        return Assembly(self.images, self.on_missing, self.filters)

    @property
    def kind(self) -> str:
        """Interleaved documents."""
        return "interleaved"

    def units(self) -> tuple[Unit, ...]:
        """Cut the files at their row groups.

        Raises:
            DataError: a file is not parquet, or has not the two columns.
        """
        return row_group_units(self.paths, check=_check_schema)

    def read(self, unit: Unit) -> Iterator[Found | Skipped]:
        """Read some row groups; the documents of a row with end marks are ``file:row/0``, ``/1``, ...

        Raises:
            DataError: a row is malformed, or the file or the store of images is damaged.
        """
        assembly = self._assembly()
        for where, (images, texts) in rows(unit, _COLUMNS, batch=_BATCH):
            parts, repaired = _parts(images, texts, where=f"{unit.path} at {where}")
            documents = _documents(parts, split=self.end_mark == "split")
            for number, document in enumerate(documents):
                place = where if len(documents) == 1 else f"{where}/{number}"
                yield assembly.assemble(document, where=place, repaired=repaired if number == 0 else ())


def _check_schema(schema: Any, path: Path) -> None:
    for name in _COLUMNS:
        kind = column_type(schema, name, path=path)
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not is_text(kind.value_type):
            raise DataError(
                f"{path}: column {name!r} holds {kind}, not lists of texts",
                fix="give the parquet files of OBELICS as they are published",
            )


def _parts(
    images: list[str | None] | None, texts: list[str | None] | None, *, where: str
) -> tuple[list[str | Reference], tuple[str, ...]]:
    if images is None or texts is None or len(images) != len(texts):
        counts = [None if column is None else len(column) for column in (images, texts)]
        raise DataError(
            f"{where}: {counts[0]} images and {counts[1]} texts; the lists must be parallel", fix="repair the row"
        )
    parts: list[str | Reference] = []
    repaired: list[str] = []
    for number, (url, text) in enumerate(zip(images, texts, strict=True)):
        if url is not None and text is not None:
            raise DataError(
                f"{where}, place {number}: both an image ({url[:80]}) and a text ({text[:40]!r})",
                fix="set exactly one of them",
            )
        if url is not None:
            parts.append(Reference(url, url))
        elif text is not None:
            parts.append(text)
        else:
            repaired.append(NEITHER)
    return parts, tuple(repaired)


def _documents(parts: list[str | Reference], *, split: bool) -> list[list[str | Reference]]:
    """Cut at the end marks, or take them out; parts between two marks with nothing in them are no document."""
    documents: list[list[str | Reference]] = [[]]
    for part in parts:
        if isinstance(part, Reference) or END_MARK not in part:
            documents[-1].append(part)
            continue
        pieces = [piece.strip() for piece in part.split(END_MARK)]
        if not split:
            documents[-1].append("\n\n".join(piece for piece in pieces if piece))
            continue
        documents[-1].append(pieces[0])
        documents += [[piece] for piece in pieces[1:]]
    filled = [document for document in documents if any(not isinstance(p, str) or p.strip() for p in document)]
    return filled or [[]]
