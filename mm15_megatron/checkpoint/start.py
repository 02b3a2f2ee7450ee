"""The weights of a checkpoint as the first weights of another run (``checkpoint.init_from``).

Nothing else of the checkpoint is taken: moments, step, counters and data order are fresh. Its layout and dtype may be
others. Its model must be the same, but for what only training reads, and for the size of the image: MM1 and MM1.5
raise the resolution between stages and interpolate the encoder's position embeddings (MM1 after Qwen-VL and BLIP-2,
whose releases resize the grid of patches bicubically, with half-pixel centres, and keep other tokens; Qwen-VL's in
fp32). That is ``vision_encoder.interpolate_positions``. A connector with positions on the patches has a table of the
same grid, so it is resized with the encoder's (the papers do not say so). A run that keeps the old table by
``vision.position_grid_size`` has nothing to resize here: its table is interpolated in each forward pass.

G: tokens of a position table; D: width of the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from mm15_megatron.checkpoint import publish, schema
from mm15_megatron.checkpoint.contents import Mismatch, compare_contents
from mm15_megatron.checkpoint.store import (
    TRAINING_ONLY,
    Checkpoint,
    check_files,
    model_differences,
    open_checkpoint,
    open_latest,
)
from mm15_megatron.config.dump import value_text
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import CheckpointError
from mm15_megatron.models.vision_encoder import interpolate_positions

MAY_DIFFER = TRAINING_ONLY | {
    "vision.image_size",
    "vision.position_grid_size",
    "moe.moe_router_load_balancing_type",
    "moe.moe_expert_capacity_factor",
    "moe.moe_capacity_group_size",
    "moe.moe_token_drop_policy",
}
"""Options of the model's sections in which a run may differ from the one it starts from: the size of the image, and
what evaluation does not read (it drops no token)."""


@dataclass(frozen=True)
class ResizedTable:
    """A position table that is interpolated from the checkpoint's grid to this run's.

    Attributes:
        name: global name of the parameter.
        stored_grid: patches along one side of the checkpoint's grid.
        grid: patches along one side of this run's grid.
        prefix_tokens: rows at the front that belong to no patch and are kept.
        width: D.
    """

    name: str
    stored_grid: int
    grid: int
    prefix_tokens: int
    width: int

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of the stored table, [G, D]."""
        return self.prefix_tokens + self.stored_grid**2, self.width

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of this run's table, [G, D]."""
        return self.prefix_tokens + self.grid**2, self.width

    def apply(self, stored: torch.Tensor) -> torch.Tensor:
        """Interpolate the stored table (fp32 in, fp32 out)."""
        return interpolate_positions(
            stored, source_grid=self.stored_grid, target_grid=self.grid, prefix_tokens=self.prefix_tokens
        )

    def __str__(self) -> str:
        """Name and grids."""
        side, new = self.stored_grid, self.grid
        return f"{self.name} {side} x {side} -> {new} x {new}"


@dataclass(frozen=True)
class Start:
    """Where the first weights came from.

    Attributes:
        checkpoint: the checkpoint.
        resized: the tables that were interpolated.
    """

    checkpoint: Checkpoint
    resized: tuple[ResizedTable, ...]


def find_start(place: str) -> Checkpoint:
    """Open the checkpoint that ``checkpoint.init_from`` names.

    Args:
        place: a published checkpoint, or a run directory, whose tracker is followed.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    folder = Path(place)
    if publish.step_of_name(folder.name) is not None:
        if not folder.is_dir():
            beside = ", ".join(path.name for path in publish.published(folder.parent))
            raise CheckpointError(
                f"checkpoint.init_from = {place} does not exist",
                fix=f"name one of {beside}" if beside else "name a folder .../checkpoints/step_00001234",
            )
        return open_checkpoint(folder)
    checkpoint = open_latest(folder)
    if checkpoint is None:
        what = "holds no checkpoint" if folder.is_dir() else "does not exist"
        raise CheckpointError(
            f"checkpoint.init_from = {place} {what}",
            fix="name a run directory that holds checkpoints/, or a folder .../checkpoints/step_00001234",
        )
    return checkpoint


def start_from(
    checkpoint: Checkpoint, cfg: RunConfig, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer
) -> Start:
    """Put a checkpoint's weights into a freshly built model and its masters (every rank must call).

    Args:
        checkpoint: the checkpoint, in any layout and dtype.
        cfg: the configuration of this run.
        chunks: this rank's wrapped model chunks.
        optimizer: its optimizer, before its first step.

    Raises:
        CheckpointError: it holds another model, or is damaged; names parameters and options that differ.
    """
    check_files(checkpoint)
    expected = schema.expected_shapes(chunks)
    ignored = (schema.OPTIMIZER_PREFIX, schema.FP8_PREFIX)
    found = compare_contents(checkpoint.stored_shapes(), expected, ignored_prefixes=ignored)
    tables = {schema.model_key(table.name): table for table in position_tables(checkpoint.config, cfg)}
    resized = {
        key: tables[key]
        for key, shapes in found.reshaped.items()
        if key in tables and shapes == (tables[key].stored_shape, tables[key].shape)
    }
    _check_fits(checkpoint, cfg, found.without(resized))
    wanted = schema.weights_to_start(chunks, optimizer, resized=resized)
    wanted.restore(checkpoint.format.load_tensors(wanted.tensors, checkpoint.tensors))
    return Start(checkpoint, tuple(resized.values()))


def position_tables(saved: RunConfig, cfg: RunConfig) -> list[ResizedTable]:
    """Return the position tables that a model may have, as they are stored and as this run wants them."""
    grids = saved.vision.stored_grid_size, cfg.vision.stored_grid_size
    class_token, width = int(cfg.vision.class_token), cfg.vision.hidden_size
    return [
        ResizedTable("vision_encoder.position_embedding", *grids, class_token, width),
        ResizedTable("connector.position_embedding", *grids, 0, width),
    ]


def _check_fits(checkpoint: Checkpoint, cfg: RunConfig, found: Mismatch) -> None:
    changes = [change for change in model_differences(checkpoint.config, cfg) if change.path not in MAY_DIFFER]
    if not changes and not found.problems():
        return
    listed = "".join(
        f"\n    {c.path}: {value_text(c.left)} in the checkpoint, {value_text(c.right)} here" for c in changes
    )
    raise CheckpointError(
        f"{checkpoint.folder} is a checkpoint of another model, which this run cannot start from: "
        + "; ".join(found.problems() or ["its parameters have the same names and shapes"])
        + (f"; options that differ:{listed}" if changes else "; no option differs"),
        fix="give this run the options of that one, or remove checkpoint.init_from to start from random weights",
    )
