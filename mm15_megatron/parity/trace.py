"""Run the stream in one layout and record what one whole model would show.

Initial weights are a function of (seed, name) and the stream of (step, row), so every layout starts from the same model
and sees the same rows. What a layout shows does not depend on it: losses and norms of every step, gradients and
parameters gathered from their shards, and the fingerprints of the first forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from megatron.core.distributed import DistributedDataParallel

from mm15_megatron.batch import MMBatch
from mm15_megatron.checkpoint.save import save_checkpoint
from mm15_megatron.checkpoint.store import load_training, open_latest
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import CheckpointError
from mm15_megatron.models.build import build_chunks, check_replicas
from mm15_megatron.models.global_parameters import GlobalParameter, global_parameters
from mm15_megatron.parallel.batch_scatter import local_batch
from mm15_megatron.parallel.seeds import seed_everything
from mm15_megatron.parallel.topology import Topology, build_topology, close_topology
from mm15_megatron.parity.fingerprints import Fingerprints, Piece, Recorder, merge
from mm15_megatron.parity.ranks import RankFailure, rank_place, run_on_ranks
from mm15_megatron.parity.stream import global_batch, one_segment_a_row, rank_batches
from mm15_megatron.training.optimizer import build_optimizer, wrap_chunks
from mm15_megatron.training.step import LossSums, StepParts, accumulate_gradients, apply_gradients

Prepare = Callable[[], None]
"""Called on every rank before anything is built."""

Gradients = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """What a layout is to run.

    Attributes:
        steps: optimizer steps, counted from the beginning of the run.
        alone: give every segment of this many packed rows a row of its own; None = the rows as they are.
        save_at: save a checkpoint after this step.
        load: begin from the checkpoint in ``train.run_dir``.
        fingerprints: record those of the first step.
    """

    steps: int = 5
    alone: int | None = None
    save_at: int | None = None
    load: bool = False
    fingerprints: bool = True


@dataclass
class Trace:
    """What a layout showed.

    Attributes:
        first_step: steps that had been taken when it began.
        losses: loss of each step.
        router: figures of each sparse layer by name, of each step.
        grad_norms: global gradient norm of each step.
        applied: whether each step updated the parameters.
        first_gradients: whole gradients of its first step by global name.
        gradients: whole gradients of the last step.
        parameters: whole parameters after the last step.
        fingerprints: of the first step's forward pass.
    """

    first_step: int = 0
    losses: list[float] = field(default_factory=list)
    router: list[dict[str, tuple[float, ...]]] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    applied: list[bool] = field(default_factory=list)
    first_gradients: Gradients = field(default_factory=dict)
    gradients: Gradients = field(default_factory=dict)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    fingerprints: Fingerprints = field(default_factory=dict)


@dataclass
class _RankTrace:
    """What one rank contributes."""

    trace: Trace
    pieces: list[Piece] = field(default_factory=list)


def build_parts(cfg: RunConfig) -> StepParts:
    """Build topology, model and optimizer of this rank as a run does, with constant learning rates."""
    torch.set_num_threads(1)
    topology = build_topology(cfg.parallel, place=rank_place())
    seed_everything(cfg.train.seed, topology=topology)
    models = build_chunks(cfg, stages=topology.stages)
    check_replicas(models, group=topology.groups.tp)
    chunks = wrap_chunks(cfg, models)
    optimizer = build_optimizer(cfg, chunks)
    for group in optimizer.param_groups:  # a constant schedule; the loop's own is tested with it
        group["lr"] = group["max_lr"]
        group["weight_decay"] = cfg.optimizer.weight_decay * group["wd_mult"]
    return StepParts(cfg=cfg, topology=topology, chunks=chunks, optimizer=optimizer)


def micro_batches(cfg: RunConfig, topology: Topology, *, step: int, alone: int | None = None) -> Iterator[MMBatch]:
    """This rank's part of the micro-batches of one step (``alone``: see :class:`Plan`)."""
    rows = global_batch(cfg, step=step, rows=alone)
    if alone is not None:
        rows = one_segment_a_row(rows, multiple=cfg.train.global_batch_size)
    for batch in rank_batches(rows, cfg, data_rank=topology.data_rank, data_size=topology.data_size):
        yield local_batch(batch, topology=topology, image_size=cfg.vision.image_size)


def run_step(parts: StepParts, *, step: int, alone: int | None = None) -> LossSums:
    """Forward and backward of one step; the gradients are left in the buffers."""
    assert parts.optimizer is not None, "a step needs an optimizer"
    for chunk in parts.chunks:
        chunk.zero_grad_buffer()
    parts.optimizer.zero_grad()
    batches = list(micro_batches(parts.cfg, parts.topology, step=step, alone=alone))
    return accumulate_gradients(parts, iter(batches), num_microbatches=len(batches))


def gathered_gradients(parts: StepParts) -> Gradients:
    """Whole gradients by global name, on the rank that keeps them (every rank must call)."""
    if parts.cfg.parallel.use_distributed_optimizer:
        for chunk in parts.chunks:
            _complete_sharded_gradients(chunk, parts.topology)
    return gathered(parts, lambda item: item.parameter.main_grad if item.parameter.requires_grad else None)


def _complete_sharded_gradients(chunk: DistributedDataParallel, topology: Topology) -> None:
    """After a reduce-scatter each rank holds one share of every bucket: collect the others."""
    buffers = [(buffer, topology.groups.dp_cp) for buffer in chunk.buffers]
    buffers += [(buffer, topology.groups.expt_dp) for buffer in chunk.expert_parallel_buffers]
    for buffer, group in buffers:
        for bucket in buffer.buckets:
            shares = list(bucket.grad_data.view(group.size(), -1).unbind())
            mine = shares[group.rank()].clone()
            torch.distributed.all_gather(shares, mine, group=group)
            for target, share in zip(bucket.grad_data.view(group.size(), -1).unbind(), shares, strict=True):
                target.copy_(share)


def gathered(parts: StepParts, value: Callable[[GlobalParameter], torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """Gather a per-parameter tensor from its shards; only one rank of those that hold the same keeps it."""
    whole: dict[str, torch.Tensor] = {}
    for item in global_parameters([chunk.module for chunk in parts.chunks]):
        tensor = value(item)
        if tensor is None:
            continue
        collected = item.gather(tensor)
        if item.is_first_replica:
            whole[item.name] = collected.cpu()
    return whole


def _figures(sums: LossSums) -> dict[str, tuple[float, ...]]:
    """Router figures by layer: balance loss, z loss, dropped share, then the load of each expert."""
    return {
        f"decoder.layers.{one.layer}.mlp.router": (one.balance, one.z, one.dropped, *one.load) for one in sums.router
    }


def trace_on_rank(cfg: RunConfig, plan: Plan, prepare: Prepare | None = None) -> _RankTrace:
    """Run a plan on this rank."""
    if prepare is not None:
        prepare()
    parts = build_parts(cfg)
    trace = Trace(first_step=_load(cfg, parts) if plan.load else 0)
    recorder = None
    if plan.fingerprints and not cfg.parallel.overlap_moe_expert_parallel_comm:  # a plan calls parts of layers alone
        sharded = cfg.parallel.sequence_parallel
        recorder = Recorder(parts.chunks, topology=parts.topology, sequence_parallel=sharded)
    for step in range(trace.first_step, plan.steps):
        _trace_step(parts, trace, step=step, plan=plan)
        if recorder is not None:
            recorder.remove()
    for chunk in parts.chunks:
        if cfg.parallel.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)  # otherwise the next forward pass would gather the last update
    trace.parameters = gathered(parts, lambda item: item.parameter.data)
    close_topology()
    return _RankTrace(trace, recorder.pieces if recorder else [])


def _trace_step(parts: StepParts, trace: Trace, *, step: int, plan: Plan) -> None:
    sums = run_step(parts, step=step, alone=plan.alone)
    trace.losses.append(sums.loss)
    trace.router.append(_figures(sums))
    first, last = step == trace.first_step, step == plan.steps - 1
    if first or last:
        gradients = gathered_gradients(parts)
        trace.first_gradients = gradients if first else trace.first_gradients
        trace.gradients = gradients if last else trace.gradients
    norm, applied = apply_gradients(parts.optimizer, loss_is_finite=math.isfinite(sums.loss))
    trace.grad_norms.append(norm)
    trace.applied.append(applied)
    if step + 1 == plan.save_at:
        save_checkpoint(
            parts.cfg,
            parts.chunks,
            parts.optimizer,
            topology=parts.topology,
            step=step + 1,
            data_digest="stream",
            progress={"step": step + 1},
        )


def _load(cfg: RunConfig, parts: StepParts) -> int:
    checkpoint = open_latest(cfg.train.run_dir)
    if checkpoint is None:
        raise CheckpointError(
            f"{cfg.train.run_dir} holds no checkpoint to go on from", fix="look at what saving it said"
        )
    load_training(checkpoint, cfg, parts.chunks, parts.optimizer)
    return checkpoint.step


def trace(cfg: RunConfig, *, world_size: int, plan: Plan | None = None, prepare: Prepare | None = None) -> Trace:
    """Run a layout on ``world_size`` ranks and put together what they hold.

    Args:
        cfg: the configuration in that layout.
        world_size: ranks.
        plan: what to run; None = five steps.
        prepare: called on every rank first, a function of a module.

    Raises:
        RankFailure: a rank failed, or the collectives of the ranks did not match.
    """
    results: list[_RankTrace] = run_on_ranks(
        trace_on_rank,
        world_size,
        timeout=60.0 * cfg.parallel.distributed_timeout_minutes,
        device=cfg.parallel.device,
        cfg=cfg,
        plan=plan or Plan(),
        prepare=prepare,
    )
    whole = results[0].trace
    _check_agreement([result.trace.losses for result in results])
    for result in results[1:]:
        for name in ("first_gradients", "gradients", "parameters"):
            getattr(whole, name).update(getattr(result.trace, name))
    whole.fingerprints = merge(piece for result in results for piece in result.pieces)
    return whole


def _check_agreement(losses: list[list[float]]) -> None:
    """Every rank tells the same loss (none of two that are not numbers equals the other)."""
    differing = [rank for rank, seen in enumerate(losses) if repr(seen) != repr(losses[0])]
    if differing:
        raise RankFailure(f"ranks {differing} and rank 0 disagree about the loss: {losses[differing[0]]}, {losses[0]}")
