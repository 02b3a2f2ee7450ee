"""Images in formats that no loader reads become PNG, without loss, when a dataset is built."""

from __future__ import annotations

import io
import warnings
from typing import Final

from PIL import Image

from mm15_megatron.errors import DataError

_ISO_BRANDS: Final = (b"avif", b"avis")
_FAILURES: Final = (OSError, SyntaxError, ValueError, EOFError, MemoryError, RuntimeError, Image.DecompressionBombError)


def foreign_format(data: bytes) -> str | None:
    """Return GIF or AVIF if the first bytes say so, None for everything else."""
    if data[:4] == b"GIF8":
        return "GIF"
    return "AVIF" if data[4:8] == b"ftyp" and data[8:12] in _ISO_BRANDS else None


def transcoded(data: bytes, *, max_pixels: int) -> tuple[bytes, str | None]:
    """Return bytes that can be stored, and the name of the format that they came from if they were rewritten.

    An animation becomes its first frame. Transparency stays in the PNG; decoders drop it.

    Args:
        data: encoded bytes of any format.
        max_pixels: the largest image that is decoded.

    Raises:
        DataError: a GIF or AVIF that is broken or too large.
    """
    name = foreign_format(data)
    if name is None:
        return data, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=[name])
        if image.width * image.height > max_pixels:
            raise DataError(
                f"a {name} of {image.height}x{image.width} pixels, the limit is {max_pixels}",
                fix="shrink it, or raise max_image_pixels",
            )
        image.seek(0)
        opaque = "transparency" not in image.info and image.mode not in ("RGBA", "LA", "PA")
        png = io.BytesIO()
        image.convert("RGB" if opaque else "RGBA").save(png, format="PNG")
    except _FAILURES as error:
        raise DataError(f"a {name} cannot be decoded: {error}", fix="repair or remove it") from error
    return png.getvalue(), name
