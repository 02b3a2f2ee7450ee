"""The ``torch_dist`` format: sharded tensors through megatron-core's dist_checkpointing, saved synchronously.

Loading is megatron-core's. For saving, its own strategy forks a writer process even when it is told to wait, and a
process in which an image decoder runs must not fork; the strategy here plans as megatron-core's does and writes from
the calling process.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from mm15_megatron.checkpoint.contents import damaged
from mm15_megatron.errors import CheckpointError
from mm15_megatron.utils.ranks import on_rank_zero

_BACKEND, _VERSION = "torch_dist", 1
_FILES = 2  # that a rank writes, as megatron-core's own writer does
_DAMAGE = (
    CheckpointException,
    CheckpointingException,
    OSError,
    RuntimeError,
    EOFError,
    UnpicklingError,
    KeyError,
    ValueError,
)


class _SaveWithoutFork(SaveShardedStrategy):  # type: ignore[misc]
    """megatron-core's plan, written by threads of this process: a file each, synced to disk."""

    def save(self, sharded_state_dict: dict[str, ShardedTensor], checkpoint_dir: str | Path) -> None:
        """Write this rank's shards; rank 0 also writes the index (every rank must call)."""
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        # "single" means one a thread: several files let the disk sync one while another is made
        writer = FileSystemWriter(checkpoint_dir, single_file_per_rank=True, sync_files=True, thread_count=_FILES)
        save(
            mcore_to_pyt_state_dict(by_key, is_loading=False),
            storage_writer=writer,
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def save_tensors(tensors: Mapping[str, ShardedTensor], folder: Path) -> list[Path]:
    """Write the tensors of all ranks into an existing empty folder (every rank must call).

    Returns:
        The files that this rank wrote.

    Raises:
        CheckpointError: if the folder cannot be written.
    """
    try:
        sharded, common = save_preprocess(dict(tensors))  # every shard of the whole has one writer
        on_rank_zero(lambda: _describe(folder, common))
        _SaveWithoutFork(_BACKEND, _VERSION).save(sharded, folder)
    except (CheckpointException, OSError) as error:
        raise CheckpointError(
            f"the checkpoint could not be written to {folder}: {_cause(error)}",
            fix="check free space and permissions; the previous checkpoint is untouched",
        ) from error
    return _files_of_rank(folder, torch.distributed.get_rank())


class ShardReader:
    """Reads single shards, as the ranks wrote them, past the system's cache of the files.

    Args:
        folder: where the tensors lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        places = FileSystemReader(folder).read_metadata().storage_data
        self._places = {(index.fqn, tuple(index.offset or ())): place for index, place in places.items()}

    def __call__(self, key: str, offset: tuple[int, ...]) -> torch.Tensor:
        """Return the shard of a tensor that begins at ``offset`` of the whole, on the CPU.

        Raises:
            KeyError: there is none.
        """
        place = self._places[key, offset]
        with (self._folder / place.relative_path).open("rb") as stream:
            os.posix_fadvise(stream.fileno(), place.offset, place.length, os.POSIX_FADV_DONTNEED)
            stream.seek(place.offset)
            content = io.BytesIO(stream.read(place.length))
        shard: torch.Tensor = torch.load(content, map_location="cpu", weights_only=True)
        return shard


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the key and the whole shape of every stored tensor.

    Raises:
        CheckpointError: if the folder is not a readable checkpoint.
    """
    try:
        stored = dist_checkpointing.load_tensors_metadata(str(folder))
    except _DAMAGE as error:
        raise damaged(folder, _cause(error)) from error
    return {key: tuple(tensor.global_shape) for key, tensor in stored.items()}


def load_tensors(requests: Mapping[str, ShardedTensor], folder: Path) -> dict[str, torch.Tensor]:
    """Read the requested shards, on the CPU, in the requested dtype (every rank must call).

    Raises:
        CheckpointError: if files are damaged or gone.
    """
    try:
        # Several data-parallel ranks may want one shard, so nobody is its one reader.
        return dict(dist_checkpointing.load(dict(requests), str(folder), validate_access_integrity=False))
    except _DAMAGE as error:
        raise damaged(folder, _cause(error)) from error


def _cause(error: BaseException) -> str:
    """The first failure of any rank, on one line."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {type(cause).__name__}: {cause}"
    return f"{type(error).__name__}: {error}"


def _describe(folder: Path, common: dict[str, object]) -> None:
    """Write the two small files by which megatron-core knows a checkpoint of its own.

    Here and not by megatron-core: an error of this one rank must reach the others.
    """
    try:
        TorchCommonSaveStrategy("torch", 1).save_common(common, folder)
        save_config(CheckpointingConfig(_BACKEND, _VERSION), str(folder))
    except RuntimeError as error:  # torch's own words for a full disk
        raise OSError(str(error)) from error


def _files_of_rank(folder: Path, rank: int) -> list[Path]:
    """Return the files that a rank wrote; rank 0 wrote the index, too."""
    written = [path for path in folder.iterdir() if path.name.startswith(f"__{rank}_")]
    if rank == 0:
        written += [path for path in folder.iterdir() if not path.name.startswith("__")]
    return sorted(written)
