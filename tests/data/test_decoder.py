"""Decoders: DALI against Pillow, strange but legal images, and hostile ones that must never crash."""

from __future__ import annotations

import io
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mm15_megatron.config.schema import TilingConfig, VisionConfig
from mm15_megatron.data.image.decoder import ImageDecoder, build_decoder
from mm15_megatron.data.image.geometry import tile_plan
from mm15_megatron.data.image.pillow import check_image
from mm15_megatron.data.image.views import TileMaker
from mm15_megatron.errors import BackendError, DataError
from tests.data.images import encode_image, photo

# JPEG decoders may round differently by one level; both libraries use libjpeg-turbo here and agree exactly.
DALI_AGAINST_PILLOW_LEVELS = 1
MAX_PIXELS = 1_000_000


@pytest.fixture(scope="module", params=["dali", "pil"])
def decoder(request: pytest.FixtureRequest) -> ImageDecoder:
    return build_decoder(request.param, max_pixels=MAX_PIXELS)


def blob(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def decode(decoder: ImageDecoder, data: bytes, size: tuple[int, int]) -> tuple[torch.Tensor | None, str]:
    (result,) = decoder.decode([blob(data)], sizes=[size])
    return result.pixels_HWC, result.problem


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def rgb(height: int = 40, width: int = 60) -> Image.Image:
    return Image.open(io.BytesIO(photo(height, width))).convert("RGB")


def legal_images() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 8
    alpha = rgb().convert("RGBA")
    alpha.putalpha(100)
    frames = [rgb(), Image.new("RGB", (60, 40), "red")]
    return {
        "png": saved(rgb(), "PNG"),
        "jpeg": saved(rgb(), "JPEG"),
        "progressive": saved(rgb(), "JPEG", progressive=True, subsampling=0),
        "gray jpeg": saved(rgb().convert("L"), "JPEG"),
        "cmyk jpeg": saved(rgb().convert("CMYK"), "JPEG"),
        "gray png": saved(rgb().convert("L"), "PNG"),
        "palette png": saved(rgb().quantize(16), "PNG"),
        "one-bit png": saved(rgb().convert("1"), "PNG"),
        "alpha png": saved(alpha, "PNG"),
        "gray alpha png": saved(alpha.convert("LA"), "PNG"),
        "webp": saved(rgb(), "WEBP", lossless=True),
        "animated webp": saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True),
        "bmp": saved(rgb(), "BMP"),
        "tiff": saved(rgb(), "TIFF"),
        "tiff lzw": saved(rgb(), "TIFF", compression="tiff_lzw"),
        "exif jpeg": saved(rgb(60, 40), "JPEG", exif=exif),
        "exif png": saved(rgb(60, 40), "PNG", exif=exif),
        "gray 16-bit png": encode_image((np.arange(2400, dtype=np.uint16) * 27).reshape(40, 60)),
    }


@pytest.mark.parametrize("name", sorted(legal_images()))
def test_dali_equals_pillow(name: str) -> None:
    data = legal_images()[name]
    checked = check_image(data, max_pixels=MAX_PIXELS)
    assert (checked.height, checked.width) == (40, 60)
    pixels = []
    for library in ("dali", "pil"):
        found, problem = decode(build_decoder(library, max_pixels=MAX_PIXELS), data, (40, 60))
        assert found is not None, f"{library}: {problem}"
        assert (found.dtype, tuple(found.shape)) == (torch.uint8, (40, 60, 3))
        pixels.append(found.int())
    assert int((pixels[0] - pixels[1]).abs().max()) <= DALI_AGAINST_PILLOW_LEVELS


def test_sixteen_bit_gray_is_scaled_not_clipped(decoder: ImageDecoder) -> None:
    wide = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    found, _ = decode(decoder, encode_image(wide), (64, 64))
    assert found is not None
    assert np.abs(found[:, :, 0].numpy().astype(int) - wide / 257).max() <= 1


def png_bomb(side: int) -> bytes:
    """A tiny PNG that claims to be ``side`` x ``side``."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


HOSTILE = {
    "zero bytes": (b"", "no bytes"),
    "one byte": (b"\xff", "not an allowed image format"),
    "text": (b"<html>404</html>", "not an allowed image format"),
    "gif": (saved(rgb(), "GIF"), "GIF is refused"),
    "jpeg 2000": (saved(rgb(), "JPEG2000"), "JPEG 2000 is refused"),
    "jpeg 2000 codestream": (b"\xff\x4f\xff\x51" + bytes(60), "JPEG 2000 is refused"),
    "truncated png": (saved(rgb(), "PNG")[:-3000], "header|body"),
    "truncated jpeg": (saved(rgb(), "JPEG")[:700], "body"),
    "cut header": (saved(rgb(), "PNG")[:20], "header"),
    "magic alone": (b"\xff\xd8\xff\xe0", "header"),
    "bomb": (png_bomb(12000), "12000x12000 pixels, the limit is 1000000"),
    "broken body": (png_bomb(50), "50x50 pixels, the dataset says 40x60"),
    "another size": (saved(rgb(50, 60), "PNG"), "50x60 pixels, the dataset says 40x60"),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_bytes_are_named_and_never_crash(decoder: ImageDecoder, name: str) -> None:
    data, reason = HOSTILE[name]
    pixels, problem = decode(decoder, data, (40, 60))
    assert pixels is None
    assert re.search(reason, problem)


def test_a_bad_image_leaves_its_neighbours_bit_identical(decoder: ImageDecoder) -> None:
    good = [photo(30 + i, 40, seed=i, form="JPEG" if i % 2 else "PNG") for i in range(4)]
    sizes = [(30 + i, 40) for i in range(4)]
    alone = [decode(decoder, data, size)[0] for data, size in zip(good, sizes, strict=True)]
    mixed = [good[0], good[1][:700], good[1], b"junk", good[2], good[3]]
    found = decoder.decode([blob(data) for data in mixed], sizes=[sizes[i] for i in (0, 1, 1, 0, 2, 3)])
    assert [bool(result.problem) for result in found] == [False, True, False, True, False, False]
    for result, expected in zip((found[i] for i in (0, 2, 4, 5)), alone, strict=True):
        assert torch.equal(result.pixels_HWC, expected)
    assert decoder.decode([], sizes=[]) == []


def test_floating_point_images_are_refused() -> None:
    with pytest.raises(DataError, match="floating-point"):
        check_image(saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), max_pixels=MAX_PIXELS)


class DecoderInWorker(Dataset[str]):
    """Builds the GPU's decoder where a loader's worker would."""

    def __getitem__(self, index: int) -> str:
        build_decoder("dali_gpu", max_pixels=MAX_PIXELS)
        return "built"


def test_the_gpu_decoder_is_refused_in_a_worker_process() -> None:
    """A worker's current device is the first one, whatever the rank."""
    loader = DataLoader(DecoderInWorker(), sampler=[0], num_workers=1, multiprocessing_context="forkserver")
    with pytest.raises(BackendError, match="data.decoder=dali_gpu in a worker process"):
        next(iter(loader))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_the_gpu_decoder_is_refused_without_a_gpu() -> None:
    with pytest.raises(BackendError, match="data.decoder=dali_gpu, but DALI finds 0 CUDA devices") as refused:
        build_decoder("dali_gpu", max_pixels=MAX_PIXELS)
    assert "set data.decoder=dali" in refused.value.fix


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_a_device_that_fails_is_no_bad_image() -> None:
    """Else every image of the run would be replaced by the mean colour."""
    from mm15_megatron.data.image.decode_dali import DaliCodec

    decoder = ImageDecoder(DaliCodec(gpu=0), max_pixels=MAX_PIXELS)
    with pytest.raises(BackendError, match="data.decoder=dali_gpu: cuda:0 failed while it decoded"):
        decoder.decode([blob(photo(40, 60))], sizes=[(40, 60)])


def test_unknown_decoder_and_threads() -> None:
    with pytest.raises(DataError, match="unknown image decoder 'cv2'"):
        build_decoder("cv2", max_pixels=1)
    with pytest.raises(DataError, match="one thread, not 2"):
        build_decoder("pil", max_pixels=1, threads=2)


# --- Pixels to tiles


def test_tiles_are_resized_padded_and_cut_in_order(decoder: ImageDecoder) -> None:
    """A picture of four flat colours comes out as four flat tiles and an overview, padding at the bottom."""
    side = 28
    vision = VisionConfig(image_size=side, image_mean=(0.5, 0.5, 0.5), image_std=(0.25, 0.5, 1.0))
    quarters = np.zeros((56, 56, 3), np.uint8)
    quarters[:28, 28:], quarters[28:, :28], quarters[28:, 28:] = 80, 160, 240
    pixels, _ = decode(decoder, encode_image(quarters), (56, 56))
    plan = tile_plan(56, 56, tile_size=side, tiling=TilingConfig(mode="dynamic"))
    tiles = TileMaker(vision).tiles(pixels, plan)
    assert (tiles.dtype, tuple(tiles.shape)) == (torch.float32, (5, 3, side, side))
    for number, level in enumerate((0, 80, 160, 240)):
        expected = [(level / 255 - 0.5) / std for std in (0.25, 0.5, 1.0)]
        assert tiles[number, :, 14, 14].tolist() == pytest.approx(expected, abs=1e-6)
        assert torch.equal(tiles[number], tiles[number, :, 14:15, 14:15].expand(3, side, side))


def test_padding_is_the_mean_colour() -> None:
    white = torch.full((10, 40, 3), 255, dtype=torch.uint8)
    plan = tile_plan(10, 40, tile_size=28, tiling=TilingConfig(mode="none", resize="fit"))
    (tile,) = TileMaker(VisionConfig(image_size=28)).tiles(white, plan)
    assert bool((tile[:, :7] > 1).all())
    assert torch.equal(tile[:, 7:], torch.zeros(3, 21, 28))


def test_resize_is_close_to_pillow() -> None:
    """torch's antialiased uint8 bicubic equals Pillow's within two levels of 255."""
    picture = rgb(150, 200)
    pixels = torch.from_numpy(np.array(picture))
    vision = VisionConfig(image_size=56, image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0))
    (tile,) = TileMaker(vision).tiles(pixels, tile_plan(150, 200, tile_size=56, tiling=TilingConfig()))
    expected = np.array(picture.resize((56, 56), Image.Resampling.BICUBIC)).astype(np.float32)
    assert np.abs(tile.permute(1, 2, 0).numpy() * 255 - expected).max() <= 2.01
