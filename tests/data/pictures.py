"""Real and drawn pictures in every encoding that the loader allows: what the fuzz test breaks.

Encodings that Pillow does not write (YCCK and 12-bit JPEG, interlaced and 48-bit PNG, run-length BMP, tiled TIFF) are
written here.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageCms, ImageDraw
from sklearn.datasets import load_digits, load_sample_image

HEIGHT, WIDTH = 64, 88
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112
_TIFF_LONGS = (256, 257, 273, 279, 322, 323, 324, 325)  # sizes and places; the other tags are 16-bit
# Adam7: first row, first column, row step, column step of each pass
_PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    """Encode with Pillow."""
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def with_orientation(value: int) -> Image.Exif:
    """An EXIF block that says how the picture is turned."""
    exif = Image.Exif()
    exif[_ORIENTATION] = value
    return exif


@cache
def scenes() -> dict[str, Image.Image]:
    """A photo of a building, one of a flower, a page of scanned digits, and a drawn page; each 64 x 88 RGB."""
    photos = {name: Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")}
    digits = load_digits().images[:88].reshape(8, 11, 8, 8).transpose(0, 2, 1, 3).reshape(HEIGHT, WIDTH)
    page = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(page)
    draw.text((3, 3), "rows: 64\ncolumns: 88", fill="black")
    draw.rectangle((40, 36, 84, 60), fill="navy", outline="orange")
    draw.ellipse((6, 34, 34, 62), fill=(200, 30, 60))
    return {
        "china": photos["china"].crop((250, 120, 250 + WIDTH, 120 + HEIGHT)),
        "flower": photos["flower"].resize((WIDTH, HEIGHT)),
        "digits": Image.fromarray((255 - digits * 15.9).astype(np.uint8)).convert("RGB"),
        "page": page,
    }


# --- PNG


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk with the right CRC."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """The (kind, content) of every chunk of a good PNG."""
    found, at = [], len(PNG_MAGIC)
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def png_of(chunks: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A PNG of these chunks, each with the right CRC."""
    return PNG_MAGIC + b"".join(png_chunk(kind, content) for kind, content in chunks)


def png_header(height: int, width: int, *, depth: int = 8, colour: int = 2, interlaced: int = 0) -> bytes:
    """The content of IHDR."""
    return struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)


def interlaced_png(pixels: np.ndarray) -> bytes:
    """Adam7, uint8 or uint16 [H, W, 3], without filters."""
    deep = pixels.astype(">u2") if pixels.dtype == np.uint16 else pixels
    rows = b"".join(b"".join(b"\0" + row.tobytes() for row in deep[y0::dy, x0::dx]) for y0, x0, dy, dx in _PASSES)
    header = png_header(*pixels.shape[:2], depth=8 * pixels.dtype.itemsize, interlaced=1)
    return png_of([(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")])


def deep_png(pixels: np.ndarray) -> bytes:
    """16 bits a channel, uint16 [H, W, 3] or [H, W, 4]."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = png_header(*pixels.shape[:2], depth=16, colour={3: 2, 4: 6}[pixels.shape[2]])
    return png_of([(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")])


# --- JPEG


def jpeg_segments(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """The (marker, content) of each segment up to the first scan's header, and all bytes after it."""
    found, at = [], 2
    while not found or found[-1][0] != 0xDA:
        (length,) = struct.unpack_from(">H", data, at + 2)
        found.append((data[at + 1], data[at + 4 : at + 2 + length]))
        at += 2 + length
    return found, data[at:]


def jpeg_of(segments: Iterable[tuple[int, bytes]], scan: bytes) -> bytes:
    """A JPEG of these segments and entropy-coded bytes."""
    return b"\xff\xd8" + b"".join(struct.pack(">BBH", 255, m, len(c) + 2) + c for m, c in segments) + scan


def ycck_jpeg(image: Image.Image) -> bytes:
    """Four channels whose Adobe marker says luminance, two colour differences and black."""
    segments, scan = jpeg_segments(saved(image.convert("CMYK"), "JPEG"))
    return jpeg_of([(m, c[:11] + b"\2" if m == 0xEE else c) for m, c in segments], scan)


def twelve_bit_jpeg(height: int, width: int) -> bytes:
    """A flat gray picture of 12 bits a sample: every block is one DC code of category 0 and an end of block."""
    table = bytes([1]) + bytes(15)
    blocks = -(-height // 8) * -(-width // 8)
    bits = "00" * blocks
    bits += "1" * (-len(bits) % 8)
    return jpeg_of(
        [
            (0xDB, b"\0" + b"\1" * 64),
            (0xC1, struct.pack(">BHHB", 12, height, width, 1) + b"\1\x11\0"),
            (0xC4, b"\x00" + table + b"\0"),
            (0xC4, b"\x10" + table + b"\0"),
            (0xDA, b"\1\1\0\0\x3f\0"),
        ],
        int(bits, 2).to_bytes(len(bits) // 8, "big") + b"\xff\xd9",
    )


# --- BMP and TIFF


def run_length_bmp(indices: np.ndarray) -> bytes:
    """Eight bits a pixel, run-length encoded with runs of one; ``indices`` uint8 [H, W]."""
    body = b"".join(b"".join(b"\1" + bytes([v]) for v in row) + b"\0\0" for row in indices[::-1]) + b"\0\1"
    palette = b"".join(bytes([i, i, i, 0]) for i in range(256))
    height, width = indices.shape
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 2835, 2835, 256, 0)
    offset = 14 + len(info) + len(palette)
    return b"BM" + struct.pack("<IHHI", offset + len(body), 0, 0, offset) + info + palette + body


def tiff_of(tags: Sequence[tuple[int, Sequence[int]]], body: bytes) -> bytes:
    """A little-endian TIFF: header, ``body`` from byte 8 on, then one directory of these tags in this order."""
    extra, entries = b"", b""
    directory = 8 + len(body) + len(body) % 2
    after = directory + 2 + 12 * len(tags) + 4
    for tag, values in tags:
        wide = tag in _TIFF_LONGS
        packed = struct.pack(f"<{len(values)}{'I' if wide else 'H'}", *values)
        field = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack("<I", after + len(extra))
        entries += struct.pack("<HHI", tag, 4 if wide else 3, len(values)) + field
        extra += packed + bytes(len(packed) % 4) if len(packed) > 4 else b""
    head = b"II*\0" + struct.pack("<I", directory) + body + bytes(len(body) % 2)
    return head + struct.pack("<H", len(tags)) + entries + bytes(4) + extra


def tiled_tiff(pixels: np.ndarray, *, side: int = 32, claimed: int | None = None) -> bytes:
    """uint8 [H, W, 3] in deflated tiles; ``claimed`` is the side that the directory states."""
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((0, -height % side), (0, -width % side), (0, 0)))
    tiles = [
        zlib.compress(padded[y : y + side, x : x + side].tobytes())
        for y in range(0, height, side)
        for x in range(0, width, side)
    ]
    starts = [8 + sum(map(len, tiles[:i])) for i in range(len(tiles))]
    stated = side if claimed is None else claimed
    tags = [(256, [width]), (257, [height]), (258, [8, 8, 8]), (259, [8]), (262, [2]), (277, [3]), (284, [1]),
            (322, [stated]), (323, [stated]), (324, starts), (325, [len(tile) for tile in tiles])]  # fmt: skip
    return tiff_of(tags, b"".join(tiles))


# --- Everything


def _alpha(image: Image.Image) -> Image.Image:
    found = image.convert("RGBA")
    found.putalpha(Image.linear_gradient("L").resize(image.size))
    return found


def _deep(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.uint16) * 257


def _jpegs(images: dict[str, Image.Image], icc: bytes) -> dict[str, bytes]:
    china, flower = images["china"], images["flower"]
    return {
        "jpeg 420": saved(china, "JPEG", quality=85),
        "jpeg 422": saved(flower, "JPEG", subsampling=1),
        "jpeg 444": saved(images["page"], "JPEG", subsampling=0, quality=95),
        "jpeg progressive": saved(flower, "JPEG", progressive=True),
        "jpeg progressive 444": saved(china, "JPEG", progressive=True, subsampling=0),
        "jpeg optimised": saved(china, "JPEG", optimize=True, quality=60),
        "jpeg restarts": saved(flower, "JPEG", restart_marker_blocks=3),
        "jpeg gray": saved(images["digits"].convert("L"), "JPEG"),
        "jpeg cmyk": saved(china.convert("CMYK"), "JPEG"),
        "jpeg ycck": ycck_jpeg(flower),
        "jpeg icc": saved(china, "JPEG", icc_profile=icc),
        "jpeg exif": saved(flower, "JPEG", exif=with_orientation(6)),
        "jpeg comment": saved(china, "JPEG", comment=b"drawn from life"),
        "jpeg large": saved(china.resize((200, 150)), "JPEG"),
    }


def _pngs(images: dict[str, Image.Image], icc: bytes) -> dict[str, bytes]:
    china, flower, page = images["china"], images["flower"], images["page"]
    return {
        "png rgb": saved(china, "PNG"),
        "png page": saved(page, "PNG"),
        "png alpha": saved(_alpha(flower), "PNG"),
        "png gray": saved(images["digits"].convert("L"), "PNG"),
        "png gray alpha": saved(_alpha(flower).convert("LA"), "PNG"),
        "png palette": saved(page.quantize(16), "PNG"),
        "png transparent palette": saved(flower.quantize(200), "PNG", transparency=3),
        "png one bit": saved(images["digits"].convert("1"), "PNG"),
        "png gray 16": saved(Image.fromarray(_deep(china.convert("L"))), "PNG"),
        "png rgb 16": deep_png(_deep(flower)),
        "png alpha 16": deep_png(_deep(_alpha(china))),
        "png interlaced": interlaced_png(np.asarray(china)),
        "png interlaced 16": interlaced_png(_deep(flower)),
        "png icc": saved(flower, "PNG", icc_profile=icc),
        "png exif": saved(china, "PNG", exif=with_orientation(3)),
        "png animated": saved(china, "PNG", save_all=True, append_images=[flower]),
    }


def _others(images: dict[str, Image.Image], icc: bytes) -> dict[str, bytes]:
    china, flower, page, digits = (images[name] for name in ("china", "flower", "page", "digits"))
    gray = digits.convert("L")
    return {
        "webp lossy": saved(china, "WEBP"),
        "webp lossless": saved(page, "WEBP", lossless=True),
        "webp photo lossless": saved(flower, "WEBP", lossless=True),
        "webp alpha": saved(_alpha(flower), "WEBP"),
        "webp icc": saved(china, "WEBP", icc_profile=icc, exif=with_orientation(1)),
        "webp animated": saved(china, "WEBP", save_all=True, append_images=[flower, page]),
        "bmp": saved(china, "BMP"),
        "bmp 32": saved(_alpha(flower), "BMP"),
        "bmp palette": saved(page.quantize(30), "BMP"),
        "bmp one bit": saved(digits.convert("1"), "BMP"),
        "bmp run length": run_length_bmp(np.asarray(gray)),
        "tiff": saved(china, "TIFF"),
        "tiff lzw": saved(flower, "TIFF", compression="tiff_lzw"),
        "tiff deflate": saved(china, "TIFF", compression="tiff_adobe_deflate"),
        "tiff jpeg": saved(flower, "TIFF", compression="jpeg"),
        "tiff packbits": saved(page, "TIFF", compression="packbits"),
        "tiff fax": saved(digits.convert("1"), "TIFF", compression="group4"),
        "tiff gray 16": saved(Image.fromarray(_deep(china.convert("L"))), "TIFF"),
        "tiff palette": saved(page.quantize(16), "TIFF"),
        "tiff alpha": saved(_alpha(flower), "TIFF", compression="tiff_lzw"),
        "tiff cmyk": saved(china.convert("CMYK"), "TIFF"),
        "tiff pages": saved(china, "TIFF", save_all=True, append_images=[flower]),
        "tiff tiled": tiled_tiff(np.asarray(china)),
    }


@cache
def encoded_pictures() -> dict[str, bytes]:
    """Good pictures by name; the first word is the container."""
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    images = scenes()
    return _jpegs(images, icc) | _pngs(images, icc) | _others(images, icc)


def upright_size(name: str) -> tuple[int, int]:
    """(height, width) of an encoded picture as a viewer shows it."""
    return {"jpeg exif": (WIDTH, HEIGHT), "jpeg large": (150, 200)}.get(name, (HEIGHT, WIDTH))
