"""What a checkpoint's tensors are, whatever their format, beside what a model wants of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from mm15_megatron.errors import CheckpointError
from mm15_megatron.utils.ranks import gathered_objects

_SHOWN: Final = 8


class ShardReading(Protocol):
    """Reads single shards of a checkpoint, as the ranks wrote them."""

    def __call__(self, key: str, offset: tuple[int, ...]) -> torch.Tensor:
        """Return the shard of a tensor that begins at ``offset`` of the whole; KeyError if there is none."""


class TensorFormat(Protocol):
    """How tensors lie in a folder; a module with these names is one."""

    def save_tensors(self, tensors: Mapping[str, ShardedTensor], folder: Path) -> list[Path]:
        """Write the tensors of all ranks; return the files that this rank wrote (every rank must call)."""

    def stored_shapes(self, folder: Path) -> dict[str, tuple[int, ...]]:
        """Return the key and the whole shape of every stored tensor."""

    def load_tensors(self, requests: Mapping[str, ShardedTensor], folder: Path) -> dict[str, torch.Tensor]:
        """Read the requested slices, on the CPU, in the requested dtype (every rank must call)."""

    def ShardReader(self, folder: Path) -> ShardReading:  # noqa: N802
        """Open the folder for reading single shards."""


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
    stored: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    *,
    ignored_prefixes: tuple[str, ...] = (),
) -> Mismatch:
    """Compare what is stored with what all ranks together expect (every rank must call).

    Args:
        stored: key and whole shape of each stored tensor.
        expected: key and whole shape of each tensor that this rank's model knows.
        ignored_prefixes: stored keys that nobody has to want.
    """
    wanted = {key: shape for share in gathered_objects(dict(expected)) for key, shape in share.items()}
    both = stored.keys() & wanted.keys()
    return Mismatch(
        missing=frozenset(wanted.keys() - stored.keys()),
        unknown=frozenset(key for key in stored.keys() - wanted.keys() if not key.startswith(ignored_prefixes)),
        reshaped={key: (stored[key], wanted[key]) for key in sorted(both) if stored[key] != wanted[key]},
    )


def check_contents(
    folder: Path,
    stored: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    *,
    ignored_prefixes: tuple[str, ...] = (),
) -> None:
    """Refuse a checkpoint that does not hold what all ranks together expect (every rank must call).

    Args:
        folder: where the tensors lie, for the message.
        stored: as in :func:`compare_contents`.
        expected: as there.
        ignored_prefixes: as there.

    Raises:
        CheckpointError: tensors are missing, unknown or of another shape; all are counted, the first ones listed.
    """
    if problems := compare_contents(stored, expected, ignored_prefixes=ignored_prefixes).problems():
        raise CheckpointError(
            f"{folder} does not hold this model and optimizer: " + "; ".join(problems),
            fix="resume with the configuration beside the checkpoint (config.txt), or start a new run directory",
        )


def damaged(folder: Path, cause: str) -> CheckpointError:
    """Return the error of tensors that cannot be read."""
    return CheckpointError(
        f"the checkpoint in {folder} cannot be read: {cause}",
        fix="name an older checkpoint of the run in its `latest` file, or restore the missing files",
    )


def _listing(what: str, keys: Collection[str]) -> str:
    if not keys:
        return ""
    shown = ", ".join(sorted(keys)[:_SHOWN])
    return f"{len(keys)} tensors {what} ({shown}{', ...' if len(keys) > _SHOWN else ''})"
