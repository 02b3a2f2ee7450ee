"""Samples: a document of a source or a piece of one, tokenised, with references to its images."""

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


@dataclass(frozen=True, order=True)
class SampleRef:
    """Which tokens of which document a sample is.

    Attributes:
        source: index of the source in the mixture.
        document: index of the document inside the source.
        first: first stored token.
        stop: one past the last stored token.
    """

    source: int
    document: int
    first: int
    stop: int


@dataclass(frozen=True)
class Sample:
    """One document, or a piece of it, as the row shows it.

    Attributes:
        tokens: int64 [n], one image sentinel where each image stands.
        loss_mask: bool [n], True where the token is a target.
        images: one reference for each sentinel, in order.
        source: name of the source, for errors.
        source_index: its index in the mixture, for the ledger.
        document: index of the document inside the source.
        first_image: number, inside the document, of the first of ``images``.
        images_in_document: images of the whole document, which decide whether they are split.
    """

    tokens: npt.NDArray[np.int64]
    loss_mask: npt.NDArray[np.bool_]
    images: tuple[ImageRef, ...]
    source: str
    source_index: int
    document: int
    first_image: int
    images_in_document: int

    @classmethod
    def whole(
        cls,
        tokens: npt.NDArray[np.int64],
        loss_mask: npt.NDArray[np.bool_],
        images: tuple[ImageRef, ...] = (),
        *,
        source: str = "",
        document: int = 0,
    ) -> Sample:
        """Return a sample that is a whole document."""
        return cls(tokens, loss_mask, images, source, 0, document, 0, len(images))


def read_sample(source: IndexedSource, ref: SampleRef) -> Sample:
    """Read one sample of a source; image bytes are not touched.

    Raises:
        DataError: if its sentinels are not where the index says.
    """
    document = ref.document
    tokens = source.tokens(document)[ref.first : ref.stop]
    begin, end = int(source.image_index[document]), int(source.image_index[document + 1])
    positions = source.image_positions[begin:end]
    first, stop = (int(at) for at in np.searchsorted(positions, (ref.first, ref.stop)))
    sentinels = np.flatnonzero(tokens == source.manifest.image_sentinel_id)
    if not np.array_equal(sentinels, positions[first:stop] - ref.first):
        raise DataError(
            f"document {document} of source {source.name!r} has image placeholders at "
            f"{(sentinels + ref.first).tolist()}, its index says {positions[first:stop].tolist()}",
            fix="build the dataset again: the token and image files do not belong together",
        )
    images = tuple(
        ImageRef(ref.source, item, int(source.image_sizes[item, 0]), int(source.image_sizes[item, 1]))
        for item in range(begin + first, begin + stop)
    )
    mask = source.loss_mask(document)[ref.first : ref.stop]
    return Sample(tokens, mask, images, source.name, ref.source, document, first, end - begin)
