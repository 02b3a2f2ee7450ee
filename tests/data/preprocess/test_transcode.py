"""GIF and AVIF become PNG with the same pixels; what a loader reads stays as it is."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, features

from mm15_megatron.data.image.pillow import check_image
from mm15_megatron.data.preprocess.transcode import foreign_format, transcoded
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
