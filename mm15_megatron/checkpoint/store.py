"""Whole checkpoints, opened and loaded: tensors, the resolved configuration as flat text, and the numbers of the run.

    step_00001234/tensors/      the sharded tensors (``torch_dist.py``, ``zarr_format.py``), named by ``schema.py``
    step_00001234/config.txt    every option of the run that wrote it
    step_00001234/state.json    step, rows consumed, counters, digest of the data order, layout, versions
    step_00001234/proof.json    what every file must be (``proof.py``)

Random-number states are not stored: weights, data order and everything drawn while training are functions of the seed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from mm15_megatron.checkpoint import publish, schema, torch_dist, zarr_format
from mm15_megatron.checkpoint.contents import TensorFormat, check_contents
from mm15_megatron.checkpoint.proof import Proof, damaged_files, listing
from mm15_megatron.config.dump import Difference, diff, load_flat, value_text
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import CheckpointError, ConfigError
from mm15_megatron.utils.ranks import gathered_objects, on_every_rank, on_rank_zero

FORMAT_VERSION = 1
TENSORS, CONFIG, STATE = "tensors", "config.txt", "state.json"
_MODEL_SECTIONS = ("language", "moe", "vision", "connector")
TRAINING_ONLY = {
    "language.z_loss_coeff",
    "language.init_method_std",
    "moe.moe_aux_loss_coeff",
    "moe.moe_z_loss_coeff",
}
"""Options of the model's sections that a run may change when it resumes."""


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint, opened but not read.

    Attributes:
        folder: where it lies.
        config: the configuration of the run that wrote it.
        step: optimizer steps taken.
        optimizer_step: updates the optimizer applied (skipped steps do not count).
        data_digest: digest of the order of the training data.
        progress: the run's counters.
        layout: parallel sizes of the run that wrote it, for the record.
        versions: library versions of the run that wrote it, for the record.
    """

    folder: Path
    config: RunConfig
    step: int
    optimizer_step: int
    data_digest: str
    progress: Mapping[str, Any]
    layout: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def tensors(self) -> Path:
        """Where its tensors lie."""
        return self.folder / TENSORS

    @property
    def format(self) -> TensorFormat:
        """How they lie there."""
        return tensor_format(self.config.checkpoint.format)

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the key and the whole shape of every stored tensor (every rank must call).

        Raises:
            CheckpointError: a rank cannot read them.
        """
        return on_every_rank(lambda: self.format.stored_shapes(self.tensors))


def tensor_format(name: str) -> TensorFormat:
    """Return one of the formats of ``checkpoint.format``."""
    return zarr_format if name == "zarr" else torch_dist


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read what lies beside the tensors of a published checkpoint.

    Raises:
        CheckpointError: files are missing or damaged, or were written by a newer version of the format.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        config = load_flat((folder / CONFIG).read_text(encoding="utf-8"))
        found = state["format_version"]
        if found > FORMAT_VERSION:
            raise CheckpointError(
                f"{folder} has checkpoint format {found}, newer than this program's {FORMAT_VERSION}",
                fix="update the program",
            )
        return Checkpoint(
            folder=folder,
            config=config,
            step=state["step"],
            optimizer_step=state["optimizer_step"],
            data_digest=state["data_digest"],
            progress=state["progress"],
            layout=state["layout"],
            versions=state["versions"],
        )
    except (OSError, ValueError, TypeError, KeyError, ConfigError) as error:
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: {type(error).__name__}: {error}",
            fix=publish.offer_before(folder),
        ) from error


def open_latest(run_dir: str | Path) -> Checkpoint | None:
    """Open the checkpoint that the run's tracker names; None where nothing was ever published.

    Raises:
        CheckpointError: the tracker or the checkpoint is damaged.
    """
    folder = publish.tracked(publish.checkpoints_folder(run_dir))
    return open_checkpoint(folder) if folder is not None else None


def model_differences(saved: RunConfig, wanted: RunConfig) -> list[Difference]:
    """Return the options that define the model and differ (saved value first)."""
    return [
        change
        for change in diff(saved, wanted)
        if change.path.partition(".")[0] in _MODEL_SECTIONS and change.path not in TRAINING_ONLY
    ]


def check_same_model(checkpoint: Checkpoint, cfg: RunConfig) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        CheckpointError: lists every differing field with both values.
    """
    if changes := model_differences(checkpoint.config, cfg):
        listed = "".join(
            f"\n    {c.path}: {value_text(c.left)} in the checkpoint, {value_text(c.right)} here" for c in changes
        )
        raise CheckpointError(
            f"{checkpoint.folder} is a checkpoint of another model:{listed}",
            fix="restore these options, or start a new run directory",
        )


def check_same_optimizer(checkpoint: Checkpoint, cfg: RunConfig) -> None:
    """Refuse a checkpoint of an optimizer that keeps other moments.

    Raises:
        CheckpointError: says whose moments it holds.
    """
    saved, wanted = (_moments_of(config) for config in (checkpoint.config, cfg))
    if saved != wanted:
        raise CheckpointError(
            f"{checkpoint.folder} holds the moments of {saved}, and this run is {wanted}",
            fix="restore optimizer.name and optimizer.adafactor_beta1, or start a new run directory from the weights "
            f"alone: checkpoint.init_from={checkpoint.folder}",
        )


def _moments_of(cfg: RunConfig) -> str:
    if cfg.optimizer.name != "adafactor":
        return cfg.optimizer.name
    return f"adafactor with{'out' if cfg.optimizer.adafactor_beta1 is None else ''} momentum"


def check_files(checkpoint: Checkpoint) -> int:
    """Hold every file of a checkpoint against its proof, each on one rank (every rank must call).

    Returns:
        How many there are.

    Raises:
        CheckpointError: files are missing or changed; names them, and the newest older checkpoint that is whole.
    """
    proof = on_every_rank(lambda: Proof.read(checkpoint.folder))
    if problems := _damage(checkpoint.folder, proof):
        older = _newest_whole(checkpoint.folder)
        tracker = checkpoint.folder.parent / publish.TRACKER
        offer = f"write {older} into {tracker} to go on from the newest one before it that is whole"
        raise CheckpointError(
            f"{checkpoint.folder} is damaged: {listing(problems)}",
            fix=offer if older else "no older checkpoint is whole: restore these files from a copy",
        )
    return len(proof.files)


def _damage(folder: Path, proof: Proof) -> list[str]:
    """Hold every file against the proof, each on one rank; return what is wrong (every rank must call)."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = damaged_files(folder, proof, names=sorted(proof.files)[rank::ranks])
    return [problem for share in gathered_objects(mine) for problem in share]


def _newest_whole(damaged: Path) -> str:
    """Return the name of the newest older checkpoint whose files are what they were; "" if there is none.

    Every rank must call.
    """
    older = on_rank_zero(lambda: [path for path in publish.published(damaged.parent) if path.name < damaged.name])
    for path in reversed(older):
        try:
            proof = on_every_rank(functools.partial(Proof.read, path))
        except CheckpointError:
            continue
        if not _damage(path, proof):
            return path.name
    return ""


def load_training(
    checkpoint: Checkpoint,
    cfg: RunConfig,
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
) -> int:
    """Put a checkpoint's weights and optimizer state into a freshly built model (every rank must call).

    The layout, megatron-core's class of the optimizer and the dtype may differ from those of the run that saved it.

    Returns:
        How many files were checked and are what they were.

    Raises:
        CheckpointError: it holds another model or optimizer, lacks or adds tensors, or is damaged.
    """
    check_same_model(checkpoint, cfg)
    check_same_optimizer(checkpoint, cfg)
    checked = check_files(checkpoint)
    tensors = checkpoint.tensors
    wanted = schema.training_to_load(chunks, optimizer, optimizer_step=checkpoint.optimizer_step)
    expected = schema.expected_shapes(chunks, wanted.tensors)
    stored = checkpoint.stored_shapes()
    check_contents(tensors, stored, expected, ignored_prefixes=(schema.FP8_PREFIX,))
    scaling = schema.amax_to_load(chunks, stored)
    loaded = checkpoint.format.load_tensors({**wanted.tensors, **scaling.tensors}, tensors)
    scaling.restore(loaded)  # first: weights kept in FP8 are cast by these scales
    wanted.restore(loaded)
    return checked


def load_weights(checkpoint: Checkpoint, cfg: RunConfig, chunks: Sequence[nn.Module]) -> None:
    """Put a checkpoint's weights into a model, without any optimizer (every rank must call).

    Raises:
        CheckpointError: it holds another model, lacks or adds parameters, or is damaged.
    """
    check_same_model(checkpoint, cfg)
    check_files(checkpoint)
    tensors = checkpoint.tensors
    expected = schema.expected_shapes(chunks)
    stored = checkpoint.stored_shapes()
    check_contents(tensors, stored, expected, ignored_prefixes=(schema.OPTIMIZER_PREFIX, schema.FP8_PREFIX))
    wanted = schema.weights_to_load(chunks)
    wanted.restore(checkpoint.format.load_tensors(wanted.tensors, tensors))
