"""From a document that names its images to a record that holds them: the part that all interleaved formats share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import md5
from typing import Final

from mm15_megatron.data.formats.base import Found, Interleaved, Skipped
from mm15_megatron.data.formats.image_store import ImageSource
from mm15_megatron.data.formats.interleaved_filters import FEW_IMAGES, MANY_IMAGES, NO_FILTERS, InterleavedFilters
from mm15_megatron.errors import DataError

MISSING: Final = "image missing"
ALL_MISSING: Final = "every image missing"
EMPTY: Final = "empty document"
COPY: Final = "copy of an image of the document"
ON_MISSING: Final = ("drop-image", "drop-document")


@dataclass(frozen=True)
class Reference:
    """An image by name.

    Attributes:
        key: what the store of images knows it by.
        url: its address on the web, for the filters; empty if the format has none.
    """

    key: str
    url: str = ""


@dataclass(frozen=True)
class Assembly:
    """Where the images are, and what happens to those that are not there or not wanted.

    Args:
        images: the store.
        on_missing: drop-image | drop-document; either is counted. A document is left out if all its images are missing.
        filters: the filters; None = none.
        joint: what joins texts that come to stand side by side into one paragraph; None = they stay paragraphs.

    Raises:
        DataError: for another ``on_missing``.
    """

    images: ImageSource
    on_missing: str
    filters: InterleavedFilters | None
    joint: str | None = None

    def __post_init__(self) -> None:
        if self.on_missing not in ON_MISSING:
            raise DataError(f"on_missing is {self.on_missing!r}", fix=f"choose {' or '.join(ON_MISSING)}")

    def assemble(
        self, parts: Sequence[str | Reference], *, where: str, repaired: tuple[str, ...] = ()
    ) -> Found | Skipped:
        """Put the bytes in place; texts of white space alone are left out.

        Args:
            parts: the document.
            where: its place in the input.
            repaired: what its format had to repair already.

        Raises:
            DataError: if the store is damaged, or a name leaves its folder.
        """
        filters = self.filters if self.filters is not None else NO_FILTERS
        named = sum(isinstance(part, Reference) for part in parts)
        if filters.max_images is not None and named > filters.max_images:
            return Skipped(MANY_IMAGES, where)
        kept: list[str | bytes] = []
        notes = list(repaired)
        seen: set[str | bytes] = set()
        for part in parts:
            if isinstance(part, str):
                self._add_text(kept, part)
                continue
            found = self._fetch(part, filters=filters, seen=seen)
            if isinstance(found, bytes):
                kept.append(found)
            elif found == MISSING and self.on_missing == "drop-document":
                return Skipped(MISSING, where)
            else:
                notes.append(found)
        images = sum(isinstance(part, bytes) for part in kept)
        if named and notes.count(MISSING) == named:
            return Skipped(ALL_MISSING, where)
        if images < filters.min_images:
            return Skipped(FEW_IMAGES, where)
        return Found(Interleaved(tuple(kept)), where, tuple(notes)) if kept else Skipped(EMPTY, where)

    def _add_text(self, kept: list[str | bytes], text: str) -> None:
        if not text.strip():
            return
        if self.joint is not None and kept and isinstance(kept[-1], str):
            kept[-1] = f"{kept[-1]}{self.joint}{text}"
        else:
            kept.append(text)

    def _fetch(self, image: Reference, *, filters: InterleavedFilters, seen: set[str | bytes]) -> bytes | str:
        """Return the bytes, or why there are none."""
        if image.url and (reason := filters.refuse_url(image.url)):
            return reason
        if filters.first_copy_only and image.url in seen:
            return COPY
        data = self.images.get(image.key)
        if data is None:
            return MISSING
        if reason := filters.refuse_bytes(data):
            return reason
        if filters.first_copy_only:
            digest = md5(data, usedforsecurity=False).digest()
            if digest in seen:
                return COPY
            seen.update((digest, image.url) if image.url else (digest,))
        return data
