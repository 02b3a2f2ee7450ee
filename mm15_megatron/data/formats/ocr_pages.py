"""Pages of scanned or rendered documents: their text from the annotation, the encoding of their images, records."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from PIL import Image

from mm15_megatron.data.formats.base import Found, Interleaved, Skipped, Unit
from mm15_megatron.data.formats.fields import check_choice, fault_of
from mm15_megatron.data.formats.tar_samples import TOO_LARGE, Sample, TarCut, samples
from mm15_megatron.errors import DataError

DIRECT_MODES: Final = ("1", "L", "LA", "P", "RGB", "RGBA")
"""Modes of Pillow that a PNG keeps as they are."""


@dataclass(frozen=True)
class ImageEncoding:
    """How a page that has no encoded bytes of its own is stored.

    Attributes:
        form: ``png`` (lossless) or ``jpeg``.
        jpeg_quality: 1 to 100, of ``jpeg`` alone.
    """

    form: str = "png"
    jpeg_quality: int = 90

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            DataError: an unknown form or an impossible quality.
        """
        check_choice("form", self.form, ("png", "jpeg"))
        if not 1 <= self.jpeg_quality <= 100:
            raise DataError(f"jpeg_quality is {self.jpeg_quality}", fix="use 1 to 100")

    def encode(self, image: Image.Image) -> bytes:
        """Return the bytes of an image file; a mode that the form cannot hold becomes RGB first."""
        stream = io.BytesIO()
        if self.form == "jpeg":
            image = image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")
            image.save(stream, "JPEG", quality=self.jpeg_quality)
        else:
            image = image if image.mode in DIRECT_MODES else image.convert("RGB")
            image.save(stream, "PNG")
        return stream.getvalue()


@dataclass(frozen=True)
class Paging:
    """How a document becomes records.

    Attributes:
        per: ``page`` makes every page with text a record; ``document`` makes one record of them all.
        max_pages: pages of a document that are used, from the first one on; the others are counted as left out.
    """

    per: str = "page"
    max_pages: int = 100

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            DataError: an unknown ``per`` or no pages at all.
        """
        check_choice("per", self.per, ("page", "document"))
        if self.max_pages < 1:
            raise DataError(f"max_pages is {self.max_pages}", fix="use 1 or more")


Page = tuple[bytes, str] | str
"""A page: (encoded image, text), or the reason why it is left out."""


def text_fault(text: str, *, number: int, paging: Paging) -> str | None:
    """Return why page ``number`` is left out before its image is looked at, or None."""
    return "page beyond max_pages" if number >= paging.max_pages else fault_of(text, noun="text")


def page_records(pages: Iterator[Page], *, paging: Paging, where: str) -> Iterator[Found | Skipped]:
    """Turn the pages of one document into records: each page's image, then its text.

    One page is held at a time, or, for records per document, at most ``max_pages`` encoded ones. A document none of
    whose pages can be used is left out for the reason of its first page.
    """
    if paging.per == "page":
        for number, page in enumerate(pages):
            at = f"{where}#{number}"
            yield Skipped(page, at) if isinstance(page, str) else Found(Interleaved(page), at)
        return
    parts: list[str | bytes] = []
    reasons: list[str] = []
    for page in pages:
        if isinstance(page, str):
            reasons.append(page)
        else:
            parts += page
    if parts:
        yield Found(Interleaved(tuple(parts)), where, tuple(reasons))
    else:
        yield Skipped(reasons[0] if reasons else "document without pages", where)


def documents(unit: Unit, *, suffixes: tuple[str, ...], largest: int) -> Iterator[Sample | Skipped]:
    """Yield the samples of an archive; a member of at most ``largest`` bytes is held whole, one sample at a time.

    Raises:
        DataError: it is not a tar, is broken or cut off.
    """
    try:
        for sample in samples(unit.path, wanted=lambda suffix: suffix in suffixes, largest=largest):
            yield Skipped(TOO_LARGE, f"{unit.path.name}:{sample.key}") if sample.too_large else sample
    except TarCut as cut:
        raise cut.error(unit.path) from cut


@dataclass(frozen=True)
class Annotated:
    """A document of an archive: its bytes, the text of each page, and where it stands."""

    data: bytes
    texts: list[str]
    where: str


def annotated(unit: Unit, *, suffix: str, largest: int) -> Iterator[Annotated | Skipped]:
    """Yield the documents of an archive that have a file ``<key>.<suffix>`` and an annotation ``<key>.json``.

    Raises:
        DataError: the archive is broken, or an annotation has another structure.
    """
    for sample in documents(unit, suffixes=(suffix, "json"), largest=largest):
        if isinstance(sample, Skipped):
            yield sample
            continue
        where, files = f"{unit.path.name}:{sample.key}", sample.files
        missing = [name for name in ("json", suffix) if name not in files]
        if missing:
            yield Skipped(f"no {missing[0]}", where)
        else:
            yield Annotated(files[suffix], page_texts(files["json"], where=f"{unit.path}:{sample.key}"), where)


def parse_json(data: bytes, *, where: str) -> dict[str, Any]:
    """Return the object in a JSON member.

    Raises:
        DataError: it is not JSON, or no object.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}.json: {error}", fix="this is not the published format: check the archive") from error
    if not isinstance(value, dict):
        raise DataError(
            f"{where}.json holds a {type(value).__name__}, expected an object",
            fix="this is not the published format: check the archive",
        )
    return value


def page_texts(data: bytes, *, where: str) -> list[str]:
    r"""Return the text of every page of an annotation, its lines joined by ``\n``; empty where a page has none.

    A page holds columns: ``text`` and ``bbox`` (and ``score``, ``poly``) of its lines in reading order, under the key
    ``lines`` beside a second set ``words``, or, as in IDL, at the page itself. Without lines, the words are joined by
    single spaces. Boxes (x, y, width, height, as parts of the page) are not used.

    Raises:
        DataError: the annotation has another structure.
    """
    pages = parse_json(data, where=where).get("pages")
    if not isinstance(pages, list):
        raise _schema(where, f"'pages' is a {type(pages).__name__}, expected a list")
    return [_page_text(page, where=f"{where}.json, page {number}") for number, page in enumerate(pages)]


def _page_text(page: Any, *, where: str) -> str:
    if not isinstance(page, dict):
        raise _schema(where, f"a page is a {type(page).__name__}, expected an object")
    for key, joint in (("lines", "\n"), ("text", "\n"), ("words", " ")):
        if key in page:
            texts = page[key] if key == "text" else page[key].get("text") if isinstance(page[key], dict) else None
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise _schema(where, f"'{key}' holds no list of texts")
            return joined(texts, joint)
    raise _schema(where, f"a page has the fields {sorted(page)}, expected lines, text or words")


def joined(texts: list[str], joint: str) -> str:
    """Join texts without the spaces around them; what is empty is passed over."""
    return joint.join(text for text in map(str.strip, texts) if text)


def _schema(where: str, found: str) -> DataError:
    return DataError(f"{where}: {found}", fix="this is not the published format: check the archive")
