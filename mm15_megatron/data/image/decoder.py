"""Decoding that never crashes: allowed magic bytes, size checked first, a bad image harms no other.

Legend: H, W pixels of an image; C = 3 channels (RGB).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from mm15_megatron.data.image.pillow import Bytes, DecodeFailure, check_container
from mm15_megatron.errors import DataError


class ImageCodec(Protocol):
    """An image library. Both methods raise :class:`DecodeFailure` and nothing else for bad bytes."""

    def peek(self, data: Bytes) -> tuple[int, int]:
        """Return (height, width) after EXIF orientation, from the header alone."""
        ...

    def decode(self, batch: Sequence[Bytes]) -> list[torch.Tensor]:
        """Return one uint8 [H, W, 3] tensor an image, EXIF orientation applied; any bad image may fail all."""
        ...


@dataclass(frozen=True)
class Decoded:
    """One image: uint8 [H, W, 3], or None and the reason."""

    pixels_HWC: torch.Tensor | None
    problem: str = ""


class ImageDecoder:
    """Decode batches of encoded images by one codec and the safety rules.

    Args:
        codec: the library that decodes.
        max_pixels: images with more pixels are refused before they are decoded.
    """

    def __init__(self, codec: ImageCodec, *, max_pixels: int) -> None:
        self._codec = codec
        self._max_pixels = max_pixels

    def decode(self, images: Sequence[Bytes], *, sizes: Sequence[tuple[int, int]]) -> list[Decoded]:
        """Decode ``images``; a bad one yields a reason, the others are what they would be alone.

        Args:
            images: encoded bytes.
            sizes: the (height, width) each image must have; another size is a bad image.
        """
        results: list[Decoded] = [Decoded(None)] * len(images)
        good: list[int] = []
        for index, (data, size) in enumerate(zip(images, sizes, strict=True)):
            try:
                self._check_header(data, size)
            except DecodeFailure as failure:
                results[index] = Decoded(None, str(failure))
            else:
                good.append(index)
        for index, decoded in zip(good, self._decode_checked([images[i] for i in good]), strict=True):
            results[index] = _of_size(decoded, sizes[index])
        return results

    def _check_header(self, data: Bytes, size: tuple[int, int]) -> None:
        check_container(data, max_pixels=self._max_pixels)
        height, width = self._codec.peek(data)
        if height < 1 or width < 1 or height * width > self._max_pixels:
            raise DecodeFailure(f"{height}x{width} pixels, the limit is {self._max_pixels}")
        if (height, width) != size:
            raise DecodeFailure(f"{height}x{width} pixels, the dataset says {size[0]}x{size[1]}")

    def _decode_checked(self, images: list[Bytes]) -> list[Decoded]:
        if not images:
            return []
        try:
            return [Decoded(pixels) for pixels in self._codec.decode(images)]
        except DecodeFailure as failure:
            if len(images) == 1:
                return [Decoded(None, str(failure))]
        return [self._decode_checked([image])[0] for image in images]  # one by one: find the bad, keep the rest


def _of_size(decoded: Decoded, size: tuple[int, int]) -> Decoded:
    pixels = decoded.pixels_HWC
    if pixels is None or tuple(pixels.shape) == (*size, 3):
        return decoded
    return Decoded(None, f"decoded to {tuple(pixels.shape)}, the header says {size[0]}x{size[1]}")


def build_decoder(name: str, *, max_pixels: int, threads: int = 1) -> ImageDecoder:
    """Build the decoder ``data.decoder`` asks for; the library is imported here and not before.

    Args:
        name: dali (on the CPU) | dali_gpu (on the process's CUDA device, where the pixels stay) | pil.
        max_pixels: see :class:`ImageDecoder`.
        threads: threads of the native decoder.

    Raises:
        DataError: for another name.
        BackendError: if the library cannot be imported, or the device it needs is not there.
    """
    builders = {
        "dali": ("decode_dali", "build_codec"),
        "dali_gpu": ("decode_dali", "build_gpu_codec"),
        "pil": ("decode_pil", "build_codec"),
    }
    if name not in builders:
        raise DataError(f"unknown image decoder {name!r}", fix=f"set data.decoder to one of {', '.join(builders)}")
    module, builder = builders[name]
    found = importlib.import_module(f"mm15_megatron.data.image.{module}")
    codec: ImageCodec = vars(found)[builder](threads=threads)
    return ImageDecoder(codec, max_pixels=max_pixels)
