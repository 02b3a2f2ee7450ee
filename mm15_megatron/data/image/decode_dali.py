"""The DALI seam: dynamic mode on the CPU, RGB only (any other output type is unsafe for gray JPEGs).

A process that has decoded with DALI must never fork; the loader's workers come from a forkserver.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch

from mm15_megatron.data.image.pillow import Bytes, DecodeFailure
from mm15_megatron.errors import BackendError

try:
    import nvidia.dali.experimental.dynamic as dynamic
    from nvidia.dali.types import DALIImageType
except (ImportError, OSError) as error:
    raise BackendError(
        f"data.decoder=dali, but DALI cannot be imported: {error}",
        fix="pip install nvidia-dali-cuda130==2.4.0 (it runs without a GPU), or set data.decoder=pil",
    ) from error

_DALI: Final[Any] = dynamic  # DALI's own annotations are partial
_FAILURES: Final = (RuntimeError, MemoryError, ValueError)


class DaliCodec:
    """Decode with DALI; tensors are zero-copy views of its memory."""

    def peek(self, data: Bytes) -> tuple[int, int]:
        """Return (height, width) after EXIF orientation, from the header alone."""
        try:
            shape = np.asarray(_DALI.peek_image_shape(_DALI.as_tensor(np.ascontiguousarray(data))))
        except _FAILURES as error:
            raise DecodeFailure(f"header: {_first_line(error)}") from error
        return int(shape[0]), int(shape[1])

    def decode(self, batch: Sequence[Bytes]) -> list[torch.Tensor]:
        """Return one uint8 [H, W, 3] tensor an image."""
        try:
            encoded = _DALI.as_batch([np.ascontiguousarray(data) for data in batch])
            pixels = _DALI.decoders.image(encoded, device="cpu", output_type=DALIImageType.RGB).evaluate()
            return [tensor.torch() for tensor in pixels.tensors]
        except _FAILURES as error:
            raise DecodeFailure(f"body: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def build_codec(*, threads: int) -> DaliCodec:
    """Return the codec; ``threads`` is DALI's, for the whole process."""
    _DALI.set_num_threads(threads)
    return DaliCodec()
