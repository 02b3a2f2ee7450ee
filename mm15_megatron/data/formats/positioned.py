"""Positioned JSON lines: our own simple form of interleaved documents, for data that has no published form.

A line is ``{"text": "first <image> then <image>", "images": ["a.jpg", "b.jpg"]}``, one placeholder an image, or
``{"parts": [{"type": "text", "text": "first"}, {"type": "image", "path": "a.jpg"}]}``. White space beside a placeholder
does not count: every piece of text is a paragraph. Other fields are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm15_megatron.data.formats.base import UNIT_BYTES, Found, Skipped, Unit, input_files, json_lines, line_units
from mm15_megatron.data.formats.image_store import ImageSource
from mm15_megatron.data.formats.interleaved_filters import InterleavedFilters
from mm15_megatron.data.formats.interleaving import Assembly, Reference
from mm15_megatron.errors import DataError

_URL_STARTS = ("http://", "https://")


@dataclass(frozen=True)
class Positioned:
    """A reader of positioned JSON lines.

    Args:
        paths: .jsonl files, or folders of them.
        images: where the images are: an ``ImageFolder``, or a ``UrlStore`` if the lines hold URLs.
        placeholder: what stands for an image in ``text``; a document of parts may hold it as plain text.
        on_missing: drop-image | drop-document.
        filters: filters of images and documents; None = none. The one of URLs sees those that begin with http.
        unit_bytes: about the size of a unit.

    Raises:
        DataError: for another value of an option.
    """

    paths: tuple[Path, ...]
    images: ImageSource
    placeholder: str = "<image>"
    on_missing: str = "drop-document"
    filters: InterleavedFilters | None = None
    unit_bytes: int = UNIT_BYTES

    def __post_init__(self) -> None:
        if not self.placeholder.strip():
            raise DataError(f"placeholder is {self.placeholder!r}", fix="give it a text")
        if self.unit_bytes < 1:
            raise DataError(f"unit_bytes is {self.unit_bytes}", fix="give a positive number")
        self._assembly()  # checks on_missing

    def _assembly(self) -> Assembly:
        return Assembly(self.images, self.on_missing, self.filters)

    @property
    def kind(self) -> str:
        """Interleaved documents."""
        return "interleaved"

    def units(self) -> tuple[Unit, ...]:
        """Cut the files at bytes.

        Raises:
            DataError: there is no such file.
        """
        return line_units(input_files(self.paths, endings=(".jsonl",)), size=self.unit_bytes)

    def read(self, unit: Unit) -> Iterator[Found | Skipped]:
        """Read the documents of a unit.

        Raises:
            DataError: a line is malformed, has not as many placeholders as images, or names a file outside the folder.
        """
        assembly = self._assembly()
        for where, row in json_lines(unit):
            place = f"{unit.path} at {where}"
            if ("text" in row) == ("parts" in row):
                raise DataError(f"{place} has the fields {sorted(row)}", fix="give either text (and images) or parts")
            parts = _listed(row, place=place) if "parts" in row else self._placed(row, place=place)
            yield assembly.assemble(parts, where=where)

    def _placed(self, row: dict[str, Any], *, place: str) -> list[str | Reference]:
        text, names = row["text"], row.get("images", [])
        if not isinstance(text, str) or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise DataError(f"{place}: text is not a text, or images not a list of texts", fix="repair the line")
        pieces = text.split(self.placeholder)
        if len(pieces) - 1 != len(names):
            raise DataError(
                f"{place}: {len(pieces) - 1} placeholders {self.placeholder!r} and {len(names)} images",
                fix="give one placeholder an image, or parts",
            )
        parts: list[str | Reference] = [pieces[0].strip()]
        for name, piece in zip(names, pieces[1:], strict=True):
            parts += [_reference(name), piece.strip()]
        return parts


def _listed(row: dict[str, Any], *, place: str) -> list[str | Reference]:
    if not isinstance(row["parts"], list):
        raise DataError(f"{place}: parts is a {type(row['parts']).__name__}", fix="give a list")
    parts: list[str | Reference] = []
    for number, part in enumerate(row["parts"]):
        kind = part.get("type") if isinstance(part, dict) else None
        value = part.get({"text": "text", "image": "path"}.get(str(kind), "")) if isinstance(part, dict) else None
        if not isinstance(value, str):
            raise DataError(
                f"{place}: part {number} is {str(part)[:80]}",
                fix='write {"type": "text", "text": ...} or {"type": "image", "path": ...}',
            )
        parts.append(value if kind == "text" else _reference(value))
    return parts


def _reference(name: str) -> Reference:
    return Reference(name, name if name.lower().startswith(_URL_STARTS) else "")
