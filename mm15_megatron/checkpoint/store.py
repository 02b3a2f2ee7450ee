"""Save and load whole checkpoints: tensors, the resolved configuration as flat text, and the numbers of the run.

    step_00001234/tensors/      the sharded tensors (``torch_dist.py``), named by ``schema.py``
    step_00001234/config.txt    every option of the run that wrote it
    step_00001234/state.json    step, rows consumed, counters, digest of the data order, layout, versions

Random-number states are not stored: weights, data order and everything drawn while training are functions of the seed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from mm15_megatron.checkpoint import publish, schema, torch_dist
from mm15_megatron.checkpoint.retention import apply_retention
from mm15_megatron.config.dump import Difference, diff, dump_flat, load_flat, value_text
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import CheckpointError, ConfigError
from mm15_megatron.parallel.topology import Topology
from mm15_megatron.utils.ranks import on_rank_zero

FORMAT_VERSION = 1
_TENSORS, _CONFIG, _STATE = "tensors", "config.txt", "state.json"
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
        return self.folder / _TENSORS


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read what lies beside the tensors of a published checkpoint.

    Raises:
        CheckpointError: files are missing or damaged, or were written by a newer version of the format.
    """
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        config = load_flat((folder / _CONFIG).read_text(encoding="utf-8"))
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
            fix="name another checkpoint of the run in its `latest` file",
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


def save_checkpoint(
    cfg: RunConfig,
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    *,
    topology: Topology,
    step: int,
    data_digest: str,
    progress: Mapping[str, Any],
) -> Path:
    """Write, publish and track a checkpoint of this step, then delete old ones (every rank must call).

    Args:
        cfg: the run's configuration; decides where and how many are kept.
        chunks: this rank's wrapped model chunks.
        optimizer: its optimizer.
        topology: the layout.
        step: optimizer steps taken.
        data_digest: digest of the order of the training data.
        progress: the run's counters, JSON values; rank 0's are stored.

    Raises:
        CheckpointError: if it could not be written; the previous one stays tracked.
    """
    folder = publish.checkpoints_folder(cfg.train.run_dir)
    state = schema.state_to_save(chunks, optimizer, topology=topology)
    meta = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "optimizer_step": state.optimizer_step,
        "data_digest": data_digest,
        "progress": dict(progress),
        "layout": {"world_size": topology.place.world_size, **asdict(cfg.parallel)},
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
    }

    def begin() -> Path:
        writing = publish.begin(folder, step)
        (writing / _TENSORS).mkdir()
        (writing / _CONFIG).write_text(dump_flat(cfg), encoding="utf-8")
        (writing / _STATE).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        return writing

    def finish() -> Path:
        final = publish.publish(writing, step=step)
        apply_retention(folder, keep=cfg.checkpoint.keep)
        return final

    try:
        writing = on_rank_zero(begin)
        torch_dist.save_tensors(state.tensors, writing / _TENSORS)
        return on_rank_zero(finish)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written: {error}",
            fix="check free space and permissions; the previous checkpoint is untouched",
        ) from error


def load_training(
    checkpoint: Checkpoint,
    cfg: RunConfig,
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
) -> None:
    """Put a checkpoint's weights and optimizer state into a freshly built model (every rank must call).

    The layout, megatron-core's class of the optimizer and the dtype may differ from those of the run that saved it.

    Raises:
        CheckpointError: it holds another model or optimizer, lacks or adds tensors, or is damaged.
    """
    check_same_model(checkpoint, cfg)
    check_same_optimizer(checkpoint, cfg)
    tensors = checkpoint.tensors
    wanted = schema.training_to_load(chunks, optimizer, optimizer_step=checkpoint.optimizer_step)
    expected = schema.expected_shapes(chunks, wanted.tensors)
    torch_dist.check_contents(tensors, expected, ignored_prefixes=(schema.FP8_PREFIX,))
    scaling = schema.amax_to_load(chunks, torch_dist.stored_shapes(tensors))
    loaded = torch_dist.load_tensors({**wanted.tensors, **scaling.tensors}, tensors)
    scaling.restore(loaded)  # first: weights kept in FP8 are cast by these scales
    wanted.restore(loaded)


def load_weights(checkpoint: Checkpoint, cfg: RunConfig, chunks: Sequence[nn.Module]) -> None:
    """Put a checkpoint's weights into a model, without any optimizer (every rank must call).

    Raises:
        CheckpointError: it holds another model, lacks or adds parameters, or is damaged.
    """
    check_same_model(checkpoint, cfg)
    tensors = checkpoint.tensors
    expected = schema.expected_shapes(chunks)
    torch_dist.check_contents(tensors, expected, ignored_prefixes=(schema.OPTIMIZER_PREFIX, schema.FP8_PREFIX))
    wanted = schema.weights_to_load(chunks)
    wanted.restore(torch_dist.load_tensors(wanted.tensors, tensors))
