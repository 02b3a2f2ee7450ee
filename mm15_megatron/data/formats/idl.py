"""IDL: scanned papers of the Industry Documents Library as multi-page TIFF with the lines that Textract read.

Read from: the dataset card of ``pixparse/idl-wds`` (fields ``tif``, ``pdf``, ``json``, ``ocr``; up to 3,000 pages a
document) and its loaders: ``huggingface/chug`` (``doc_read_processor.py``) reads a page's lines from the page itself or
from its key ``lines``, public training code on it says that this dataset has no key ``lines``. ``<key>.json``::

    {"pages": [{"text": ["line", ...], "bbox": [[x, y, w, h], ...], "poly": [...], "score": [...]}]}

Not confirmed: ``poly`` and ``score`` (not used). ``pdf`` (the same pages) and ``ocr`` (the older OCR) are not read.
Pixels that are not square (fax resolutions) are kept as they are.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

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

# what Pillow raises for damaged TIFF data, in its header or in a frame
_DAMAGED = (
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    RuntimeError,
)


@dataclass(frozen=True)
class Idl:
    """Reader of IDL archives.

    Attributes:
        paths: archives, or folders of them.
        paging: a record a page or a document, and how many pages.
        max_page_pixels: larger pages are left out and counted.
        encoding: how a frame is stored; PNG keeps a bilevel one bilevel.
        max_member_bytes: a document with a larger file is left out and counted.
    """

    paths: tuple[Path, ...]
    paging: Paging = Paging()
    max_page_pixels: int = 64_000_000
    encoding: ImageEncoding = ImageEncoding()
    max_member_bytes: int = 2**30

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            DataError: an impossible number of pixels, or limit.
        """
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
        for found in annotated(unit, suffix="tif", largest=self.max_member_bytes):
            if isinstance(found, Skipped):
                yield found
            else:
                yield Pending(found.where, partial(self._document, found.data, found.texts, where=found.where))

    def _document(self, scan: bytes, texts: list[str], *, where: str) -> Iterator[Found | Skipped]:
        try:
            image = TiffImageFile(io.BytesIO(scan))
            frames = image.n_frames
        except _DAMAGED:
            yield Skipped("broken tif", where)
            return
        with image:
            if frames != len(texts):
                yield Skipped("page counts of tif and json differ", where)
            else:
                yield from page_records(self._pages(image, texts), paging=self.paging, where=where)

    def _pages(self, image: TiffImageFile, texts: list[str]) -> Iterator[Page]:
        for number, text in enumerate(texts):
            fault = text_fault(text, number=number, paging=self.paging)
            if fault is not None:
                yield fault
            else:
                frame = self._frame(image, number)
                yield frame if isinstance(frame, str) else (frame, text)

    def _frame(self, image: TiffImageFile, number: int) -> bytes | str:
        """Return the encoded frame, upright (Pillow turns it by its orientation tag), or why it is left out."""
        try:
            image.seek(number)
            if image.width * image.height > self.max_page_pixels:
                return "page too large"
            image.load()
            return self.encoding.encode(image.copy())  # a copy holds no header fields of the scan
        except _DAMAGED:
            return "broken page"
