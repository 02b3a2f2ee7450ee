"""Memory that a rank and the process beside it both see, for the tensors of a snapshot on their way to disk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from mm15_megatron.errors import CheckpointError

_ALIGNMENT = 64
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the shared memory.

    Attributes:
        first: its first byte.
        dtype: of its values.
        shape: of the tensor.
    """

    first: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """The tensor at this place of a memory (uint8 [bytes])."""
        return memory[self.first : self.first + self.num_bytes].view(self.dtype).view(self.shape)


class Staging:
    """The rank's side: grows to the largest snapshot and stays.

    Copies from a device go to pinned pages: at the bus's rate, all of them asked for before one wait. Where the driver
    cannot pin pages that are shared, they are copied as from ordinary memory.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.pinned = False

    def hold(self, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Place], bool]:
        """Copy tensors into the memory; they may change as soon as this returns.

        Returns:
            Places by key, and whether the memory is another one than before.

        Raises:
            CheckpointError: there is not so much shared memory.
        """
        places, first = {}, 0
        for key, tensor in tensors.items():
            places[key] = Place(first, tensor.dtype, tuple(tensor.shape))
            first += -(-places[key].num_bytes // _ALIGNMENT) * _ALIGNMENT
        on_device = any(tensor.is_cuda for tensor in tensors.values())
        grown = first > len(self.memory)
        if grown:
            self.release()
            self.memory = _shared(first)
            self.pinned = on_device and self.pin()
        for key, place in places.items():
            place.view(self.memory).copy_(tensors[key], non_blocking=True)
        if on_device:
            torch.cuda.current_stream().synchronize()
        return places, grown

    def pin(self) -> bool:
        """Ask the driver to pin the memory; return whether it did."""
        runtime = torch.cuda.cudart()
        answer = runtime.cudaHostRegister(self.memory.data_ptr(), self.memory.nbytes, 0)
        if answer == runtime.cudaError.success:
            return True
        with suppress(RuntimeError):  # CUDA reports the refusal once more, to the next kernel
            torch.zeros(1, device="cuda")
        return False

    def release(self) -> None:
        """Give the memory back (the other process may still see it)."""
        if self.pinned:
            torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr())
        self.memory, self.pinned = torch.empty(0, dtype=torch.uint8), False


def _shared(size: int) -> torch.Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8).share_memory_()
    except RuntimeError as error:
        free = shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else 0
        raise CheckpointError(
            f"the snapshot needs {size / 2**20:,.1f} MiB of shared memory, and {free / 2**20:,.1f} MiB are free in "
            f"{_SHARED_MEMORY}: {error}",
            fix="enlarge it (docker run --shm-size, or a larger tmpfs), or set checkpoint.async_save=false",
        ) from error
