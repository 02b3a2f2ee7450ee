"""Save a checkpoint in two parts: a snapshot of the run, and its way to disk.

The second part needs nothing of the run but the snapshot and a process group, so it runs where the training runs or in
processes beside it (``background.py``).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from mm15_megatron.checkpoint import publish, schema
from mm15_megatron.checkpoint.proof import (
    PROOF,
    Proof,
    Samples,
    differing,
    digest_of_file,
    is_stale,
    listing,
    take_samples,
)
from mm15_megatron.checkpoint.retention import apply_retention
from mm15_megatron.checkpoint.store import CONFIG, FORMAT_VERSION, STATE, TENSORS, tensor_format
from mm15_megatron.config.dump import dump_flat
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import CheckpointError
from mm15_megatron.parallel.topology import Topology
from mm15_megatron.utils.ranks import gathered_objects, on_rank_zero

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint will hold of one rank.

    Attributes:
        cfg: the run's configuration; decides where, how and how many are kept.
        step: optimizer steps taken.
        state: what ``state.json`` will hold.
        contents: what this rank writes, and what it holds for others that write.
        samples: copies of live tensors, to compare with what comes to lie on disk.
    """

    cfg: RunConfig
    step: int
    state: Mapping[str, Any]
    contents: schema.StateToSave
    samples: Samples


def take_snapshot(
    cfg: RunConfig,
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    *,
    topology: Topology,
    step: int,
    data_digest: str,
    progress: Mapping[str, Any],
) -> Snapshot:
    """Describe what this rank holds of a checkpoint, its tensors where they are (every rank must call).

    Args:
        cfg: the run's configuration.
        chunks: this rank's wrapped model chunks.
        optimizer: its optimizer.
        topology: the layout.
        step: optimizer steps taken.
        data_digest: digest of the order of the training data.
        progress: the run's counters, JSON values; rank 0's are stored.
    """
    contents = schema.state_to_save(chunks, optimizer)
    meta = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "optimizer_step": contents.optimizer_step,
        "data_digest": data_digest,
        "progress": dict(progress),
        "layout": {"world_size": topology.place.world_size, **asdict(cfg.parallel)},
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
    }
    samples = take_samples(chunks, optimizer, round_number=step // max(1, cfg.checkpoint.save_interval))
    return Snapshot(cfg, step, meta, contents, samples)


def nobody(phase: str) -> None:
    """Tell nobody."""


def write_snapshot(snapshot: Snapshot, *, tell: Callable[[str], None] = nobody) -> Path:
    """Write, prove, publish and track a checkpoint, then delete old ones (every rank must call, with its own part).

    Args:
        snapshot: what is saved.
        tell: hears which phase begins.

    Returns:
        Its folder.

    Raises:
        CheckpointError: if it could not be written or does not hold what it should; nothing of it is left then, and the
            previous one stays tracked.
    """
    folder = publish.checkpoints_folder(snapshot.cfg.train.run_dir)
    form = tensor_format(snapshot.cfg.checkpoint.format)
    try:
        tell("begin")
        writing = on_rank_zero(lambda: _begin(folder, snapshot))
        tell("exchange")
        tensors = snapshot.contents.to_write()
        tell("tensors")
        written = form.save_tensors(tensors, writing / TENSORS)
        tensors.clear()
        tell("proof")
        _prove(writing, written, snapshot)
        tell("publish")
        return on_rank_zero(lambda: _finish(writing, snapshot))
    except (OSError, CheckpointError) as error:
        left = on_rank_zero(lambda: _free_space(folder))
        on_rank_zero(lambda: publish.abandon(folder, snapshot.step))
        problem, fix = str(error), "check free space and permissions; the previous checkpoint is untouched"
        if isinstance(error, CheckpointError):
            problem, fix = error.problem, error.fix
        raise CheckpointError(
            f"the checkpoint of step {snapshot.step} could not be saved: {problem}{left}", fix=fix
        ) from error


def _free_space(folder: Path) -> str:
    """Say what is left of the file system, in a clause."""
    try:
        return f" ({shutil.disk_usage(folder).free / 2**20:,.1f} MiB are free there)"
    except OSError:
        return ""


def _begin(folder: Path, snapshot: Snapshot) -> Path:
    writing = publish.begin(folder, snapshot.step)
    (writing / TENSORS).mkdir()
    (writing / CONFIG).write_text(dump_flat(snapshot.cfg), encoding="utf-8")
    (writing / STATE).write_text(json.dumps(dict(snapshot.state), indent=2) + "\n", encoding="utf-8")
    return writing


def _finish(writing: Path, snapshot: Snapshot) -> Path:
    final = publish.publish(writing, step=snapshot.step)
    apply_retention(writing.parent, keep=snapshot.cfg.checkpoint.keep)
    return final


def _prove(writing: Path, written: Sequence[Path], snapshot: Snapshot) -> None:
    """Read samples back, and write what every file is (every rank must call).

    Raises:
        CheckpointError: what is on disk is not what was live, or is what the previous checkpoint holds.
    """
    samples, reader = snapshot.samples, tensor_format(snapshot.cfg.checkpoint.format).ShardReader
    problems, found = [], {}
    try:
        problems = differing(samples.read_back, reader(writing / TENSORS))
        beside = [writing / CONFIG, writing / STATE] if torch.distributed.get_rank() == 0 else []
        found = {path.relative_to(writing).as_posix(): digest_of_file(path) for path in [*written, *beside]}
    except Exception as error:  # noqa: BLE001 (wrong bytes raise anything, and the other ranks must hear of it)
        problems.append(f"{type(error).__name__}: {error}")
    shares = gathered_objects((problems, found, {sample.name: sample.digest for sample in samples.moments}))
    problems = [f"rank {number}: {one}" for number, share in enumerate(shares) for one in share[0]]
    if problems:
        raise CheckpointError(
            f"what {writing} holds is not what the run held: {listing(problems)}",
            fix="the previous checkpoint is untouched; check the disk and the memory of the machines of these ranks",
        )
    proof = Proof(
        {name: one for share in shares for name, one in share[1].items()},
        snapshot.state["optimizer_step"],
        {name: digest for share in shares for name, digest in share[2].items()},
    )
    on_rank_zero(lambda: _write_proof(writing, proof))


def _write_proof(writing: Path, proof: Proof) -> None:
    previous = _comparable(writing.parent)
    if previous is not None and is_stale(proof, Proof.read(previous)):
        raise CheckpointError(
            f"the optimizer's state of this step is bitwise that of {previous}, although updates were applied",
            fix="report this: a copy of an earlier state was about to be saved; the previous checkpoint is untouched",
        )
    (writing / PROOF).write_text(proof.to_json(), encoding="utf-8")


def _comparable(folder: Path) -> Path | None:
    """Return the tracked checkpoint; None where there is none, or none with a proof."""
    try:
        previous = publish.tracked(folder)
        if previous is not None:
            Proof.read(previous)
    except CheckpointError as error:  # no reason to lose the state that is being saved
        _LOG.warning("nothing to compare this checkpoint with: %s", error.problem)
        return None
    return previous


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
    """Take a snapshot and write it, while the run waits (every rank must call); the arguments are the snapshot's.

    Raises:
        CheckpointError: as :func:`write_snapshot`.
    """
    return write_snapshot(
        take_snapshot(cfg, chunks, optimizer, topology=topology, step=step, data_digest=data_digest, progress=progress)
    )
