"""Encoded images by Pillow and numpy alone: magic bytes, size by the header, pixels, and the check before storing.

Without torch, so that the processes that prepare datasets start fast and stay small.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, TiffImagePlugin

from mm15_megatron.data.image.containers import container_problem, png_lacks_rows
from mm15_megatron.data.indexed.writer import EncodedImage
from mm15_megatron.errors import DataError

Bytes = npt.NDArray[np.uint8]

_MAGIC: Final = (
    (b"\xff\xd8\xff", "jpeg"), (b"\x89PNG\r\n\x1a\n", "png"), (b"BM", "bmp"),
    (b"II*\x00", "tiff"), (b"MM\x00*", "tiff"),
)  # fmt: skip
# Refused by name: a corrupt JPEG 2000 ends the process inside the native decoder, which reads no GIF.
_REFUSED: Final = (
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"), (b"\xff\x4f\xff\x51", "JPEG 2000"), (b"GIF8", "GIF"),
)  # fmt: skip
_FORMATS: Final = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
_FAILURES: Final = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, MemoryError, ArithmeticError, LookupError,
    TypeError, AttributeError, RuntimeError, AssertionError, Image.DecompressionBombError,
)  # fmt: skip
_TRANSPOSED: Final = (5, 6, 7, 8)
_ORIENTATION_TAG: Final = 0x0112
_TILE_TAGS: Final = (322, 323)
_LARGE_TILE: Final = 2**22  # pixels: writers use up to 1024 x 1024; a decoder allocates what the tags state


class DecodeFailure(Exception):
    """A codec could not read an image; the message is the reason. It never leaves this package."""


def sniff(data: Bytes | bytes) -> str:
    """Return jpeg, png, bmp, tiff or webp by the first bytes.

    Raises:
        DecodeFailure: for any other content, naming it where it is known.
    """
    head = bytes(data[:16])
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    for magic, name in _REFUSED:
        if head.startswith(magic):
            raise DecodeFailure(f"{name} is refused: tools/preprocess_*.py store it as PNG, without loss")
    raise DecodeFailure("no bytes" if not head else f"not an allowed image format (starts with {head[:8]!r})")


def check_container(data: Bytes, *, max_pixels: int) -> str:
    """Return what :func:`sniff` says, of an image whose container does not lie about its own structure.

    Args:
        data: encoded bytes.
        max_pixels: the largest image that may be decoded.

    Raises:
        DecodeFailure: with the reason.
    """
    kind = sniff(data)
    if problem := container_problem(kind, data.tobytes(), max_pixels=max_pixels):
        raise DecodeFailure(f"header: {problem}")
    return kind


def peek(data: Bytes) -> tuple[int, int]:
    """Return (height, width) after EXIF orientation, from the header alone.

    Raises:
        DecodeFailure: with the reason.
    """
    try:
        image = _open(data)
        width, height = image.size
        # Pillow decodes a whole PNG to look for EXIF behind the pixels: ask only when it stands before them.
        exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
        # Of a TIFF Pillow states the upright size already.
        turned = exif.get(_ORIENTATION_TAG) in _TRANSPOSED and image.format != "TIFF"
        tile = _tile_pixels(image)
    except _FAILURES as error:
        raise DecodeFailure(f"header: {error}") from error
    if image.mode == "F":
        raise DecodeFailure("floating-point pixels have no defined range")
    if tile > max(_LARGE_TILE, width * height):
        raise DecodeFailure(f"header: tiles of {tile} pixels in an image of {height}x{width}")
    return (width, height) if turned else (height, width)


def pixels_of(data: Bytes) -> npt.NDArray[np.uint8]:
    """Return upright pixels, uint8 [H, W, 3]; 16-bit gray is scaled to 8 bits, alpha is dropped.

    Raises:
        DecodeFailure: with the reason.
    """
    try:
        image = _open(data)
        image.load()
        # Pillow takes a PNG stream that ends early for complete; the rows it lacks are zeros.
        if image.format == "PNG" and _ends_in_zeros(image) and png_lacks_rows(data.tobytes()):
            raise DecodeFailure("body: the pixels end before the last row")
        return _rgb(image)
    except _FAILURES as error:
        raise DecodeFailure(f"body: {error}") from error


def _open(data: Bytes) -> Image.Image:
    with warnings.catch_warnings():
        # The pixel cap of ImageDecoder decides, before anything is decoded.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data.tobytes()), formats=_FORMATS)


def _tile_pixels(image: Image.Image) -> int:
    """Pixels of a tile of a TIFF, by its tags."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 0
    width, height = (int(image.tag_v2.get(tag, 0)) for tag in _TILE_TAGS)
    return width * height


def _ends_in_zeros(image: Image.Image) -> bool:
    """Whether one of the last two rows is zero throughout (in an interlaced picture they come from several passes)."""
    rows = np.asarray(image.crop((0, max(0, image.height - 2), *image.size)))
    return not rows.reshape(len(rows), -1).any(axis=1).all()


def _rgb(image: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # convert() would clip 16-bit values instead of scaling them
        wide = np.asarray(upright).astype(np.uint32)
        gray = ((wide * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    return np.array(upright.convert("RGB"))


def check_image(data: bytes, *, max_pixels: int, decode: bool = True) -> EncodedImage:
    """Check encoded bytes before they are stored, and measure them.

    Args:
        data: encoded bytes.
        max_pixels: the largest image accepted.
        decode: decode the body too; False checks magic bytes and header alone.

    Raises:
        DataError: if the bytes are not an image this project can train on, with the reason.
    """
    blob = np.frombuffer(data, dtype=np.uint8)
    try:
        check_container(blob, max_pixels=max_pixels)
        height, width = peek(blob)
        if height * width > max_pixels:
            raise DecodeFailure(f"{height}x{width} pixels, the limit is {max_pixels}")
        if decode and (found := pixels_of(blob).shape) != (height, width, 3):
            raise DecodeFailure(f"decodes to {found}, the header says {height}x{width}")
    except DecodeFailure as failure:
        raise DataError(
            f"an image cannot be used: {failure}", fix="repair or remove it, or pass on_bad_image='drop'"
        ) from failure
    return EncodedImage(data, height, width)
