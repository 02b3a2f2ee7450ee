"""DALI's path against the Pillow reference, kind by kind, and both against what the picture is; the resize likewise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from mm15_megatron.config.schema import TilingConfig, VisionConfig
from mm15_megatron.data.image import decode_dali
from mm15_megatron.data.image.decoder import ImageDecoder, build_decoder
from mm15_megatron.data.image.geometry import View, tile_plan
from mm15_megatron.data.image.views import TileMaker

from .pictures import (
    HEIGHT,
    WIDTH,
    deep_png,
    encoded_pictures,
    interlaced_png,
    saved,
    scenes,
    upright_size,
    with_orientation,
)

MAX_PIXELS = 1_000_000
DALI_AGAINST_PILLOW_LEVELS = 1
"""Both libraries decode JPEG by libjpeg-turbo and agree exactly on every picture here; another build may round."""
JPEG_AGAINST_PICTURE = 6.0
"""Mean levels that JPEG of quality 95 changes in a photo; turned or swapped, the photo differs by tens."""
TORCH_RESIZE_LEVELS = 2.01
"""torch and Pillow round the weights of bytes in different places; the quotient by 255 adds the last digits."""
OTHER_ORDER_LEVELS, OTHER_ORDER_MEAN = 20, 1.0
"""Pillow resizes the rows of some tall pictures first, torch always the columns; bytes are clipped between the two. The
pictures here have the hardest edges there are, single pixels enlarged."""
DALI_RESIZE_LEVELS, DALI_RESIZE_MEAN = 16, 1.5
"""DALI keeps fractions between rows and columns, Pillow rounds and clips there: at sharp edges up to 14 levels."""
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[::-1],
}
"""How a viewer turns the stored pixels for each value of EXIF's orientation."""


@pytest.fixture(scope="module")
def decoders() -> dict[str, ImageDecoder]:
    return {name: build_decoder(name, max_pixels=MAX_PIXELS) for name in ("dali", "pil")}


def pixels(decoder: ImageDecoder, data: bytes, size: tuple[int, int]) -> np.ndarray:
    (found,) = decoder.decode([np.frombuffer(data, np.uint8)], sizes=[size])
    assert found.pixels_HWC is not None, found.problem
    assert found.pixels_HWC.dtype == torch.uint8
    return found.pixels_HWC.numpy().astype(int)


def both(decoders: dict[str, ImageDecoder], data: bytes, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    """The pixels by DALI, which are those by Pillow."""
    ours, reference = (pixels(decoders[name], data, size) for name in ("dali", "pil"))
    assert np.abs(ours - reference).max() <= DALI_AGAINST_PILLOW_LEVELS
    return ours


@pytest.mark.parametrize("name", sorted(encoded_pictures()))
def test_every_kind_of_picture(decoders: dict[str, ImageDecoder], name: str) -> None:
    both(decoders, encoded_pictures()[name], upright_size(name))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("value", TURNS)
def test_every_orientation(decoders: dict[str, ImageDecoder], form: str, value: int) -> None:
    options: dict[str, dict[str, object]] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    stored = scenes()["china"]
    expected = TURNS[value](np.asarray(stored).astype(int))
    data = saved(stored, form, exif=with_orientation(value), **options.get(form, {}))
    off = np.abs(both(decoders, data, expected.shape[:2]) - expected)
    assert off.mean() <= (JPEG_AGAINST_PICTURE if form == "JPEG" else 0)


def test_gray_is_three_equal_channels(decoders: dict[str, ImageDecoder]) -> None:
    gray = scenes()["flower"].convert("L")
    for form in ("PNG", "TIFF", "BMP"):
        assert np.array_equal(both(decoders, saved(gray, form)), np.asarray(gray.convert("RGB")))
    found = both(decoders, saved(gray, "JPEG", quality=95))
    assert np.array_equal(found[..., 0], found[..., 1])
    assert np.array_equal(found[..., 0], found[..., 2])


def test_cmyk_is_converted_not_reinterpreted(decoders: dict[str, ImageDecoder]) -> None:
    """Without a profile: red is (255 - cyan) x (255 - black) / 255, and so on."""
    ink = scenes()["china"].convert("CMYK")
    expected = np.asarray(ink.convert("RGB")).astype(int)
    assert np.abs(both(decoders, saved(ink, "TIFF")) - expected).max() <= DALI_AGAINST_PILLOW_LEVELS
    assert np.abs(both(decoders, saved(ink, "JPEG", quality=95, subsampling=0)) - expected).mean() <= 2
    both(decoders, encoded_pictures()["jpeg ycck"])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped_not_blended(decoders: dict[str, ImageDecoder], mode: str) -> None:
    image = scenes()["flower"].convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    expected = np.asarray(image.convert("RGB"))
    for form in ("PNG", "TIFF"):
        assert np.array_equal(both(decoders, saved(image, form)), expected)
    both(decoders, saved(image.convert("RGBA"), "WEBP"))


def test_sixteen_bits_are_scaled_to_eight(decoders: dict[str, ImageDecoder]) -> None:
    picture = np.asarray(scenes()["china"])
    wide = picture.astype(np.uint16) * 257
    opaque = np.concatenate([wide, np.full((HEIGHT, WIDTH, 1), 65535, np.uint16)], axis=2)
    for data in (deep_png(wide), deep_png(opaque), interlaced_png(wide)):
        assert np.array_equal(both(decoders, data), picture)
    gray = np.repeat(picture[..., :1], 3, axis=2)
    for form in ("PNG", "TIFF"):
        assert np.array_equal(both(decoders, saved(Image.fromarray(wide[..., 0]), form)), gray)


@pytest.mark.parametrize("colours", [2, 16, 250])
def test_a_palette_is_looked_up(decoders: dict[str, ImageDecoder], colours: int) -> None:
    indexed = scenes()["flower"].quantize(colours)
    expected = np.asarray(indexed.convert("RGB")).astype(int)
    for form in ("PNG", "BMP", "TIFF"):
        assert np.abs(both(decoders, saved(indexed, form)) - expected).max() <= DALI_AGAINST_PILLOW_LEVELS
    assert np.array_equal(both(decoders, saved(indexed, "PNG", transparency=1)), expected)


@pytest.mark.parametrize(("form", "options"), [("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})])
def test_an_animation_is_its_first_frame(
    decoders: dict[str, ImageDecoder], form: str, options: dict[str, object]
) -> None:
    first, *others = (scenes()[name] for name in ("china", "flower", "page"))
    data = saved(first, form, save_all=True, append_images=others, **options)
    assert np.array_equal(both(decoders, data), np.asarray(first))


# --- Resize


def resized_by_pillow(picture: Image.Image, height: int, width: int) -> np.ndarray:
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)


def cut_by_hand(picture: Image.Image, view: View, side: int) -> np.ndarray:
    """[N, 3, side, side] levels of the tiles of a view, resized by Pillow."""
    canvas = np.zeros((view.rows * side, view.columns * side, 3), np.float32)
    canvas[: view.height, : view.width] = resized_by_pillow(picture, view.height, view.width)
    return canvas.reshape(view.rows, side, view.columns, side, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, side, side)


@pytest.mark.parametrize("scene", sorted(scenes()))
@pytest.mark.parametrize(("height", "width"), [(200, 300), (61, 340), (30, 20), (450, 117)])
@pytest.mark.parametrize("tiling", [TilingConfig(mode="none"), TilingConfig(mode="none", resize="fit"), TilingConfig()])
def test_tiles_are_pillows_bicubic(scene: str, height: int, width: int, tiling: TilingConfig) -> None:
    """Each view of a picture, enlarged or shrunk, padded or not."""
    side = 56
    picture = scenes()[scene].resize((width, height), Image.Resampling.NEAREST)
    plan = tile_plan(height, width, tile_size=side, tiling=tiling)
    vision = VisionConfig(image_size=side, image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0))
    tiles = TileMaker(vision).tiles(torch.from_numpy(np.array(picture)), plan).numpy() * 255
    at = 0
    for view in plan.views:
        columns_first = picture.resize((view.width, height), Image.Resampling.BICUBIC)
        stop = at + view.rows * view.columns
        same_order = tiles[at:stop] - cut_by_hand(columns_first, view, side)
        any_order = tiles[at:stop] - cut_by_hand(picture, view, side)
        assert np.abs(same_order).max() <= TORCH_RESIZE_LEVELS
        assert np.abs(any_order).max() <= OTHER_ORDER_LEVELS
        assert np.abs(any_order).mean() <= OTHER_ORDER_MEAN
        at = stop
    assert at == len(tiles)


@pytest.mark.parametrize("scene", sorted(scenes()))
@pytest.mark.parametrize(("height", "width"), [(150, 200), (97, 33), (450, 600), (300, 400), (56, 56)])
def test_dalis_resize_is_pillows_bicubic(scene: str, height: int, width: int) -> None:
    """The resize of the GPU path, on the CPU."""
    picture = scenes()[scene].resize((400, 300))
    found = decode_dali.resized(torch.from_numpy(np.array(picture)), height, width)
    assert (found.dtype, tuple(found.shape)) == (torch.uint8, (3, height, width))
    off = np.abs(found.permute(1, 2, 0).numpy() - resized_by_pillow(picture, height, width))
    assert off.max() <= DALI_RESIZE_LEVELS
    assert off.mean() <= DALI_RESIZE_MEAN
