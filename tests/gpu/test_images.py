"""DALI decodes and resizes on the GPU what Pillow does on the CPU, within bounds; a bad image harms no other.

The bounds of JPEG are stated, not measured: no GPU has run them yet.
"""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mm15_megatron.config.schema import TilingConfig, VisionConfig
from mm15_megatron.data.image.decoder import ImageDecoder, build_decoder
from mm15_megatron.data.image.geometry import tile_plan
from mm15_megatron.data.image.views import TileMaker
from tests.data.pictures import encoded_pictures, saved, scenes, upright_size

MAX_PIXELS = 1_000_000
LOSSLESS_LEVELS = 1
"""What DALI decodes on the CPU for the GPU, as tests/data/test_image_parity.py holds it on the CPU."""
JPEG_MEAN, JPEG_MAX = 1.0, 32
"""Levels of 255. DALI's own tests hold its decoders of CPU and GPU to a mean difference of one. The transform and the
conversion of colours round elsewhere in nvJPEG, so single samples may differ by more; swapped channels, a forgotten
orientation or another upsampling would change the mean by tens."""
RESIZE_MEAN, RESIZE_MAX = 1.5, 16
"""Levels of 255 for pixels that are equal before the resize: DALI keeps fractions between rows and columns, Pillow
rounds; on the CPU the largest difference over photos and pages is held to the same bound."""


@pytest.fixture(scope="module")
def decoder() -> ImageDecoder:
    return build_decoder("dali_gpu", max_pixels=MAX_PIXELS)


def blob(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def by_pillow(data: bytes, size: tuple[int, int]) -> torch.Tensor:
    (found,) = build_decoder("pil", max_pixels=MAX_PIXELS).decode([blob(data)], sizes=[size])
    assert found.pixels_HWC is not None, found.problem
    return found.pixels_HWC


@pytest.mark.parametrize("name", sorted(encoded_pictures()))
def test_the_gpu_decodes_like_pillow(decoder: ImageDecoder, name: str) -> None:
    data, size = encoded_pictures()[name], upright_size(name)
    (found,) = decoder.decode([blob(data)], sizes=[size])
    assert found.pixels_HWC is not None, found.problem
    assert found.pixels_HWC.is_cuda
    off = (found.pixels_HWC.cpu().float() - by_pillow(data, size).float()).abs()
    if name.startswith("jpeg"):
        assert float(off.mean()) <= JPEG_MEAN
        assert float(off.max()) <= JPEG_MAX
    else:
        assert float(off.max()) <= LOSSLESS_LEVELS


def test_a_bad_image_leaves_its_neighbours_as_they_are(decoder: ImageDecoder) -> None:
    good = [encoded_pictures()[name] for name in ("jpeg 420", "png rgb", "jpeg progressive", "webp lossy")]
    size = (64, 88)
    alone = [decoder.decode([blob(data)], sizes=[size])[0].pixels_HWC for data in good]
    mixed = [good[0], good[0][:1500], good[1], b"junk", good[1][:6000], good[2], good[3]]
    found = decoder.decode([blob(data) for data in mixed], sizes=[size] * len(mixed))
    assert [bool(result.problem) for result in found] == [False, True, False, True, True, False, False]
    for result, expected in zip((found[i] for i in (0, 2, 5, 6)), alone, strict=True):
        assert torch.equal(result.pixels_HWC, expected)


@pytest.mark.parametrize("name", sorted(scenes()))
@pytest.mark.parametrize("mode", ["none", "dynamic"])
def test_tiles_are_cut_from_pixels_resized_on_the_gpu(decoder: ImageDecoder, name: str, mode: str) -> None:
    """Equal pixels in, so that the difference is that of the resize."""
    picture = scenes()[name].resize((300, 200))
    data = saved(picture, "PNG")
    (found,) = decoder.decode([blob(data)], sizes=[(200, 300)])
    plan = tile_plan(200, 300, tile_size=56, tiling=TilingConfig(mode=mode))
    vision = VisionConfig(image_size=56, image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0))
    tiles = TileMaker(vision).tiles(found.pixels_HWC, plan)
    assert tiles.is_cuda
    at = 0
    for view in plan.views:
        small = Image.open(io.BytesIO(data)).resize((view.width, view.height), Image.Resampling.BICUBIC)
        canvas = np.zeros((view.rows * 56, view.columns * 56, 3), np.float32)
        canvas[: view.height, : view.width] = np.asarray(small)
        cut = canvas.reshape(view.rows, 56, view.columns, 56, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 56, 56)
        off = np.abs(tiles[at : at + len(cut)].cpu().numpy() * 255 - cut)
        assert off.mean() <= RESIZE_MEAN
        assert off.max() <= RESIZE_MAX
        at += len(cut)
    assert at == len(tiles)
