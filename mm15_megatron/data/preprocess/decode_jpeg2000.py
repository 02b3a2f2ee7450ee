"""A program: one JPEG 2000 on standard input becomes a PNG on standard output, or a reason on standard error.

It is a process of its own for each image, started by :mod:`~mm15_megatron.data.preprocess.transcode`, and imports
Pillow alone: it starts in 0.08 s, beside the 1.5 s that a page of 1700 x 2200 takes to decode and encode.
"""

from __future__ import annotations

import io
import resource
import sys
import warnings
from typing import Final

from PIL import Image

_AS_THEY_ARE: Final = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")  # modes that a PNG holds without change
_BASE_BYTES: Final = 2**30  # interpreter and libraries, in addresses
_BYTES_A_PIXEL: Final = 64  # sixty megapixels took 40 resident: OpenJPEG has 32 bits for each sample


def main(max_pixels: int) -> int:
    """Transcode; return the exit code.

    Args:
        max_pixels: the largest image that is decoded.
    """
    limit = _BASE_BYTES + _BYTES_A_PIXEL * max_pixels
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    try:
        Image.MAX_IMAGE_PIXELS = None  # the caller's limit decides
        image = Image.open(io.BytesIO(sys.stdin.buffer.read()), formats=["JPEG2000"])
        if image.width * image.height > max_pixels:
            sys.stderr.write(f"{image.height}x{image.width} pixels, the limit is {max_pixels}")
            return 1
        png = io.BytesIO()
        (image if image.mode in _AS_THEY_ARE else image.convert("RGB")).save(png, format="PNG")
    except Exception as error:  # noqa: BLE001 - whatever it is, the reason goes to the caller
        sys.stderr.write(f"{type(error).__name__}: {error}")
        return 1
    sys.stdout.buffer.write(png.getvalue())
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
