"""The DALI seam: dynamic mode, on the CPU or on a GPU, RGB only (any other output type is unsafe for gray JPEGs).

DALI decodes JPEG, PNG and WebP. What is rare goes to Pillow, the reference, because of what nvImageCodec does with
broken files. Where its own decoder of TIFF or BMP gives up it falls back to OpenCV, which returns what it has (tiles
that it could not read, rows that are not there) without an error, and allocates what a tag states (12 GB and 25 s for a
TIFF of 14 kB that claims tiles of 65536 x 65536). Of a broken animated PNG it returns memory that was never written. Of
WebP's extended files it refuses lossless ones with EXIF and forgets to turn animated ones.

A process that has decoded with DALI must never fork; the loader's workers come from a forkserver.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from torch.utils.data import get_worker_info

from mm15_megatron.data.image import pillow
from mm15_megatron.data.image.containers import is_animated_png, is_plain_webp
from mm15_megatron.data.image.pillow import Bytes, DecodeFailure
from mm15_megatron.errors import BackendError

try:
    import nvidia.dali.experimental.dynamic as dynamic
    from nvidia.dali import backend
    from nvidia.dali.types import DALIImageType, DALIInterpType
except (ImportError, OSError) as error:
    raise BackendError(
        f"data.decoder asks for DALI, but it cannot be imported: {error}",
        fix="pip install nvidia-dali-cuda130==2.4.0 (it runs without a GPU), or set data.decoder=pil",
    ) from error

_DALI: Final[Any] = dynamic  # DALI's own annotations are partial
_BACKEND: Final[Any] = backend
_FAILURES: Final = (RuntimeError, MemoryError, ValueError)
_OF_THE_DEVICE: Final = ("cuda error", "cuda runtime", "cuda driver", "cudaerror", "out of memory")


class DaliCodec:
    """Decode with DALI; tensors are zero-copy views of its memory.

    Args:
        gpu: the CUDA device that decodes, and holds the pixels afterwards; None = the CPU. A GPU decodes JPEG itself,
            with the chroma upsampling of the CPU's decoder; DALI decodes PNG and WebP on the CPU for it.
    """

    def __init__(self, *, gpu: int | None = None) -> None:
        self._device = "cpu" if gpu is None else f"gpu:{gpu}"
        self._torch_device = torch.device("cpu" if gpu is None else f"cuda:{gpu}")
        # An option that DALI knows on a GPU alone; without it chroma differs from libjpeg-turbo's by tens of levels.
        self._options: dict[str, bool] = {} if gpu is None else {"jpeg_fancy_upsampling": True}

    def peek(self, data: Bytes) -> tuple[int, int]:
        """Return (height, width) after EXIF orientation, from the header alone."""
        if _is_for_pillow(data):
            return pillow.peek(data)
        try:
            shape = np.asarray(_DALI.peek_image_shape(_DALI.as_tensor(np.ascontiguousarray(data)), device="cpu"))
        except _FAILURES as error:
            raise DecodeFailure(f"header: {_first_line(error)}") from error
        return int(shape[0]), int(shape[1])

    def decode(self, batch: Sequence[Bytes]) -> list[torch.Tensor]:
        """Return one uint8 [H, W, 3] tensor an image, on the device that decodes.

        Raises:
            DecodeFailure: if an image is bad.
            BackendError: if not the image but the GPU failed: no other image would decode either.
        """
        rare = [_is_for_pillow(data) for data in batch]
        native = iter(self._decode_native([data for data, other in zip(batch, rare, strict=True) if not other]))
        return [
            torch.from_numpy(pillow.pixels_of(data)).to(self._torch_device) if other else next(native)
            for data, other in zip(batch, rare, strict=True)
        ]

    def _decode_native(self, batch: list[Bytes]) -> list[torch.Tensor]:
        if not batch:
            return []
        try:
            encoded = _DALI.as_batch([np.ascontiguousarray(data) for data in batch])
            pixels = _DALI.decoders.image(
                encoded, device=self._device, output_type=DALIImageType.RGB, **self._options
            ).evaluate()
            return [tensor.torch() for tensor in pixels.tensors]
        except _FAILURES as error:
            self._check_device(error)
            raise DecodeFailure(f"body: {_first_line(error)}") from error

    def _check_device(self, error: Exception) -> None:
        """Tell a broken device from a broken image: the former would turn every image into a substitute."""
        if self._torch_device.type == "cpu":
            return
        if isinstance(error, MemoryError) or any(word in str(error).lower() for word in _OF_THE_DEVICE):
            raise _broken(self._torch_device, error) from error
        try:
            torch.cuda.synchronize(self._torch_device)
        except (RuntimeError, AssertionError) as lasting:  # the latter from a torch without CUDA
            raise _broken(self._torch_device, lasting) from lasting


def resized(pixels_HWC: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize by DALI, bicubic and antialiased, where the pixels are; return uint8 [3, height, width].

    Args:
        pixels_HWC: uint8 [H, W, 3] on the CPU or a GPU.
        height: rows of the result.
        width: columns of the result.
    """
    encoded = _DALI.as_tensor(pixels_HWC, layout="HWC")
    small = _DALI.resize(encoded, size=[height, width], interp_type=DALIInterpType.INTERP_CUBIC, antialias=True)
    found: torch.Tensor = small.evaluate().torch()
    return found.permute(2, 0, 1)


def _is_for_pillow(data: Bytes) -> bool:
    kind = pillow.sniff(data)
    if kind == "png":
        return is_animated_png(data.tobytes())
    return not is_plain_webp(data[:16].tobytes()) if kind == "webp" else kind != "jpeg"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _broken(device: torch.device, error: BaseException) -> BackendError:
    return BackendError(
        f"data.decoder=dali_gpu: {device} failed while it decoded: {str(error).strip()}",
        fix="leave more memory to DALI or restart from the last checkpoint; data.decoder=dali decodes on the CPU",
    )


def build_codec(*, threads: int) -> DaliCodec:
    """Return the codec of the CPU; ``threads`` is DALI's, for the whole process."""
    _DALI.set_num_threads(threads)
    return DaliCodec()


def build_gpu_codec(*, threads: int) -> DaliCodec:
    """Return the codec of the process's current CUDA device; not yet run on a GPU.

    Args:
        threads: DALI's threads on the host, for the whole process.

    Raises:
        BackendError: without a CUDA device for DALI and torch, or in a worker process of a loader, whose current device
            is the first one whatever the rank.
    """
    fix = "set data.decoder=dali, which decodes on the CPU"
    if get_worker_info() is not None:
        raise BackendError(
            "data.decoder=dali_gpu in a worker process of the loader, which has no device of its own",
            fix="set data.num_workers=0: the training process then decodes on its own device; or " + fix,
        )
    if not (devices := _BACKEND.GetCUDADeviceCount()) or not torch.cuda.is_available():
        found = f"DALI finds {devices} CUDA devices, torch {torch.__version__} finds {torch.cuda.device_count()}"
        raise BackendError(f"data.decoder=dali_gpu, but {found}", fix=fix)
    _DALI.set_num_threads(threads)
    return DaliCodec(gpu=torch.cuda.current_device())
