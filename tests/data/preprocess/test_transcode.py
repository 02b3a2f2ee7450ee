"""GIF, AVIF and JPEG 2000 become PNG with the same pixels; what a loader reads stays as it is."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image, features

from mm15_megatron.data.image.pillow import check_image
from mm15_megatron.data.preprocess.transcode import foreign_format, png_by, transcoded
from mm15_megatron.errors import DataError

from ..images import photo

LIMIT = 10_000


def encoded(image: Image.Image, name: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=name, **options)
    return stream.getvalue()


def drawn(colour: str = "red") -> Image.Image:
    image = Image.new("RGB", (20, 10), "white")
    image.paste(colour, (3, 2, 9, 8))
    return image


def test_the_first_frame_of_an_animation_is_kept() -> None:
    data = encoded(drawn("red"), "GIF", save_all=True, append_images=[drawn("blue")])
    png, name = transcoded(data, max_pixels=LIMIT)
    assert name == "GIF"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), np.asarray(drawn("red")))
    assert (check_image(png, max_pixels=LIMIT).height, check_image(png, max_pixels=LIMIT).width) == (10, 20)


def test_transparency_stays() -> None:
    image = drawn().convert("P")
    data = encoded(image, "GIF", transparency=image.getpixel((4, 4)))
    pixels = np.asarray(Image.open(io.BytesIO(transcoded(data, max_pixels=LIMIT)[0])))
    assert pixels.shape == (10, 20, 4)
    assert pixels[4, 4, 3] == 0
    assert pixels[0, 0, 3] == 255


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_becomes_png() -> None:
    data = encoded(drawn(), "AVIF", quality=100, subsampling="4:4:4")
    assert foreign_format(data) == "AVIF"
    png, name = transcoded(data, max_pixels=LIMIT)
    assert name == "AVIF"
    ours, theirs = (np.asarray(Image.open(io.BytesIO(b)).convert("RGB")) for b in (png, data))
    assert np.array_equal(ours, theirs)


def test_other_formats_stay_byte_for_byte() -> None:
    for data in (photo(10, 12, seed=1), encoded(drawn(), "PNG"), b"no picture", b""):
        assert transcoded(data, max_pixels=LIMIT) == (data, None)


def test_broken_and_large_ones_are_refused() -> None:
    with pytest.raises(DataError, match="a GIF cannot be decoded"):
        transcoded(encoded(drawn(), "GIF")[:30], max_pixels=LIMIT)
    with pytest.raises(DataError, match="a GIF of 10x20 pixels, the limit is 100"):
        transcoded(encoded(drawn(), "GIF"), max_pixels=100)


# --- JPEG 2000, in a process of its own


def jpeg_2000(mode: str) -> tuple[bytes, np.ndarray]:
    """A lossless one, and its pixels."""
    photograph = Image.open(io.BytesIO(photo(50, 70, seed=3)))
    image = photograph.convert(mode) if mode != "I;16" else None
    if image is None:
        image = Image.fromarray(np.asarray(photograph.convert("L")).astype(np.uint16) * 257)
    return encoded(image, "JPEG2000", irreversible=False), np.asarray(image)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16"])
def test_jpeg_2000_becomes_png_without_loss(mode: str) -> None:
    data, pixels = jpeg_2000(mode)
    assert foreign_format(data) == "JPEG 2000"
    png, name = transcoded(data, max_pixels=LIMIT)
    assert name == "JPEG 2000"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), pixels)
    assert check_image(png, max_pixels=LIMIT).width == 70


def test_a_bare_codestream_is_jpeg_2000_too() -> None:
    data = encoded(drawn(), "JPEG2000", no_jp2=True)
    assert data[:4] == b"\xff\x4f\xff\x51"
    png, _ = transcoded(data, max_pixels=LIMIT)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), np.asarray(drawn()))


def test_broken_large_and_slow_jpeg_2000_is_refused() -> None:
    data, _ = jpeg_2000("RGB")
    with pytest.raises(DataError, match="a JPEG 2000 cannot be decoded: 50x70 pixels, the limit is 100"):
        transcoded(data, max_pixels=100)
    with pytest.raises(DataError, match="a JPEG 2000 cannot be decoded: .*broken data stream"):
        transcoded(data[: len(data) // 4], max_pixels=LIMIT)
    with pytest.raises(DataError, match="a JPEG 2000 cannot be decoded: "):
        transcoded(b"\xff\x4f\xff\x51" + bytes(60), max_pixels=LIMIT)
    with pytest.raises(DataError, match=r"a JPEG 2000 is not decoded after 0\.001 s"):
        transcoded(data, max_pixels=LIMIT, seconds=0.001)


def test_a_decoder_that_dies_costs_the_image() -> None:
    with pytest.raises(DataError, match="a JPEG 2000 ends its decoder with signal 6"):
        png_by([sys.executable, "-c", "import os; os.abort()"], b"", name="JPEG 2000", seconds=60)


@pytest.mark.parametrize("count", [pytest.param(30, id="sampled"), pytest.param(500, id="all", marks=pytest.mark.soak)])
def test_hostile_jpeg_2000_is_a_picture_or_an_error(count: int, table: dict[str, list[str]]) -> None:
    good, _ = jpeg_2000("RGB")
    refused = 0
    for number in range(count):
        rng = np.random.default_rng((15, number))
        broken = np.frombuffer(good, np.uint8).copy()
        at = rng.integers(12, len(broken) if number % 2 else 200, 2 ** int(rng.integers(0, 6)))
        broken[at] = rng.integers(0, 256, len(at))
        data = broken[: len(broken) if number % 3 else int(rng.integers(20, len(broken)))].tobytes()
        try:
            png, _ = transcoded(data, max_pixels=LIMIT)
        except DataError:
            refused += 1
        else:
            assert check_image(png, max_pixels=LIMIT).height > 0
    table.setdefault("hostile images", []).append(f"JPEG 2000: {count} transcoded, {refused} refused")
    assert 0 < refused < count
