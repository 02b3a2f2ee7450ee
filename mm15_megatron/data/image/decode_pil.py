"""The Pillow codec: the reference the DALI path is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mm15_megatron.data.image import pillow
from mm15_megatron.data.image.pillow import Bytes
from mm15_megatron.errors import DataError


class PilCodec:
    """Decode with Pillow; 16-bit gray is scaled to 8 bits, alpha is dropped."""

    def peek(self, data: Bytes) -> tuple[int, int]:
        """Return (height, width) after EXIF orientation, from the header alone."""
        return pillow.peek(data)

    def decode(self, batch: Sequence[Bytes]) -> list[torch.Tensor]:
        """Return one uint8 [H, W, 3] tensor an image."""
        return [torch.from_numpy(pillow.pixels_of(data)) for data in batch]


def build_codec(*, threads: int) -> PilCodec:
    """Return the codec; Pillow decodes in the calling thread, so ``threads`` above one has no meaning.

    Raises:
        DataError: if more than one thread is asked for.
    """
    if threads != 1:
        raise DataError(f"the Pillow decoder has one thread, not {threads}", fix="use data.num_workers instead")
    return PilCodec()
