"""PDFA: documents from Common Crawl as PDF with the words and lines that stand in them.

Read from: the dataset card and the column types of ``pixparse/pdfa-eng-wds`` (the types as its subset
``vikp/pdf_bench`` lists them) and its loader, ``huggingface/chug`` (``doc_read_processor.py``). An archive holds
``<key>.pdf`` and ``<key>.json``::

    {"pages": [{"lines": {"text": [...], "bbox": [[x, y, w, h], ...], "score": [...], "word_slice": [[a, b], ...]},
                "words": {"text": [...], "bbox": [...], "score": [...], "line_pos": [[a, b], ...]},
                "images_bbox": [...], "images_bbox_no_text_overlap": [...]}]}

Columns, not a list of words; boxes are parts of the page, from its top left. The lines stand in reading order.
Not confirmed: what the two numbers of ``line_pos`` mean (not used), and how often a PDF has more pages than its
annotation (such documents are left out and counted). What MM1.5 rendered, and its text format, are unpublished: the
resolution is that of chug, the text is the plain lines.

Pages are rendered with PDFium, which must not be called from two threads of one process, has no time limit, and may end
the process on a hostile file: ``preprocess/workers.py`` says what becomes of that. Filled-in form fields are not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import pypdfium2
import pypdfium2.raw

from mm15_megatron.data.formats.base import Found, Item, Pending, Skipped, Unit, input_files
from mm15_megatron.data.formats.ocr_pages import (
    ImageEncoding,
    Page,
    Paging,
    annotated,
    page_records,
    text_fault,
)
from mm15_megatron.data.formats.tar_samples import check_limit
from mm15_megatron.errors import DataError

POINTS_PER_INCH: Final = 72
_ENCRYPTED: Final = (pypdfium2.raw.FPDF_ERR_PASSWORD, pypdfium2.raw.FPDF_ERR_SECURITY)


@dataclass(frozen=True)
class Pdfa:
    """Reader of PDFA archives.

    Attributes:
        paths: archives, or folders of them.
        paging: a record a page or a document, and how many pages.
        dpi: resolution at which pages are rendered.
        max_page_pixels: a page that would have more pixels is rendered at the resolution at which it has not.
        encoding: how a rendered page is stored.
        max_member_bytes: a document with a larger file is left out and counted.
    """

    paths: tuple[Path, ...]
    paging: Paging = Paging()
    dpi: int = 150
    max_page_pixels: int = 16_000_000
    encoding: ImageEncoding = ImageEncoding()
    max_member_bytes: int = 2**30

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            DataError: an impossible resolution, number of pixels or limit.
        """
        if not 1 <= self.dpi <= 2400:
            raise DataError(f"dpi is {self.dpi}", fix="use 1 to 2400; 150 is usual")
        if self.max_page_pixels < 1:
            raise DataError(f"max_page_pixels is {self.max_page_pixels}", fix="use 1 or more")
        check_limit(self.max_member_bytes)

    @property
    def kind(self) -> str:
        """Kind of dataset that the records make."""
        return "interleaved"

    def units(self) -> tuple[Unit, ...]:
        """Return one unit an archive.

        Raises:
            DataError: there is no archive.
        """
        return tuple(Unit(path) for path in input_files(self.paths, endings=(".tar",)))

    def read(self, unit: Unit) -> Iterator[Item]:
        """Read the documents of an archive in order.

        Raises:
            DataError: the archive is broken, or an annotation has another structure.
        """
        for found in annotated(unit, suffix="pdf", largest=self.max_member_bytes):
            if isinstance(found, Skipped):
                yield found
            else:
                yield Pending(found.where, partial(self._document, found.data, found.texts, where=found.where))

    def _document(self, data: bytes, texts: list[str], *, where: str) -> Iterator[Found | Skipped]:
        try:
            document = pypdfium2.PdfDocument(data)
        except pypdfium2.PdfiumError as error:
            yield Skipped("encrypted pdf" if error.err_code in _ENCRYPTED else "broken pdf", where)
            return
        try:
            if len(document) != len(texts):
                yield Skipped("page counts of pdf and json differ", where)
            else:
                yield from page_records(self._pages(document, texts), paging=self.paging, where=where)
        finally:
            document.close()

    def _pages(self, document: Any, texts: list[str]) -> Iterator[Page]:
        for number, text in enumerate(texts):
            fault = text_fault(text, number=number, paging=self.paging)
            if fault is not None:
                yield fault
            else:
                image = self._render(document, number)
                yield "broken page" if image is None else (image, text)

    def _render(self, document: Any, number: int) -> bytes | None:
        try:
            page = document[number]
            try:
                scale = render_scale(*page.get_size(), dpi=self.dpi, max_pixels=self.max_page_pixels)
                if scale is None:
                    return None
                bitmap = page.render(scale=scale)
                try:
                    return self.encoding.encode(bitmap.to_pil())
                finally:
                    bitmap.close()
            finally:
                page.close()
        except pypdfium2.PdfiumError:
            return None


def render_scale(width: float, height: float, *, dpi: int, max_pixels: int) -> float | None:
    """Return the pixels per point at which a page of this size (points) is rendered.

    Example: 612 x 792 points at 150 dpi give 150 / 72 = 2.083, an image of 1275 x 1650.

    Returns:
        ``dpi / 72``, or less so that the image (sides rounded up) has at most ``max_pixels``; None = no size to render.
    """
    if not (math.isfinite(width) and math.isfinite(height) and width > 0 and height > 0):
        return None
    scale = min(dpi / POINTS_PER_INCH, math.sqrt(max_pixels / (width * height)), max_pixels / max(width, height))
    while math.ceil(width * scale) * math.ceil(height * scale) > max_pixels:
        scale *= 0.995
        if max(width, height) * scale < 1:
            return None
    return scale
