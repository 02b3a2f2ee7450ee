"""One optimizer step, and one forward-only pass, through megatron-core's schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import tee

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func

from mm15_megatron.accounting import padded_vocab_size
from mm15_megatron.batch import MMBatch
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.models.schedule_plan import ChunkPlan
from mm15_megatron.parallel.reduce import finalise_gradients, global_sum
from mm15_megatron.parallel.topology import Topology
from mm15_megatron.training.losses import token_losses, vocabulary_shard
from mm15_megatron.training.router_figures import RouterFigures, begin_step, router_figures


@dataclass(frozen=True)
class StepParts:
    """What a step works on.

    Attributes:
        cfg: the run's configuration.
        topology: groups and ranks.
        chunks: this rank's wrapped model chunks.
        optimizer: megatron-core's optimizer over them; None for evaluation alone.
    """

    cfg: RunConfig
    topology: Topology
    chunks: Sequence[DistributedDataParallel]
    optimizer: ChainedOptimizer | None


@dataclass(frozen=True)
class LossSums:
    """Sums over the global batch, equal on every rank.

    Attributes:
        cross_entropy: weighted sum of token losses.
        squared_lse: weighted sum of logsumexp ** 2.
        weight: sum of the target weights.
        router: what the routers of each sparse layer did; empty for a dense model and in evaluation.
    """

    cross_entropy: float
    squared_lse: float
    weight: float
    router: tuple[RouterFigures, ...] = ()

    @property
    def loss(self) -> float:
        """Mean cross-entropy of a target; NaN when the batch has none."""
        return self.cross_entropy / self.weight if self.weight else math.nan


@dataclass(frozen=True)
class StepOutput:
    """What a step did.

    Attributes:
        loss: mean cross-entropy over the real targets of the global batch; NaN when it has none.
        z_loss: mean of logsumexp ** 2, before its coefficient.
        targets: sum of target weights.
        grad_norm: global gradient norm before clipping.
        applied: False when nothing was updated: loss or gradients were not finite, or there was no target.
        router: what the routers of each sparse layer did; empty for a dense model.
    """

    loss: float
    z_loss: float
    targets: float
    grad_norm: float
    applied: bool
    router: tuple[RouterFigures, ...] = ()


class _Sums:
    """Adds up the loss sums of one rank's micro-batches: [cross-entropy, squared lse, weight], fp64 on the device."""

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, values: torch.Tensor) -> None:
        self.total += values.detach()


def train_step(parts: StepParts, batches: Iterator[MMBatch], *, num_microbatches: int) -> StepOutput:
    """Run forward, backward and the optimizer on one global batch.

    A batch without any target updates nothing: its gradients are zero, but momentum and weight decay would still move
    the parameters.

    Args:
        parts: model, optimizer and groups.
        batches: this rank's micro-batches; ``num_microbatches`` of them are taken.
        num_microbatches: micro-batches of this step on every rank.
    """
    optimizer = parts.optimizer
    assert optimizer is not None, "a training step needs an optimizer"
    for chunk in parts.chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    sums = accumulate_gradients(parts, batches, num_microbatches=num_microbatches)
    grad_norm, applied = apply_gradients(optimizer, loss_is_finite=math.isfinite(sums.loss))
    z_loss = sums.squared_lse / sums.weight if sums.weight else math.nan
    return StepOutput(sums.loss, z_loss, sums.weight, grad_norm, applied=applied, router=sums.router)


def apply_gradients(optimizer: ChainedOptimizer, *, loss_is_finite: bool = True) -> tuple[float, bool]:
    """Clip by the global norm and update; leave everything as it was when loss or gradients are not finite.

    Returns:
        The global gradient norm before clipping (equal on every rank), and whether the parameters were updated.
    """
    overflow = optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if overflow or not loss_is_finite or not math.isfinite(grad_norm):
        return grad_norm, False
    for part in optimizer.chained_optimizers:
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)
    return grad_norm, bool(optimizer.step_with_ready_grads())


def accumulate_gradients(parts: StepParts, batches: Iterator[MMBatch], *, num_microbatches: int) -> LossSums:
    """Run forward and backward on one global batch and leave final gradients in the buffers.

    Raises:
        DataError: the model has experts and the first micro-batch does not carry ``step_counts``.
    """
    cfg, topology = parts.cfg, parts.topology
    sums = _Sums(topology.device)
    batches = begin_step(parts.chunks, batches, cfg=cfg, topology=topology)
    set_gradient_hook(
        parts,
        lambda chunks: finalise_gradients(chunks, target_weight=sums.total[2].float(), topology=topology),
    )
    _run_schedule(parts, batches, sums, num_microbatches=num_microbatches, forward_only=False)
    return replace(_global(sums, topology), router=router_figures(parts.chunks, cfg=cfg, topology=topology))


@torch.no_grad()
def evaluate_step(parts: StepParts, batches: Iterator[MMBatch], *, num_microbatches: int) -> LossSums:
    """Run forward only and return the sums over the global batch."""
    sums = _Sums(parts.topology.device)
    for chunk in parts.chunks:
        chunk.eval()
    _run_schedule(parts, batches, sums, num_microbatches=num_microbatches, forward_only=True)
    for chunk in parts.chunks:
        chunk.train()
    return _global(sums, parts.topology)


def set_gradient_hook(parts: StepParts, hook: Callable[[Sequence[DistributedDataParallel]], None]) -> None:
    """Tell megatron-core's schedules what to do with the gradients after the last backward pass."""

    def finalise(chunks: Sequence[DistributedDataParallel], *unused: object, **also_unused: object) -> None:
        hook(chunks)

    for chunk in parts.chunks:
        chunk.module.config.finalize_model_grads_func = finalise


def _run_schedule(
    parts: StepParts, batches: Iterator[MMBatch], sums: _Sums, *, num_microbatches: int, forward_only: bool
) -> None:
    cfg, chunks = parts.cfg, len(parts.chunks)
    get_forward_backward_func()(
        forward_step_func=partial(_forward_step, parts=parts, sums=sums),
        # Interleaved chunks each walk through the same micro-batches at their own pace.
        data_iterator=list(tee(batches, chunks)) if chunks > 1 else batches,
        model=list(parts.chunks),
        num_microbatches=num_microbatches,
        # Rows of a micro-batch lie end to end as one packed sequence; per-row shapes would break transfers.
        seq_length=cfg.data.seq_length * cfg.train.micro_batch_size,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _forward_step(
    batches: Iterator[MMBatch],
    chunk: DistributedDataParallel | GPTModel,
    return_schedule_plan: bool = False,
    *,
    parts: StepParts,
    sums: _Sums,
) -> tuple[
    torch.Tensor | ChunkPlan,
    Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]],
]:
    """Run one chunk on the next micro-batch, or plan to: then megatron-core names the chunk by its decoder."""
    if return_schedule_plan:
        chunk = next(wrapped for wrapped in parts.chunks if wrapped.module.language_model is chunk)
    batch = next(batches)
    if not chunk.module.pre_process:  # a later chunk of the first rank
        batch = replace(batch, tiles_N3HW=None, slots_NP=None)
    batch = batch.to(parts.topology.device)
    output = chunk.module.schedule_plan(batch) if return_schedule_plan else chunk(batch)
    return output, partial(_loss, batch=batch, cfg=parts.cfg, topology=parts.topology, sums=sums)


def _loss(
    logits_1TV: torch.Tensor, *, batch: MMBatch, cfg: RunConfig, topology: Topology, sums: _Sums
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted sum of token losses of one micro-batch (last stage only).

    The second value is megatron-core's integer token count, which is not used: weights may be fractions.
    """
    assert batch.labels_T is not None, "the last stage needs labels"
    assert batch.loss_mask_T is not None, "the last stage needs target weights"
    language = cfg.language
    shard = vocabulary_shard(
        vocab_size=language.vocab_size, padded_size=padded_vocab_size(cfg), group=topology.groups.tp
    )
    labels_T, weight_T = (topology.own_tokens(whole_T) for whole_T in (batch.labels_T, batch.loss_mask_T))
    losses = token_losses(logits_1TV[0], labels_T, shard)
    cross_entropy = (losses.cross_entropy_T * weight_T).sum()
    squared_lse = (losses.squared_lse_T * weight_T).sum()
    sums.add(torch.stack((cross_entropy.detach(), squared_lse.detach(), weight_T.sum())).double())
    total = cross_entropy + language.z_loss_coeff * squared_lse
    return total, torch.zeros((), dtype=torch.int, device=total.device), {}


def _global(sums: _Sums, topology: Topology) -> LossSums:
    cross_entropy, squared_lse, weight = global_sum(sums.total, topology).tolist()
    return LossSums(cross_entropy, squared_lse, weight)
