"""The ``zarr`` format (version 3): one array a stored tensor, which ``zarr.open`` reads anywhere.

    tensors/zarr.json                       a group
    tensors/<key>/zarr.json                 an array of the whole tensor's shape, named by ``schema.py``
    tensors/<key>/c/<i>/<j>                 a shard: the slice that one rank held and wrote, alone

A shard holds chunks of at most ``_CHUNK_BYTES``, so that another layout reads little more than it wants. Nothing is
compressed: weights hardly are compressible. zarr has no bfloat16, so it is stored as uint16, bit by bit, and the
attribute ``dtype`` says so.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import zarr
from megatron.core.dist_checkpointing import ShardedTensor

from mm15_megatron.checkpoint.contents import damaged
from mm15_megatron.errors import CheckpointError
from mm15_megatron.utils.files import sync_to_disk
from mm15_megatron.utils.ranks import gathered_objects, on_every_rank, on_rank_zero

_CHUNK_BYTES: Final = 16 << 20
_LEAST_BYTES: Final = 1 << 20
_ALWAYS: Final = {"write_empty_chunks": True}  # a shard of zeros is a file, too: one that is missing was lost
_STORED_AS: Final = {torch.bfloat16: torch.uint16}
_DAMAGE = (OSError, ValueError, KeyError, RuntimeError)

Shapes = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


def save_tensors(tensors: Mapping[str, ShardedTensor], folder: Path) -> list[Path]:
    """Write the tensors of all ranks into an existing empty folder (every rank must call).

    Returns:
        The files that this rank wrote.

    Raises:
        CheckpointError: if the folder cannot be written, by any rank.
    """
    mine = {key: (tuple(t.global_shape), tuple(t.local_shape), t.dtype) for key, t in tensors.items()}
    wanted: dict[str, Shapes] = {key: shapes for share in gathered_objects(mine) for key, shapes in share.items()}
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    group = on_rank_zero(lambda: _describe_group(folder))
    mine_to_describe = sorted(wanted)[rank::ranks]
    described = on_every_rank(
        lambda: _written(folder, lambda: [_describe(folder, key, wanted[key]) for key in mine_to_describe])
    )
    written = on_every_rank(lambda: _written(folder, lambda: _write_shards(folder, tensors)))
    return [*written, *described, *([group] if rank == 0 else [])]


def _written(folder: Path, work: Callable[[], list[Path]]) -> list[Path]:
    try:
        return work()
    except _DAMAGE as error:
        raise CheckpointError(
            f"the checkpoint could not be written to {folder}: {type(error).__name__}: {error}",
            fix="check free space and permissions; the previous checkpoint is untouched",
        ) from error


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the key and the whole shape of every stored tensor.

    Raises:
        CheckpointError: if the folder is not a readable checkpoint.
    """
    try:
        group = zarr.open_group(folder, mode="r")
        return {key: tuple(array.shape) for key, array in group.arrays()}
    except _DAMAGE as error:
        raise damaged(folder, f"{type(error).__name__}: {error}") from error


def load_tensors(requests: Mapping[str, ShardedTensor], folder: Path) -> dict[str, torch.Tensor]:
    """Read the requested slices, on the CPU, in the requested dtype (every rank must call).

    Raises:
        CheckpointError: if files are damaged or gone, for any rank.
    """
    return on_every_rank(lambda: _load(requests, folder))


class ShardReader:
    """Reads single shards, as the ranks wrote them, past the system's cache of the files.

    Args:
        folder: where the tensors lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, key: str, offset: tuple[int, ...]) -> torch.Tensor:
        """Return the shard of a tensor that begins at ``offset`` of the whole, on the CPU.

        Raises:
            KeyError: there is none.
        """
        if not (self._folder / key).is_dir():
            raise KeyError(key)
        shape = tuple(zarr.open_array(self._folder / key, mode="r").shards)
        with _shard(self._folder, key, offset, shape).open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return _read(self._folder, key, offset, shape)


def _load(requests: Mapping[str, ShardedTensor], folder: Path) -> dict[str, torch.Tensor]:
    try:
        return {
            key: _read(folder, key, tuple(one.global_offset), tuple(one.local_shape)).to(one.dtype)
            for key, one in requests.items()
        }
    except _DAMAGE as error:
        raise damaged(folder, f"{type(error).__name__}: {error}") from error


def _describe_group(folder: Path) -> Path:
    zarr.create_group(folder)
    return folder / "zarr.json"


def _describe(folder: Path, key: str, shapes: Shapes) -> Path:
    """Write what describes an array; the ranks write into it."""
    whole, local, dtype = shapes
    zarr.create_array(
        folder / key,
        shape=whole,
        shards=local,
        chunks=_chunk(local, dtype.itemsize),
        dtype=str(_plain(torch.empty(0, dtype=dtype)).dtype),
        compressors=None,
        fill_value=0,
        attributes={"dtype": str(dtype).removeprefix("torch.")},
    )
    return folder / key / "zarr.json"


def _chunk(shard: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Cut a shard along its first dimensions into equal chunks of ``_CHUNK_BYTES`` or less.

    What cannot be cut into equal parts of ``_LEAST_BYTES`` at least (a length may be prime) stays whole.
    """
    chunk = list(shard)
    for dim, length in enumerate(shard):
        row = math.prod(chunk[dim + 1 :]) * itemsize
        if length * row <= _CHUNK_BYTES:
            break
        fitting = min(length, max(1, _CHUNK_BYTES // row))
        part = max(n for n in range(1, fitting + 1) if length % n == 0)
        if part * row < _LEAST_BYTES:
            break
        chunk[dim] = part
    return tuple(chunk)


def _write_shards(folder: Path, tensors: Mapping[str, ShardedTensor]) -> list[Path]:
    """Write this rank's shards; one is synced to disk while the next is made."""
    with ThreadPoolExecutor(max_workers=1) as disk:
        syncs = {path: disk.submit(sync_to_disk, path) for path in (_write(folder, *item) for item in tensors.items())}
        for one in syncs.values():
            one.result()
    return list(syncs)


def _write(folder: Path, key: str, tensor: ShardedTensor) -> Path:
    offset, local = tuple(tensor.global_offset), tuple(tensor.local_shape)
    array: Any = zarr.open_array(folder / key, mode="r+").with_config(_ALWAYS)
    array[_slices(offset, local)] = _plain(tensor.data.detach().cpu())
    return _shard(folder, key, offset, local)


def _read(folder: Path, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    array: Any = zarr.open_array(folder / key, mode="r")
    dtype = getattr(torch, array.attrs["dtype"])
    return torch.from_numpy(np.asarray(array[_slices(offset, shape)])).view(dtype)


def _plain(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """View a tensor in a dtype that numpy and zarr know."""
    found: np.ndarray[Any, Any] = tensor.contiguous().view(_STORED_AS.get(tensor.dtype, tensor.dtype)).numpy()
    return found


def _slices(offset: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(first, first + count) for first, count in zip(offset, shape, strict=True))


def _shard(folder: Path, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Path:
    return folder.joinpath(key, "c", *(str(first // count) for first, count in zip(offset, shape, strict=True)))
