"""Hostile images: picture ``number`` of an endless series is a pure function of the number.

A hostile image is a good one of :mod:`tests.data.pictures` that is cut, flipped, overwritten, spliced, or rebuilt with
lies where its format's own structure stays right (CRCs, lengths), or it is no image that the loader allows.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from tests.data import pictures
from tests.data.pictures import HEIGHT, WIDTH, encoded_pictures, jpeg_of, jpeg_segments, png_chunks, png_header, png_of

SEED = 15
MAGIC = {"jpeg": b"\xff\xd8\xff", "png": pictures.PNG_MAGIC, "bmp": b"BM", "tiff": b"II*\0", "webp": b"RIFF"}
_HEADER = {"jpeg": 0, "png": 33, "bmp": 54, "tiff": 8, "webp": 30}  # bytes before the body; a JPEG's are counted
_SEVERAL = ("png animated", "webp animated", "tiff pages")
_SIZES = (0, 1, 2, 7, 63, 65, 87, 89, 300, 1000, 4096, 16384, 65500, 65535)
_EDGES = (0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1)

Size = tuple[int, int]
Broken = tuple[bytes, Size | None]
"""Bytes, and the size that the dataset states if it is not the original's: then the header tells the same lie."""


@dataclass(frozen=True)
class Hostile:
    """One hostile image.

    Attributes:
        number: where it stands in the series.
        kind: how it was made, and of what.
        data: the bytes.
        size: the (height, width) that the dataset states.
        must_fail: no decoder may return pixels for it.
    """

    number: int
    kind: str
    data: bytes
    size: Size
    must_fail: bool


def _number(rng: Generator, top: int) -> int:
    """A number below ``top``, an extreme one half of the time."""
    return int(rng.choice(_EDGES)) % top if rng.random() < 0.5 else int(rng.integers(top))


def _one(rng: Generator, *, of: str = "") -> tuple[str, bytes]:
    names = [name for name in encoded_pictures() if name.startswith(of)]
    name = names[int(rng.integers(len(names)))]
    return name, encoded_pictures()[name]


def _container(name: str) -> str:
    return name.split()[0]


def _body_start(name: str, data: bytes) -> int:
    return len(data) - len(jpeg_segments(data)[1]) if name.startswith("jpeg") else _HEADER[_container(name)]


# --- Any format


def _cut(rng: Generator, name: str, data: bytes) -> Broken:
    start = _body_start(name, data)
    return data[: start + int((len(data) - start) * rng.uniform(0.02, 0.8))], None


def _cut_header(rng: Generator, name: str, data: bytes) -> Broken:
    return data[: int(rng.integers(1, min(_body_start(name, data), 60) + 1))], None


def _flipped(rng: Generator, name: str, data: bytes) -> Broken:
    found = np.frombuffer(data, np.uint8).copy()
    at = rng.integers(_body_start(name, data), len(data), 2 ** int(rng.integers(0, 7)))
    found[at] ^= np.uint8(1) << rng.integers(0, 8, len(at)).astype(np.uint8)
    return found.tobytes(), None


def _flipped_anywhere(rng: Generator, name: str, data: bytes) -> Broken:
    found = np.frombuffer(data, np.uint8).copy()
    at = rng.integers(0, min(len(data), 1200), 2 ** int(rng.integers(0, 4)))
    found[at] ^= np.uint8(1) << rng.integers(0, 8, len(at)).astype(np.uint8)
    return found.tobytes(), None


def _overwritten(rng: Generator, name: str, data: bytes) -> Broken:
    found = np.frombuffer(data, np.uint8).copy()
    start = int(rng.integers(_body_start(name, data), len(data)))
    stop = min(len(data), start + int(rng.integers(1, 2000)))
    found[start:stop] = rng.integers(0, 256, stop - start) if rng.random() < 0.6 else rng.choice([0, 255])
    return found.tobytes(), None


def _removed(rng: Generator, name: str, data: bytes) -> Broken:
    start = int(rng.integers(_body_start(name, data), len(data)))
    return data[:start] + data[start + int(rng.integers(1, 400)) :], None


def _spliced(rng: Generator, name: str, data: bytes) -> Broken:
    other = _one(rng, of=_container(name))[1]
    start = _body_start(name, data)
    at = int(rng.integers(start, len(data)))
    return data[:at] + other[min(at, len(other) - 1) :], None


def _long_word(rng: Generator, name: str, data: bytes) -> Broken:
    """A 16- or 32-bit field of the first bytes becomes an extreme number."""
    form = str(rng.choice(["<H", "<I", ">H", ">I"]))
    found = bytearray(data)
    at = int(rng.integers(2, min(len(data), 700) - 4))
    struct.pack_into(form, found, at, _number(rng, 2 ** (8 * struct.calcsize(form))))
    return bytes(found), None


# --- JPEG


def _jpeg_scan(rng: Generator, name: str, data: bytes) -> Broken:
    """Entropy-coded bytes replaced: noise, markers where none may stand, or nothing."""
    segments, scan = jpeg_segments(data)
    how = int(rng.integers(4))
    at = int(rng.integers(len(scan)))
    noise = rng.integers(0, 256, int(rng.integers(1, 3000))).astype(np.uint8).tobytes()
    marker = bytes([255, int(rng.integers(1, 255))])
    return jpeg_of(segments, (noise, scan[:at] + marker + scan[at:], b"\xff\xd9", scan[:at] + b"\xff\xd9")[how]), None


def _jpeg_segment(rng: Generator, name: str, data: bytes) -> Broken:
    """One segment is removed, doubled, moved, cut, emptied or filled with noise; its stated length stays right."""
    segments, scan = jpeg_segments(data)
    at = int(rng.integers(len(segments)))
    marker, content = segments.pop(at)
    noise = rng.integers(0, 256, len(content)).astype(np.uint8).tobytes()
    changed: list[list[tuple[int, bytes]]] = [
        [], [(marker, content)] * 2, [(marker, content[: int(rng.integers(len(content) + 1))])], [(marker, b"")],
        [(marker, noise)], [(marker, content + noise)], [(int(rng.integers(0xC0, 0xFF)), content)],
    ]  # fmt: skip
    segments[at:at] = changed[int(rng.integers(len(changed)))]
    return jpeg_of(segments, scan), None


def _jpeg_frame(rng: Generator, name: str, data: bytes) -> Broken:
    """The frame header lies: process (arithmetic, lossless, hierarchical), depth, channels, sampling, tables."""
    segments, scan = jpeg_segments(data)
    at = next(i for i, (marker, _) in enumerate(segments) if 0xC0 <= marker <= 0xC2)
    marker, content = segments[at]
    frame = bytearray(content)
    if rng.random() < 0.5:
        marker = int(rng.choice([0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF]))
    else:
        field = int(rng.choice([0, *range(5, len(frame))]))
        frame[field] = _number(rng, 256) if field else int(rng.choice([0, 1, 2, 12, 16, 255]))
    segments[at] = marker, bytes(frame)
    return jpeg_of(segments, scan), None


def _jpeg_profile(rng: Generator, name: str, data: bytes) -> Broken:
    """A broken ICC profile, EXIF block or other application block before the picture."""
    segments, scan = jpeg_segments(data)
    noise = rng.integers(0, 256, int(rng.integers(0, 300))).astype(np.uint8).tobytes()
    loop = b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1" + struct.pack("<HII", 3, _number(rng, 2**32), 8) + b"\x08\0\0\0"
    blocks = [(0xE1, b"Exif\0\0" + noise), (0xE1, loop), (0xE1, b"Exif\0\0MM\0*" + noise), (0xE2, b"MPF\0" + noise),
              (0xE2, b"ICC_PROFILE\0" + noise), (0xE2, b"ICC_PROFILE\0\7\3" + noise), (0xEE, b"Adobe" + noise),
              (0xED, b"Photoshop 3.0\0" + noise), (0xE0, b"JFIF\0" + noise)]  # fmt: skip
    where = int(rng.integers(len(segments)))
    segments.insert(where, blocks[int(rng.integers(len(blocks)))])
    if rng.random() < 0.6:
        scan = scan[: len(scan) // 2]
    return jpeg_of(segments, scan), None


def _jpeg_scans(rng: Generator, name: str, data: bytes) -> Broken:
    """Twelve bytes of an empty scan, some thousand times over: each would cost a pass over all pixels."""
    at = data.rfind(b"\xff\xda")
    return data[:-2] + (data[at : at + 10] + b"\0") * int(rng.integers(300, 5000)) + b"\xff\xd9", None


# --- PNG


def _png_body(rng: Generator, name: str, data: bytes) -> Broken:
    """Pixels that are too few, wrongly filtered or no zlib stream at all; every CRC is right."""
    chunks = png_chunks(data)
    rows = bytearray(zlib.decompress(b"".join(content for kind, content in chunks if kind == b"IDAT")))
    how = int(rng.integers(5))
    if how == 0:
        del rows[int(len(rows) * rng.uniform(0, 0.95)) :]
    elif how == 1:
        step = len(rows) // HEIGHT if "interlaced" not in name else len(rows)
        rows[:: max(1, step)] = bytes([int(rng.integers(5, 256))]) * len(rows[:: max(1, step)])
    packed = bytearray(zlib.compress(bytes(rows)))
    if how == 2:
        packed[-4:] = bytes(b ^ 255 for b in packed[-4:])  # the checksum over the pixels
    elif how == 3:
        at = int(rng.integers(2, len(packed)))
        packed[at : at + 40] = rng.integers(0, 256, len(packed[at : at + 40])).astype(np.uint8).tobytes()
    elif how == 4:
        packed = packed[: int(len(packed) * rng.uniform(0, 0.9))]
    first = next(i for i, (kind, _) in enumerate(chunks) if kind == b"IDAT")
    rest = [chunk for chunk in chunks if chunk[0] != b"IDAT"]
    rest.insert(first, (b"IDAT", bytes(packed)))
    return png_of(rest), None


def _png_header(rng: Generator, name: str, data: bytes) -> Broken:
    """Depth, colour type, compression, filter or interlacing is a lie; CRC and size are right."""
    chunks = png_chunks(data)
    header = bytearray(chunks[0][1])
    for field in rng.integers(8, 13, int(rng.integers(1, 3))):
        header[field] = int(rng.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 255]))
    chunks[0] = b"IHDR", bytes(header)
    return png_of(chunks), None


def _png_chunks(rng: Generator, name: str, data: bytes) -> Broken:
    """A chunk is removed, doubled, moved, filled with noise, or one that cannot be right stands before the pixels."""
    chunks = png_chunks(data)
    noise = rng.integers(0, 256, int(rng.integers(0, 900))).astype(np.uint8).tobytes()
    at = int(rng.integers(1, len(chunks)))
    how = int(rng.integers(5))
    if how == 0:
        del chunks[at]
    elif how == 1:
        chunks.insert(int(rng.integers(1, len(chunks))), chunks[int(rng.integers(len(chunks)))])
    elif how == 2:
        chunks[at] = chunks[at][0], noise
    else:
        kinds = [b"iCCP", b"eXIf", b"PLTE", b"tRNS", b"gAMA", b"cHRM", b"sBIT", b"zTXt", b"iTXt", b"hIST", b"bKGD",
                 b"pHYs", b"acTL", b"fcTL", b"fdAT", b"sPLT", b"abCd", b"IEND", b"cICP"]  # fmt: skip
        content = noise
        if how == 4:  # a megabyte of zeros behind a kilobyte
            content = b"a\0\0" + zlib.compress(bytes(2**20))
        chunks.insert(at, (kinds[int(rng.integers(len(kinds)))], content))
    return png_of(chunks), None


def _png_lie(rng: Generator, name: str, data: bytes) -> Broken:
    """A block before the pixels states up to four gigabytes, or the pixels unpack to a hundred times what they are."""
    chunks = png_chunks(data)
    if rng.random() < 0.7:
        kind = (b"eXIf", b"iCCP", b"zTXt", b"tRNS", b"fcTL")[int(rng.integers(5))]
        first = png_of(chunks[:1])
        return first + struct.pack(">I", int(rng.integers(2**20, 2**32))) + kind + data[len(first) :], None
    noise = rng.integers(0, 256, 300_000).astype(np.uint8).tobytes()
    return png_of([*chunks[:1], (b"IDAT", zlib.compress(noise)), chunks[-1]]), None


# --- The others


def _riff(rng: Generator, name: str, data: bytes) -> Broken:
    """A chunk of a WebP states another length or another name, or its first bytes are noise."""
    found, places, at = bytearray(data), [4], 12
    while at + 8 <= len(data):
        places.append(at + 4)
        at += 8 + int.from_bytes(data[at + 4 : at + 8], "little") + int.from_bytes(data[at + 4 : at + 8], "little") % 2
    place = places[int(rng.integers(len(places)))]
    how = int(rng.integers(4))
    if how == 0:
        struct.pack_into("<I", found, place, _number(rng, 2**32))
    elif how == 2 and place > 4:
        names = [b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"ICCP", b"EXIF", b"ABCD"]
        found[place - 4 : place] = names[int(rng.integers(len(names)))]
    elif how == 1:
        kind = (b"EXIF", b"ICCP", b"XMP ")[int(rng.integers(3))]
        found += kind + struct.pack("<I", int(rng.integers(2**20, 2**32))) + b"more"
        struct.pack_into("<I", found, 4, len(found) - 8)
    else:
        span = found[place + 4 : place + 4 + int(rng.integers(1, 24))]
        found[place + 4 : place + 4 + len(span)] = rng.integers(0, 256, len(span)).astype(np.uint8).tobytes()
    return bytes(found), None


def _bmp(rng: Generator, name: str, data: bytes) -> Broken:
    """Place of the pixels, size of the header, depth, compression, size of the body or of the palette is a lie."""
    found = bytearray(data)
    at, form = [(10, "<I"), (14, "<I"), (26, "<H"), (28, "<H"), (30, "<I"), (34, "<I"), (46, "<I")][
        int(rng.integers(7))
    ]
    top = 2 ** (8 * struct.calcsize(form))
    value = int(rng.choice([0, 1, 2, 3, 4, 5, 6, 8, 16, 24, 32])) if rng.random() < 0.6 else _number(rng, top)
    struct.pack_into(form, found, at, value)
    return bytes(found), None


def _tiff(rng: Generator, name: str, data: bytes) -> Broken:
    """A field of the first directory is a lie: its tag, type, count or value."""
    found = bytearray(data)
    (directory,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, directory)
    for _ in range(int(rng.integers(1, 3))):
        at = directory + 2 + 12 * int(rng.integers(entries))
        tag = struct.unpack_from("<H", data, at)[0]
        if tag in (256, 257):
            continue  # the size stays: else the header check ends it
        offset, form = [(0, "<H"), (2, "<H"), (4, "<I"), (8, "<I"), (8, "<H")][
            int(rng.choice(5, p=[0.1, 0.1, 0.2, 0.3, 0.3]))
        ]
        value = _number(rng, 2 ** (8 * struct.calcsize(form)))
        if offset == 0:
            value = int(rng.choice([258, 259, 262, 266, 273, 277, 278, 279, 284, 317, 320, 322, 323, 324, 338, 347]))
        struct.pack_into(form, found, at + offset, value)
    return bytes(found), None


def _tile_size(rng: Generator, name: str, data: bytes) -> Broken:
    """A small tiled TIFF that claims enormous tiles."""
    side = 16 * int(rng.choice([3, 100, 625, 1250, 2500, 4096, 2**16, 2**28 - 1]))
    return pictures.tiled_tiff(np.asarray(pictures.scenes()["china"]), claimed=side), None


# --- Sizes


def _resized(rng: Generator, name: str, data: bytes) -> Broken:
    """The header states another size than the pixels have; in half of the cases the dataset tells the same lie."""
    height, width = (int(rng.choice(_SIZES)) for _ in range(2))
    form, found = _container(name), bytearray(data)
    if form == "png":
        chunks = png_chunks(data)
        chunks[0] = b"IHDR", struct.pack(">II", width, height) + chunks[0][1][8:]
        found = bytearray(png_of(chunks))
    elif form == "jpeg":
        segments, scan = jpeg_segments(data)
        found = bytearray(
            jpeg_of(
                [
                    (m, c[:1] + struct.pack(">HH", height, width) + c[5:] if 0xC0 <= m <= 0xC2 else c)
                    for m, c in segments
                ],
                scan,
            )
        )
    elif form == "bmp":
        struct.pack_into("<ii", found, 18, width, height if rng.random() < 0.7 else -height)
    elif form == "webp" and data[12:16] == b"VP8X":
        found[24:30] = max(0, width - 1).to_bytes(3, "little") + max(0, height - 1).to_bytes(3, "little")
    elif form == "webp" and data[12:16] == b"VP8 ":
        struct.pack_into("<HH", found, 26, width & 0x3FFF, height & 0x3FFF)
    elif form == "webp":
        struct.pack_into("<I", found, 21, ((width - 1) & 0x3FFF) | ((height - 1) & 0x3FFF) << 14)
    else:
        _set_tiff_size(found, height, width)
    turned = (width, height) if name == "jpeg exif" else (height, width)
    return bytes(found), turned if rng.random() < 0.5 else None


def _set_tiff_size(found: bytearray, height: int, width: int) -> None:
    (directory,) = struct.unpack_from("<I", found, 4)
    for at in range(directory + 2, directory + 2 + 12 * struct.unpack_from("<H", found, directory)[0], 12):
        tag, kind = struct.unpack_from("<HH", found, at)
        if tag in (256, 257):
            struct.pack_into("<H" if kind == 3 else "<I", found, at + 8, width if tag == 256 else height)


def _short_of_pixels(rng: Generator, name: str, data: bytes) -> Broken:
    """A PNG of a thousand rows and columns that both header and dataset state, and pixels for a few rows."""
    height, width = (int(v) for v in rng.integers(300, 1000, 2))
    rows = zlib.compress(bytes((3 * width + 1) * int(rng.integers(0, height))))
    chunks = [(b"IHDR", png_header(height, width)), (b"IDAT", rows), (b"IEND", b"")]
    return png_of(chunks), (height, width)


# --- What is no image of the list


def _foreign(rng: Generator, name: str, data: bytes) -> Broken:
    """Another format, text, noise, or nothing."""
    picture = pictures.scenes()["page"]
    noise = rng.integers(0, 256, int(rng.integers(1, 4000))).astype(np.uint8).tobytes()
    choices: list[Callable[[], bytes]] = [
        lambda: b"", lambda: noise, lambda: bytes(len(noise)), lambda: b"<html>404 Not Found</html>",
        lambda: b"%PDF-1.7\n" + noise, lambda: b"PK\3\4" + noise, lambda: b"\x7fELF" + noise,
        lambda: b"RIFF\x24\0\0\0WAVEfmt " + noise, lambda: pictures.saved(picture, "GIF"),
        lambda: pictures.saved(picture, "JPEG2000"), lambda: b"\xff\x4f\xff\x51" + noise,
        lambda: b"\0\0\0\x0cjP  \r\n\x87\n" + noise, lambda: pictures.saved(picture, "ICO"),
        lambda: pictures.saved(picture, "TGA"), lambda: pictures.saved(picture, "PPM"),
        lambda: pictures.saved(picture, "AVIF"), lambda: b"\0\0\0\x18ftypheic" + noise,
        lambda: data[1:], lambda: data[::-1], lambda: b"\xef\xbb\xbf" + data,
    ]  # fmt: skip
    return choices[int(rng.integers(len(choices)))](), None


def _wrong_magic(rng: Generator, name: str, data: bytes) -> Broken:
    """The first bytes of one format before the rest of another."""
    form = str(rng.choice([form for form in MAGIC if form != _container(name)]))
    magic = MAGIC[form] + (data[3:8] + b"WEBP" if form == "webp" else b"")
    return magic + data[len(magic) :], None


def _twelve_bits(rng: Generator, name: str, data: bytes) -> Broken:
    return pictures.twelve_bit_jpeg(HEIGHT, WIDTH), None


@dataclass(frozen=True)
class _Way:
    """A way to break a picture: of which formats, how often, and whether no decoder may accept the result."""

    broken: Callable[[Generator, str, bytes], Broken]
    weight: int
    of: str = ""
    must_fail: bool = False


_WAYS = (
    _Way(_cut, 14, must_fail=True),
    _Way(_cut, 10, "jpeg", must_fail=True),
    _Way(_cut, 8, "png", must_fail=True),
    _Way(_cut_header, 2, must_fail=True),
    _Way(_flipped, 6),
    _Way(_flipped_anywhere, 4),
    _Way(_overwritten, 9),
    _Way(_removed, 5),
    _Way(_spliced, 4),
    _Way(_long_word, 4),
    _Way(_jpeg_scan, 4, "jpeg"),
    _Way(_jpeg_scans, 1, "jpeg progressive", must_fail=True),
    _Way(_jpeg_segment, 4, "jpeg"),
    _Way(_jpeg_frame, 6, "jpeg"),
    _Way(_jpeg_profile, 3, "jpeg"),
    _Way(_png_body, 22, "png"),
    _Way(_png_header, 3, "png"),
    _Way(_png_chunks, 3, "png"),
    _Way(_png_lie, 2, "png", must_fail=True),
    _Way(_riff, 2, "webp"),
    _Way(_bmp, 2, "bmp"),
    _Way(_tiff, 4, "tiff"),
    _Way(_tile_size, 1, "tiff tiled"),
    _Way(_resized, 5),
    _Way(_short_of_pixels, 12, "png rgb", must_fail=True),
    _Way(_foreign, 3, must_fail=True),
    _Way(_wrong_magic, 2, must_fail=True),
    _Way(_twelve_bits, 1, must_fail=True),
)
_SHARES = np.cumsum([way.weight for way in _WAYS]) / sum(way.weight for way in _WAYS)


def hostile(number: int) -> Hostile:
    """Hostile image ``number``."""
    rng = np.random.default_rng((SEED, number))
    way = _WAYS[int(np.searchsorted(_SHARES, rng.random(), side="right"))]
    name, data = _one(rng, of=way.of)
    broken, size = way.broken(rng, name, data)
    kind = f"{way.broken.__name__.lstrip('_')} of {name}"
    must_fail = way.must_fail and not (name in _SEVERAL and way.broken is _cut)  # the first picture may be whole
    return Hostile(number, kind, broken, pictures.upright_size(name) if size is None else size, must_fail)
