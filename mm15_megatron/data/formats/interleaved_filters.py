"""MM1's filters of interleaved documents, each with its own switch and its own counted reason.

MM1 (arXiv 2403.09611, appendix A.1) builds its interleaved web data much as OBELICS does. Its numbers are the defaults
here: documents with no image or more than 30 are left out; of the images those with corrupted bytes or header, an
aspect ratio below 1/2 or above 2, a side under 100 or over 10,000 pixels, a URL that contains logo, button, icon,
plugin or widget, those whose URL or MD5 occurs more than 10 times in the dataset, and within a page every copy but the
first. The appendix could not be read again: this list is from memory, a digit may be off, and each number is an option.

Ours, where it is not known what the appendix says: 30 is compared with the images that a document names, before any is
filtered, and "no image" with those that are left; the limits themselves are allowed; either side decides; the words are
looked for in the whole URL, in any case; a copy is one of equal URL or equal MD5; "corrupted" is what Pillow cannot
read of a header, without decoding (the body is checked where the dataset is written). What is not among MM1's filters
(text length, images a text, faces, NSFW) is not here.

OBELICS is already filtered harder in part (sides 150 to 20,000, the same aspect ratios): see its own paper.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Final

from PIL import Image

from mm15_megatron.data.formats.image_counts import FrequentImages
from mm15_megatron.errors import DataError

MANY_IMAGES: Final = "more images than max_images"
FEW_IMAGES: Final = "fewer images than min_images"
UNREADABLE: Final = "image header unreadable"
ASPECT: Final = "image aspect ratio"
SMALL: Final = "image side under min_side"
LARGE: Final = "image side over max_side"
URL_WORD: Final = "image URL contains a word of url_words"
FREQUENT: Final = "image too frequent in the dataset"

_FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
_FAILURES: Final = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, MemoryError, ArithmeticError, LookupError,
    TypeError, AttributeError, RuntimeError, AssertionError, Image.DecompressionBombError,
)  # fmt: skip


@dataclass(frozen=True)
class InterleavedFilters:
    """The filters; the defaults are MM1's numbers.

    Args:
        min_images: documents with fewer images, after all other filters, are left out; 0 = off.
        max_images: documents that name more images are left out; None = off.
        readable_header: leave out images whose header cannot be read.
        min_aspect: width / height, as stored; 0 = off.
        max_aspect: likewise; infinity = off.
        min_side: pixels; 0 = off.
        max_side: pixels; None = off.
        url_words: an image whose URL contains one of them is left out; () = off.
        first_copy_only: keep the first copy of an image within a document.
        frequent: the images that occur too often in the whole dataset, from
            :func:`~mm15_megatron.data.formats.image_counts.count_images`; None = off.

    Raises:
        DataError: for a limit that excludes everything.
    """

    min_images: int = 1
    max_images: int | None = 30
    readable_header: bool = True
    min_aspect: float = 0.5
    max_aspect: float = 2.0
    min_side: int = 100
    max_side: int | None = 10_000
    url_words: tuple[str, ...] = ("logo", "button", "icon", "plugin", "widget")
    first_copy_only: bool = True
    frequent: FrequentImages | None = None

    def __post_init__(self) -> None:
        pairs = (
            ("images", self.min_images, self.max_images),
            ("side", self.min_side, self.max_side),
            ("aspect", self.min_aspect, self.max_aspect),
        )
        for name, low, high in pairs:
            if low < 0 or (high is not None and not low <= high):  # also refuses nan
                raise DataError(f"min_{name} is {low}, max_{name} {high}", fix="give 0 <= minimum <= maximum")
        if not all(self.url_words):
            raise DataError(f"url_words {self.url_words} holds an empty word", fix="leave it out: it is in every URL")

    def refuse_url(self, url: str) -> str | None:
        """Return why an image of this URL is left out, or None."""
        lower = url.lower()
        return URL_WORD if any(word.lower() in lower for word in self.url_words) else None

    def refuse_bytes(self, data: bytes) -> str | None:
        """Return why an image of these bytes is left out, or None."""
        size = header_size(data)
        if size is None:
            return UNREADABLE if self.readable_header else self._refuse_frequent(data)
        width, height = size
        if not self.min_aspect <= width / height <= self.max_aspect:
            return ASPECT
        if min(size) < self.min_side:
            return SMALL
        if self.max_side is not None and max(size) > self.max_side:
            return LARGE
        return self._refuse_frequent(data)

    def _refuse_frequent(self, data: bytes) -> str | None:
        return FREQUENT if self.frequent is not None and self.frequent.contains(data) else None


NO_FILTERS: Final = InterleavedFilters(
    min_images=0, max_images=None, readable_header=False, min_aspect=0.0, max_aspect=math.inf, min_side=0,
    max_side=None, url_words=(), first_copy_only=False,
)  # fmt: skip
"""Every filter off."""


def header_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) as stored, in pixels, from the header alone; None if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is what is asked here
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                width, height = image.size
    except _FAILURES:
        return None
    return (width, height) if width > 0 and height > 0 else None
