"""Samples: one document of a source, tokenised, with references to its images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mm15_megatron.data.indexed.reader import IndexedSource
from mm15_megatron.errors import DataError


@dataclass(frozen=True)
class ImageRef:
    """Where an image's encoded bytes are, and its size in pixels after EXIF orientation.

    Attributes:
        source: index of the source in the mixture.
        item: index of the image inside the source.
        height: pixels.
        width: pixels.
    """

    source: int
    item: int
    height: int
    width: int


@dataclass(frozen=True)
class Sample:
    """One document as the packer sees it.

    Attributes:
        tokens: int64 [n], one image sentinel where each image stands.
        loss_mask: bool [n], True where the token is a target.
        images: one reference for each sentinel, in order.
        source: name of the source, for the ledger and for errors.
        document: index of the document inside the source.
    """

    tokens: npt.NDArray[np.int64]
    loss_mask: npt.NDArray[np.bool_]
    images: tuple[ImageRef, ...] = ()
    source: str = ""
    document: int = 0


def read_sample(source: IndexedSource, document: int, *, source_index: int = 0) -> Sample:
    """Read one document of a source; image bytes are not touched.

    Raises:
        DataError: if its sentinels and images disagree in number.
    """
    tokens = source.tokens(document)
    first, stop = int(source.image_index[document]), int(source.image_index[document + 1])
    images = tuple(
        ImageRef(source_index, item, int(source.image_sizes[item, 0]), int(source.image_sizes[item, 1]))
        for item in range(first, stop)
    )
    check_counts(tokens, len(images), sentinel=source.manifest.image_sentinel_id, source=source.name, document=document)
    return Sample(tokens, source.loss_mask(document), images, source.name, document)


def check_counts(tokens: npt.NDArray[np.int64], images: int, *, sentinel: int, source: str, document: int) -> None:
    """Check that a document has one image for each sentinel.

    Raises:
        DataError: naming the source, the document and both counts.
    """
    found = int(np.count_nonzero(tokens == sentinel))
    if found != images:
        raise DataError(
            f"document {document} of source {source!r} has {found} image placeholders and {images} images",
            fix="build the dataset again: the token and image files do not belong together",
        )
