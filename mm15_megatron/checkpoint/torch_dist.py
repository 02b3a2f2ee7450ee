"""The ``torch_dist`` format: sharded tensors through megatron-core's dist_checkpointing, saved synchronously.

Loading is megatron-core's. For saving, its own strategy forks a writer process even when it is told to wait, and a
process in which an image decoder runs must not fork; the strategy here plans as megatron-core's does and writes from
the calling process.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from mm15_megatron.errors import CheckpointError

_SHOWN = 8
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
    """megatron-core's plan, written by this process: one file a rank, each synced to disk."""

    def save(self, sharded_state_dict: dict[str, ShardedTensor], checkpoint_dir: str | Path) -> None:
        """Write this rank's shards; rank 0 also writes the index (every rank must call)."""
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        save(
            mcore_to_pyt_state_dict(by_key, is_loading=False),
            storage_writer=FileSystemWriter(checkpoint_dir, single_file_per_rank=True, sync_files=True),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def save_tensors(tensors: Mapping[str, ShardedTensor], folder: Path) -> None:
    """Write the tensors of all ranks into an existing empty folder (every rank must call).

    Raises:
        CheckpointError: if the folder cannot be written.
    """
    try:
        dist_checkpointing.save(dict(tensors), str(folder), sharded_strategy=_SaveWithoutFork("torch_dist", 1))
    except (CheckpointException, OSError) as error:
        raise CheckpointError(
            f"the checkpoint could not be written to {folder}: {_cause(error)}",
            fix="check free space and permissions; the previous checkpoint is untouched",
        ) from error


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the key and the whole shape of every stored tensor.

    Raises:
        CheckpointError: if the folder is not a readable checkpoint.
    """
    try:
        stored = dist_checkpointing.load_tensors_metadata(str(folder))
    except _DAMAGE as error:
        raise _damaged(folder, error) from error
    return {key: tuple(tensor.global_shape) for key, tensor in stored.items()}


@dataclass(frozen=True)
class Mismatch:
    """Where what is stored differs from what all ranks together expect.

    Attributes:
        missing: expected keys that are not stored.
        unknown: stored keys that nobody expects.
        reshaped: by key, the stored whole shape and the expected one, where they differ.
    """

    missing: frozenset[str]
    unknown: frozenset[str]
    reshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    def without(self, reshaped: Collection[str]) -> Mismatch:
        """Return the same without these tensors of another shape."""
        left = {key: shapes for key, shapes in self.reshaped.items() if key not in reshaped}
        return replace(self, reshaped=left)

    def problems(self) -> list[str]:
        """Return a clause for each kind of difference that there is; all keys are counted, the first ones listed."""
        reshaped = {f"{key} {list(stored)}, here {list(here)}" for key, (stored, here) in self.reshaped.items()}
        clauses = [
            _listing("missing in the checkpoint", self.missing),
            _listing("unknown to this model", self.unknown),
            _listing("of another shape", reshaped),
        ]
        return [clause for clause in clauses if clause]


def compare_contents(
    folder: Path, expected: Mapping[str, tuple[int, ...]], *, ignored_prefixes: tuple[str, ...] = ()
) -> Mismatch:
    """Compare what is stored with what all ranks together expect (every rank must call).

    Args:
        folder: where the tensors lie.
        expected: key and whole shape of each tensor that this rank's model knows.
        ignored_prefixes: stored keys that nobody has to want.

    Raises:
        CheckpointError: if the folder is not a readable checkpoint.
    """
    stored = stored_shapes(folder)
    shares: list[Mapping[str, tuple[int, ...]]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, dict(expected))
    wanted = {key: shape for share in shares for key, shape in share.items()}
    both = stored.keys() & wanted.keys()
    return Mismatch(
        missing=frozenset(wanted.keys() - stored.keys()),
        unknown=frozenset(key for key in stored.keys() - wanted.keys() if not key.startswith(ignored_prefixes)),
        reshaped={key: (stored[key], wanted[key]) for key in sorted(both) if stored[key] != wanted[key]},
    )


def check_contents(
    folder: Path, expected: Mapping[str, tuple[int, ...]], *, ignored_prefixes: tuple[str, ...] = ()
) -> None:
    """Refuse a checkpoint that does not hold what all ranks together expect (every rank must call).

    Args:
        folder: as in :func:`compare_contents`.
        expected: as there.
        ignored_prefixes: as there.

    Raises:
        CheckpointError: tensors are missing, unknown or of another shape; all are counted, the first ones listed.
    """
    if problems := compare_contents(folder, expected, ignored_prefixes=ignored_prefixes).problems():
        raise CheckpointError(
            f"{folder} does not hold this model and optimizer: " + "; ".join(problems),
            fix="resume with the configuration beside the checkpoint (config.txt), or start a new run directory",
        )


def load_tensors(requests: Mapping[str, ShardedTensor], folder: Path) -> dict[str, torch.Tensor]:
    """Read the requested shards, on the CPU, in the requested dtype (every rank must call).

    Raises:
        CheckpointError: if files are damaged or gone.
    """
    try:
        # Several data-parallel ranks may want one shard, so nobody is its one reader.
        return dict(dist_checkpointing.load(dict(requests), str(folder), validate_access_integrity=False))
    except _DAMAGE as error:
        raise _damaged(folder, error) from error


def _listing(what: str, keys: Collection[str]) -> str:
    if not keys:
        return ""
    shown = ", ".join(sorted(keys)[:_SHOWN])
    return f"{len(keys)} tensors {what} ({shown}{', ...' if len(keys) > _SHOWN else ''})"


def _cause(error: BaseException) -> str:
    """The first failure of any rank, on one line."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {type(cause).__name__}: {cause}"
    return f"{type(error).__name__}: {error}"


def _damaged(folder: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint in {folder} cannot be read: {_cause(error)}",
        fix="name an older checkpoint of the run in its `latest` file, or restore the missing files",
    )
