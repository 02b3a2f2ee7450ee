"""Images in formats that no loader reads become PNG, without loss, when a dataset is built.

GIF and AVIF are decoded here by Pillow. JPEG 2000 is decoded by Pillow too, but in a process of its own with limits of
time and memory: a broken one has ended processes inside its native decoder, and that shall cost the image, not the
worker. It happens once, when the dataset is built, and not at each epoch beside DALI: training meets PNG alone.
"""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from PIL import Image

from mm15_megatron.errors import DataError

_ISO_BRANDS: Final = (b"avif", b"avis")
_JPEG_2000: Final = (b"\x00\x00\x00\x0cjP  ", b"\xff\x4f\xff\x51")  # the file format, the bare codestream
_FAILURES: Final = (OSError, SyntaxError, ValueError, EOFError, MemoryError, RuntimeError, Image.DecompressionBombError)
_PROGRAM: Final = Path(__file__).with_name("decode_jpeg2000.py")
_SECONDS: Final = 120.0  # of patience with one JPEG 2000: sixty megapixels of a photo took 15 on a busy core


def foreign_format(data: bytes) -> str | None:
    """Return GIF, AVIF or JPEG 2000 if the first bytes say so, None for everything else."""
    if data[:4] == b"GIF8":
        return "GIF"
    if data.startswith(_JPEG_2000):
        return "JPEG 2000"
    return "AVIF" if data[4:8] == b"ftyp" and data[8:12] in _ISO_BRANDS else None


def transcoded(data: bytes, *, max_pixels: int, seconds: float = _SECONDS) -> tuple[bytes, str | None]:
    """Return bytes that can be stored, and the name of the format that they came from if they were rewritten.

    An animation becomes its first frame. Transparency stays in the PNG; decoders drop it. Gray of more than 8 bits
    keeps 16; colours of more than 8 bits a channel keep 8, as every decoder of the loader has it.

    Args:
        data: encoded bytes of any format.
        max_pixels: the largest image that is decoded.
        seconds: how long a JPEG 2000 may take.

    Raises:
        DataError: a GIF, AVIF or JPEG 2000 that is broken, too large, too slow, or deadly to its decoder.
    """
    name = foreign_format(data)
    if name is None:
        return data, None
    if name == "JPEG 2000":
        # -P: the folder of the program is no place to import from
        command = [sys.executable, "-P", str(_PROGRAM), str(max_pixels)]
        return png_by(command, data, name=name, seconds=seconds), name
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


def png_by(command: Sequence[str], data: bytes, *, name: str, seconds: float) -> bytes:
    """Return what a program makes of ``data``.

    Args:
        command: program and arguments; it reads ``data`` from standard input and writes a PNG.
        data: encoded bytes.
        name: of their format, for the message.
        seconds: after which the program is killed.

    Raises:
        DataError: if the program is too slow, is ended by a signal or says why it has no picture.
    """
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise DataError(f"a {name} is not decoded after {seconds} s", fix="shrink or remove it") from error
    if done.returncode == 0:
        return done.stdout
    if done.returncode < 0:
        raise DataError(f"a {name} ends its decoder with signal {-done.returncode}", fix="repair or remove it")
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    reason = lines[-1] if lines else f"exit code {done.returncode}"
    raise DataError(f"a {name} cannot be decoded: {reason}", fix="repair, shrink or remove it")
