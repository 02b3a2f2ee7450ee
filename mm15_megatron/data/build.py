"""What every dataset builder shares: options, and the check of a document's images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from mm15_megatron import __version__
from mm15_megatron.data.image.pillow import check_image
from mm15_megatron.data.indexed.writer import EncodedImage
from mm15_megatron.errors import DataError

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildOptions:
    """How a dataset is built.

    Attributes:
        on_bad_image: ``raise`` stops at the first image that cannot be used; ``drop`` leaves its document out, logs the
            reason and counts it in the manifest.
        decode_images: decode every image once; False checks magic bytes and headers alone, about ten times faster.
        max_image_pixels: larger images cannot be used.
        overwrite: replace a finished dataset of the same prefix.
    """

    on_bad_image: str = "raise"
    decode_images: bool = True
    max_image_pixels: int = 64_000_000
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Check the choices.

        Raises:
            DataError: for an unknown ``on_bad_image``.
        """
        if self.on_bad_image not in ("raise", "drop"):
            raise DataError(f"on_bad_image is {self.on_bad_image!r}", fix="use raise or drop")


DEFAULT_OPTIONS: Final = BuildOptions()


def account(options: BuildOptions) -> dict[str, Any]:
    """Return what a manifest's ``meta`` says about how a dataset was built."""
    return {"program": f"mm15_megatron {__version__}", "options": asdict(options)}


def checked_images(images: Sequence[bytes], *, where: str, options: BuildOptions) -> list[EncodedImage] | None:
    """Check and measure the images of one document; None = leave the document out.

    Raises:
        DataError: naming the document, if an image cannot be used and ``on_bad_image`` is ``raise``.
    """
    try:
        return [check_image(data, max_pixels=options.max_image_pixels, decode=options.decode_images) for data in images]
    except DataError as error:
        if options.on_bad_image == "raise":
            raise DataError(f"{where}: {error.problem}", fix=error.fix) from error
        _LOGGER.warning("%s is left out: %s", where, error.problem)
        return None
