"""The Pillow codec: the reference the DALI path is compared with, and the checker used when a dataset is built."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from PIL import Image, ImageOps

from mm15_megatron.data.image.decoder import Bytes, DecodeFailure, sniff
from mm15_megatron.data.indexed.writer import EncodedImage
from mm15_megatron.errors import DataError

_FORMATS: Final = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
_FAILURES: Final = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, MemoryError, ArithmeticError, LookupError,
    TypeError, AttributeError, RuntimeError, AssertionError, Image.DecompressionBombError,
)  # fmt: skip
_TRANSPOSED: Final = (5, 6, 7, 8)
_ORIENTATION_TAG: Final = 0x0112


class PilCodec:
    """Decode with Pillow; 16-bit gray is scaled to 8 bits, alpha is dropped."""

    def peek(self, data: Bytes) -> tuple[int, int]:
        """Return (height, width) after EXIF orientation, from the header alone."""
        try:
            image = _open(data)
            width, height = image.size
            # Pillow decodes a whole PNG to look for EXIF behind the pixels: ask only when it stands before them.
            exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
            turned = exif.get(_ORIENTATION_TAG) in _TRANSPOSED
        except _FAILURES as error:
            raise DecodeFailure(f"header: {error}") from error
        if image.mode == "F":
            raise DecodeFailure("floating-point pixels have no defined range")
        return (width, height) if turned else (height, width)

    def decode(self, batch: Sequence[Bytes]) -> list[torch.Tensor]:
        """Return one uint8 [H, W, 3] tensor an image."""
        try:
            return [torch.from_numpy(_rgb(_open(data))) for data in batch]
        except _FAILURES as error:
            raise DecodeFailure(f"body: {error}") from error


def _open(data: Bytes) -> Image.Image:
    with warnings.catch_warnings():
        # The pixel cap of ImageDecoder decides, before anything is decoded.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data.tobytes()), formats=_FORMATS)


def _rgb(image: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # convert() would clip 16-bit values instead of scaling them
        wide = np.asarray(upright).astype(np.uint32)
        gray = ((wide * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    return np.array(upright.convert("RGB"))


def build_codec(*, threads: int) -> PilCodec:
    """Return the codec; Pillow decodes in the calling thread, so ``threads`` above one has no meaning.

    Raises:
        DataError: if more than one thread is asked for.
    """
    if threads != 1:
        raise DataError(f"the Pillow decoder has one thread, not {threads}", fix="use data.num_workers instead")
    return PilCodec()


def check_image(data: bytes, *, max_pixels: int, decode: bool = True) -> EncodedImage:
    """Check encoded bytes before they are stored, and measure them.

    Args:
        data: encoded bytes.
        max_pixels: the largest image accepted.
        decode: decode the body too; False checks magic bytes and header alone.

    Raises:
        DataError: if the bytes are not an image this project can train on, with the reason.
    """
    blob, codec = np.frombuffer(data, dtype=np.uint8), PilCodec()
    try:
        sniff(blob)
        height, width = codec.peek(blob)
        if height * width > max_pixels:
            raise DecodeFailure(f"{height}x{width} pixels, the limit is {max_pixels}")
        if decode and (found := tuple(codec.decode([blob])[0].shape)) != (height, width, 3):
            raise DecodeFailure(f"decodes to {found}, the header says {height}x{width}")
    except DecodeFailure as failure:
        raise DataError(
            f"an image cannot be used: {failure}", fix="repair or remove it, or pass on_bad_image='drop'"
        ) from failure
    return EncodedImage(data, height, width)
