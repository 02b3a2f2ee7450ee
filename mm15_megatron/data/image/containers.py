"""Lies of a container, found in its own lengths and counts before a decoder reads it.

Each of these made a native decoder allocate or work without bound on a file of a few kilobytes: a chunk of WebP or PNG
that states a gigabyte (allocated by DALI as stated), thousands of empty scans in a JPEG (each one a pass over all
pixels), a PNG stream that unpacks to far more than its pixels (unpacked by DALI to its end), a WebP that states a large
canvas (Pillow allocates two of them to read the header).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Final

import numpy as np

_MAX_SCANS: Final = 256  # a progressive JPEG has about ten; nvImageCodec's own limit, which its fallback ignores
_PNG_MAGIC: Final = 8  # bytes
_PNG_HEADER: Final = 33  # bytes: magic and IHDR
_PNG_CHUNK: Final = 12  # bytes of a chunk beside its content
_PNG_CHANNELS: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PNG_SLACK: Final = 65536  # bytes: blocks that do not compress, and the codes of many small ones
_PNG_PIXELS: Final = (b"IDAT", b"fdAT")  # cut ones are the decoders' to find
_WEBP_BLOCKS: Final = (b"EXIF", b"ICCP", b"XMP ")  # searched for behind the stated end of the file too
# Adam7: first row, first column, row step, column step of each pass
_PASSES: Final = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def container_problem(kind: str, data: bytes, *, max_pixels: int) -> str:
    """Return what is wrong with the structure of an image, an empty text if nothing is.

    Args:
        kind: what :func:`~mm15_megatron.data.image.pillow.sniff` says.
        data: encoded bytes.
        max_pixels: the largest canvas that a WebP may state; of the other formats a decoder tells the size cheaply.
    """
    if kind == "jpeg":
        whole = np.frombuffer(data, np.uint8)
        scans = int(np.count_nonzero((whole[:-1] == 0xFF) & (whole[1:] == 0xDA)))  # markers are never escaped bytes
        return f"{scans} scans, the limit is {_MAX_SCANS}" if scans > _MAX_SCANS else ""
    if kind == "png":
        blocks = (chunk for chunk in _png_chunks(data) if chunk[0] not in _PNG_PIXELS)
        return _long_block(blocks, data) or _png_problem(data)
    blocks = (chunk for chunk in _webp_chunks(data) if chunk[0] in _WEBP_BLOCKS)
    return _long_block(blocks, data) or _webp_problem(data, max_pixels) if kind == "webp" else ""


def is_animated_png(data: bytes) -> bool:
    """Whether a PNG says, or may say, that it has several frames."""
    pixels = data.find(b"IDAT")
    return b"acTL" in data[: pixels if pixels >= 0 else len(data)]


def is_plain_webp(data: bytes) -> bool:
    """Whether a WebP is one picture and nothing else: no frames, no alpha plane, no EXIF, no profile."""
    return data[12:16] != b"VP8X"


def png_lacks_rows(data: bytes) -> bool:
    """Whether the pixel stream of a PNG ends, properly or not, before all rows are there."""
    missing = _png_raw_bytes(data)
    stream = zlib.decompressobj()
    try:
        for kind, start, length in _png_chunks(data):
            packed = data[start : start + length] if kind == b"IDAT" else b""
            while packed and missing > 0:
                missing -= len(stream.decompress(packed, 2**20))  # a megabyte at a time, whatever it unpacks to
                packed = stream.unconsumed_tail
    except zlib.error:
        return True
    return missing > 0


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, start of the content, stated length), up to the end or the first chunk that leaves the file."""
    at, kind = _PNG_MAGIC, b""
    while at + _PNG_CHUNK <= len(data) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        yield kind, at + 8, length
        at += _PNG_CHUNK + length


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    at = 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        yield kind, at + 8, length
        at += 8 + length + length % 2


def _long_block(blocks: Iterator[tuple[bytes, int, int]], data: bytes) -> str:
    for kind, start, length in blocks:
        if start + length > len(data):
            return f"chunk {kind!r} states {length} bytes, {len(data) - start} are left"
    return ""


def _png_raw_bytes(data: bytes) -> int:
    """Bytes of the unpacked rows with their filters, by the header."""
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    bits = depth * _PNG_CHANNELS.get(colour, 0)
    passes = _PASSES if data[28] else ((0, 0, 1, 1),)
    sizes = [(-(-(height - y) // dy), -(-(width - x) // dx)) for y, x, dy, dx in passes if y < height and x < width]
    return sum(rows * (1 + -(-columns * bits // 8)) for rows, columns in sizes)


def _png_problem(data: bytes) -> str:
    if len(data) < _PNG_HEADER:
        return "the header is cut"
    packed = sum(length for kind, _, length in _png_chunks(data) if kind == b"IDAT")
    raw = _png_raw_bytes(data)
    too_many = packed > raw + raw // 50 + _PNG_SLACK
    return f"{packed} bytes of packed pixels, unpacked they should be {raw}" if too_many else ""


def _webp_problem(data: bytes, max_pixels: int) -> str:
    head = data[:30].ljust(30, b"\0")
    if head[12:16] == b"VP8X":
        width, height = (1 + int.from_bytes(head[at : at + 3], "little") for at in (24, 27))
    elif head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", head, 26))
    return f"a canvas of {height}x{width} pixels, the limit is {max_pixels}" if height * width > max_pixels else ""
