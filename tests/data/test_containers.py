"""Files that lie about their own structure are refused before a decoder reads them; honest ones pass."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest

from mm15_megatron.data.image.containers import container_problem, is_animated_png, png_lacks_rows
from mm15_megatron.data.image.decoder import build_decoder
from mm15_megatron.data.image.pillow import check_image, sniff
from mm15_megatron.errors import DataError

from .pictures import PNG_MAGIC, encoded_pictures, png_chunks, png_header, png_of, scenes, tiled_tiff

MAX_PIXELS = 1_000_000


def riff(*chunks: tuple[bytes, int, bytes]) -> bytes:
    """A WebP of (name, stated length, content)."""
    body = b"WEBP" + b"".join(name + struct.pack("<I", length) + content for name, length, content in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_canvas(width: int, height: int) -> bytes:
    return bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")


def progressive_with_scans(count: int) -> bytes:
    data = encoded_pictures()["jpeg progressive"]
    last = data.rfind(b"\xff\xda")
    return data[:-2] + (data[last : last + 10] + b"\0") * count + b"\xff\xd9"


def png_with_long_block(kind: bytes) -> bytes:
    first = png_of([(b"IHDR", png_header(40, 60))])
    return first + struct.pack(">I", 2**31 - 1) + kind + bytes(60)


LIES = {
    "two gigabytes of EXIF in a PNG": (png_with_long_block(b"eXIf"), "chunk b'eXIf' states 2147483647 bytes, 60 are"),
    "two gigabytes of profile in a PNG": (png_with_long_block(b"iCCP"), "chunk b'iCCP' states"),
    "half a header": (PNG_MAGIC + b"\0\0\0\x0dIHDR" + bytes(9), "the header is cut|chunk b'IHDR' states"),
    "pixels that unpack to too much": (
        png_of([(b"IHDR", png_header(40, 60)), (b"IDAT", zlib.compress(np.random.default_rng(0).bytes(200_000)))]),
        r"bytes of packed pixels, unpacked they should be 7240",
    ),
    "a gigabyte of EXIF in a WebP": (
        riff((b"VP8X", 10, webp_canvas(60, 40)), (b"EXIF", 2**30, b"Exif")),
        "chunk b'EXIF' states 1073741824 bytes, 4 are left",
    ),
    "canvas": (riff((b"VP8X", 10, webp_canvas(9000, 8000))), "canvas of 8000x9000 pixels, the limit is 1000000"),
    "lossless canvas": (
        riff((b"VP8L", 5, b"\x2f" + (16382 | 16382 << 14).to_bytes(4, "little"))),
        "canvas of 16383x16383 pixels",
    ),
    "lossy canvas": (
        riff((b"VP8 ", 10, b"\x30\1\0\x9d\1\x2a" + struct.pack("<HH", 16383, 8000))),
        "canvas of 8000x16383 pixels",
    ),
    "scans": (progressive_with_scans(300), "310 scans, the limit is 256"),
    "tiles": (
        tiled_tiff(np.asarray(scenes()["china"]), claimed=65536),
        "tiles of 4294967296 pixels in an image of 64x88",
    ),
}


@pytest.mark.parametrize("name", sorted(LIES))
def test_a_lie_is_named_by_every_decoder_and_when_a_dataset_is_built(name: str) -> None:
    data, reason = LIES[name]
    for library in ("dali", "pil"):
        decoder = build_decoder(library, max_pixels=MAX_PIXELS)
        (found,) = decoder.decode([np.frombuffer(data, np.uint8)], sizes=[(64, 88)])
        assert found.pixels_HWC is None
        assert found.problem.startswith("header: ")
    with pytest.raises(DataError, match=reason):
        check_image(data, max_pixels=MAX_PIXELS)


@pytest.mark.parametrize("name", sorted(encoded_pictures()))
def test_honest_files_pass(name: str) -> None:
    data = encoded_pictures()[name]
    kind = sniff(data)
    assert container_problem(kind, data, max_pixels=MAX_PIXELS) == ""
    assert container_problem(kind, data + b"bytes after the end", max_pixels=MAX_PIXELS) == ""
    if kind == "png":
        assert not png_lacks_rows(data)
        assert is_animated_png(data) == (name == "png animated")


@pytest.mark.parametrize("scans", [100, 246])
def test_many_scans_below_the_limit_pass(scans: int) -> None:
    assert check_image(progressive_with_scans(scans), max_pixels=MAX_PIXELS).width == 88


@pytest.mark.parametrize("name", ["png rgb", "png one bit", "png palette", "png interlaced", "png alpha 16"])
def test_a_png_whose_stream_ends_early_is_refused(name: str) -> None:
    """The zlib stream is whole and every CRC is right: a decoder alone takes the missing rows for zeros."""
    chunks = png_chunks(encoded_pictures()[name])
    rows = zlib.decompress(b"".join(content for kind, content in chunks if kind == b"IDAT"))
    others = [chunk for chunk in chunks if chunk[0] not in (b"IDAT", b"IEND")]
    for share in (0.0, 0.5, 0.95):
        short = png_of([*others, (b"IDAT", zlib.compress(rows[: int(len(rows) * share)])), (b"IEND", b"")])
        assert png_lacks_rows(short)
        with pytest.raises(DataError, match="an image cannot be used: body"):
            check_image(short, max_pixels=MAX_PIXELS)


def test_black_rows_at_the_end_are_no_missing_rows() -> None:
    black = png_of([(b"IHDR", png_header(40, 60)), (b"IDAT", zlib.compress(bytes(40 * 181))), (b"IEND", b"")])
    assert check_image(black, max_pixels=MAX_PIXELS).height == 40
