"""Start or go on: decided once, from the tracker and ``checkpoint.resume`` alone, and printed as one block.

Whatever resumes has its weights from its own checkpoint; ``checkpoint.init_from`` is asked at a fresh start alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mm15_megatron.checkpoint.publish import checkpoints_folder, published
from mm15_megatron.checkpoint.start import Start, find_start
from mm15_megatron.checkpoint.store import Checkpoint, check_same_model, open_latest
from mm15_megatron.config.dump import diff, value_text
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.data.row_order import RowOrder
from mm15_megatron.errors import CheckpointError
from mm15_megatron.training.state import TrainState


def choose_checkpoint(cfg: RunConfig) -> Checkpoint | None:
    """Return the checkpoint to resume from; None for a fresh start.

    Raises:
        CheckpointError: a fresh start was asked for beside checkpoints, a checkpoint is required and there is none, it
            belongs to another model, or the tracker or the checkpoint is damaged.
    """
    folder = checkpoints_folder(cfg.train.run_dir)
    if cfg.checkpoint.resume == "never":
        if found := published(folder):
            raise CheckpointError(
                f"checkpoint.resume = 'never', but {folder} holds {len(found)} checkpoints up to {found[-1].name}",
                fix="choose another train.run_dir, or set checkpoint.resume=auto to go on from there",
            )
        return None
    checkpoint = open_latest(cfg.train.run_dir)
    if checkpoint is None and cfg.checkpoint.resume == "required":
        raise CheckpointError(
            f"checkpoint.resume = 'required', but {folder} holds no checkpoint",
            fix="check train.run_dir, or set checkpoint.resume=auto to start from step 0",
        )
    if checkpoint is not None:
        check_same_model(checkpoint, cfg)
    return checkpoint


def check_same_data(checkpoint: Checkpoint, cfg: RunConfig, *, order: RowOrder) -> None:
    """Refuse to go on with rows in another order: the number of rows consumed would mean something else.

    Raises:
        CheckpointError: the digests differ; lists what changed in the options and sources that decide the order.
    """
    digest = order.digest
    if checkpoint.data_digest == digest:
        return
    sections: tuple[str, ...] = ("data.", "tiling.", "connector.num_tokens", "train.seed")
    if any(source.epochs is not None for source in cfg.data.sources):  # they are shares of the run's length
        sections += ("train.steps", "train.global_batch_size", "train.rampup_batch_size")
    changes = [
        f"{c.path}: {value_text(c.left)} -> {value_text(c.right)}"
        for c in diff(checkpoint.config, cfg)
        if c.path.startswith(sections)
    ]
    ledger = TrainState.from_dict(checkpoint.progress).ledger
    before = dict(zip(ledger.contents[: ledger.sources], ledger.names, strict=False))
    now = {source.content: source.name for source in order.sources}
    changes += [f"source {before[content]} is not there any more" for content in before if content not in now]
    changes += [f"source {now[content]} is new, or its content changed" for content in now if content not in before]
    raise CheckpointError(
        f"the order of the training data is not the checkpoint's ({digest[:12]}, not {checkpoint.data_digest[:12]}):"
        + "".join(f"\n    {change}" for change in changes),
        fix="restore the data and its options; weights can be changed ahead of time by `changes` of a source; or start "
        "a new run directory",
    )


def choose_start(cfg: RunConfig, checkpoint: Checkpoint | None) -> Checkpoint | None:
    """Return the checkpoint whose weights a fresh start takes; None for a resumed run, and for random weights.

    Args:
        cfg: the run.
        checkpoint: what it resumes from, if it does.

    Raises:
        CheckpointError: ``checkpoint.init_from`` names none, or a damaged one.
    """
    if checkpoint is not None or not cfg.checkpoint.init_from:
        return None
    return find_start(cfg.checkpoint.init_from)


def resume_block(
    cfg: RunConfig,
    checkpoint: Checkpoint | None,
    *,
    state: TrainState,
    start: Start | None = None,
    checked: int = 0,
    ranks: int = 1,
) -> str:
    """Return the decision, what it rests on and what has changed, as lines of text.

    Args:
        cfg: the run.
        checkpoint: what it resumes from; None = a fresh start.
        state: where it stands.
        start: where the weights of a fresh start came from; None = random ones.
        checked: files of the checkpoint that were held against its proof.
        ranks: of this run.
    """
    lines = [
        "resume decision",
        f"  run directory      {cfg.train.run_dir} (checkpoint.resume = {cfg.checkpoint.resume})",
        f"  found              {_found(cfg, checkpoint)}",
    ]
    if checkpoint is None:
        lines.append("  decision           fresh start: the tracker names no checkpoint")
        return "\n".join([*lines, *_fresh_weights(cfg, start)])
    lines += [
        f"  decision           go on from {checkpoint.folder.name}, named by the tracker",
        f"  position           step {state.step}, {state.consumed} {cfg.data.batch_unit} consumed, "
        f"{checkpoint.optimizer_step} updates applied",
        f"  files              {checked} checked: size and SHA-256 are what they were when it was saved",
        f"  data order         digest {checkpoint.data_digest[:12]}, unchanged",
        f"  written by         {_written_by(checkpoint)}",
        f"  layout             {_layout_text(checkpoint.layout)}; now "
        + _layout_text({"world_size": ranks, **asdict(cfg.parallel)}),
    ]
    if cfg.checkpoint.init_from:
        source = cfg.checkpoint.init_from
        lines.append(f"  weights            of this checkpoint; checkpoint.init_from = {source} had no part in it")
    changes = [f"    {c.path}: {value_text(c.left)} -> {value_text(c.right)}" for c in diff(checkpoint.config, cfg)]
    lines.append("  options changed    " + ("none" if not changes else str(len(changes))))
    return "\n".join(lines + changes)


def _found(cfg: RunConfig, checkpoint: Checkpoint | None) -> str:
    """Say which checkpoints there are, and which of them no run goes on from."""
    names = [path.name for path in published(checkpoints_folder(cfg.train.run_dir))]
    if not names:
        return "no checkpoint"
    count = f"{len(names)} checkpoint{'' if len(names) == 1 else 's'}, {names[0]}"
    later = names if checkpoint is None else [name for name in names if name > checkpoint.folder.name]
    beyond = f"; {', '.join(later)} beyond the tracker: replaced when the run gets there" if later else ""
    return count + (f" to {names[-1]}" if len(names) > 1 else "") + beyond


def _fresh_weights(cfg: RunConfig, start: Start | None) -> list[str]:
    if start is None:
        return [f"  weights            random, seed {cfg.train.seed}"]
    checkpoint = start.checkpoint
    named = "" if checkpoint.folder == Path(cfg.checkpoint.init_from) else ", named by the tracker"
    return [
        f"  weights            of {checkpoint.folder}, step {checkpoint.step}{named}",
        f"  written by         {_layout_text(checkpoint.layout)}, {_written_by(checkpoint)}",
        f"  interpolated       {', '.join(map(str, start.resized)) or 'nothing'}",
        "  fresh              optimizer (masters are the weights), step, counters, data order",
    ]


def _written_by(checkpoint: Checkpoint) -> str:
    return ", ".join(f"{k} {v}" for k, v in checkpoint.versions.items())


def _layout_text(layout: Mapping[str, Any]) -> str:
    """Ranks and the sizes that are not 1."""
    sizes = {
        "tensor": "tensor_model_parallel_size",
        "pipeline": "pipeline_model_parallel_size",
        "context": "context_parallel_size",
        "experts": "expert_model_parallel_size",
    }
    split = [f"{name} {layout[option]}" for name, option in sizes.items() if layout.get(option, 1) > 1]
    ranks = layout["world_size"]
    return ", ".join([f"{ranks} rank{'' if ranks == 1 else 's'}", *split])
