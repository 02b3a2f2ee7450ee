"""Small videos whose frames are numbered: eight bars, white where the number has that bit."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

BITS = 8
HEIGHT, WIDTH = 48, 128


def write_video(
    path: Path,
    *,
    frames: int = 60,
    codec: str = "libx264",
    times_ms: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    rate: int = 25,
    bframes: int | None = None,
) -> Path:
    """A video with a keyframe at least every 12 frames; ``times_ms`` makes the frame rate variable."""
    base = Fraction(1, 1000) if times_ms else Fraction(1, rate)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height = WIDTH, HEIGHT
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = 12
        if bframes is not None:
            stream.codec_context.max_b_frames = bframes
        if times_ms:
            stream.codec_context.time_base = base
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(_picture(number), format="rgb24")
            frame.pts, frame.time_base = (times_ms[number] if times_ms else number), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _picture(number: int) -> np.ndarray:
    bits = [255 * (number >> bit & 1) for bit in range(BITS)]
    row = np.repeat(np.array(bits, np.uint8), WIDTH // BITS)
    return np.broadcast_to(row[None, :, None], (HEIGHT, WIDTH, 3)).copy()


def number_of(jpeg: bytes, *, quarters: int = 0) -> int:
    """The number of a stored frame that was turned by ``quarters`` against the clock."""
    pixels = np.rot90(np.asarray(Image.open(io.BytesIO(jpeg)).convert("L")), -quarters)
    height, width = pixels.shape
    return sum(int(pixels[height // 2, (2 * bit + 1) * width // (2 * BITS)] > 127) << bit for bit in range(BITS))


def turn_mp4(path: Path, *, clockwise: int) -> None:
    """Write a rotation of 0, 90, 180 or 270 degrees, as phones do, into the track header of an mp4."""
    cos, sin = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[clockwise]
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8  # version and flags, times and duration, reserved, layer and volume
    matrix = [cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30]
    assert struct.unpack_from(">9i", data, at) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, at, *matrix)
    path.write_bytes(data)
