"""One optimizer step, and one forward-only pass, through megatron-core's schedules.

A training step reads the device once: losses, router figures and gradient norm come together after the gradients are
final, so that the device never waits for the host between the first forward and the last backward pass. Only the
dispatch of sparse layers, which needs its token counts on the host, reads more. ``tests/training/test_host_sync.py``
counts every read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import tee
from typing import Final

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
from mm15_megatron.parallel.reduce import finalise_gradients, global_sum, squared_gradient_norm
from mm15_megatron.parallel.topology import Topology
from mm15_megatron.training.cuda_graphs import LayerGraphs
from mm15_megatron.training.losses import LossKernels, loss_kernels, target_losses, vocabulary_shard
from mm15_megatron.training.router_figures import RouterFigures, begin_step, router_figures, router_totals
from mm15_megatron.training.stability import WITHOUT_TARGETS, Judge, Verdict, finite

_WHOLE: Final = 3  # sums over all tokens, in front of those of the sources


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

    @cached_property
    def loss_kernels(self) -> LossKernels:
        """How the loss is computed: fused by torch.compile with ``kernels.compile_fusions``."""
        return loss_kernels(compiled=self.cfg.kernels.compile_fusions)

    @cached_property
    def graphs(self) -> LayerGraphs | None:
        """CUDA graphs of the layers; None without ``kernels.cuda_graph_scope``."""
        if not self.cfg.kernels.cuda_graph_scope or self.optimizer is None:
            return None
        return LayerGraphs(self.cfg, self.chunks, self.optimizer)


@dataclass(frozen=True)
class LossSums:
    """Sums over the global batch, equal on every rank.

    Attributes:
        cross_entropy: weighted sum of token losses.
        squared_lse: weighted sum of logsumexp ** 2.
        weight: sum of the target weights.
        router: what the routers of each sparse layer did; empty for a dense model and in evaluation.
        by_source: (weighted sum of token losses, sum of weights) of each source of the mixture.
    """

    cross_entropy: float
    squared_lse: float
    weight: float
    router: tuple[RouterFigures, ...] = ()
    by_source: tuple[tuple[float, float], ...] = ()

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
        applied: whether the weights were updated.
        verdict: why not, or what else was seen in the numbers.
        router: what the routers of each sparse layer did; empty for a dense model.
        by_source: (weighted sum of token losses, sum of weights) of each source of the mixture.
    """

    loss: float
    z_loss: float
    targets: float
    grad_norm: float
    applied: bool
    verdict: Verdict
    router: tuple[RouterFigures, ...] = ()
    by_source: tuple[tuple[float, float], ...] = ()


class _Sums:
    """Adds up [cross-entropy, squared lse, weight, then cross-entropy and weight of each source], fp64 on the device.

    Attributes:
        total: over this rank's micro-batches; after :meth:`share` over the global batch, on every rank.
    """

    def __init__(self, device: torch.device, *, sources: int) -> None:
        self.total = torch.zeros(_WHOLE + 2 * sources, dtype=torch.float64, device=device)

    def share(self, topology: Topology) -> torch.Tensor:
        self.total = global_sum(self.total, topology)
        return self.total

    def add(self, per_token_3T: torch.Tensor, sources_T: torch.Tensor | None) -> None:
        """Add the weighted values of the tokens of a micro-batch."""
        self.total[:_WHOLE] += per_token_3T.sum(dim=1).double()
        if sources_T is not None and len(self.total) > _WHOLE:
            by_source_S2 = self.total[_WHOLE:].view(-1, 2)
            by_source_S2.index_add_(0, sources_T, per_token_3T[::2].T.double())


def train_step(
    parts: StepParts, batches: Iterator[MMBatch], *, num_microbatches: int, judge: Judge = finite
) -> StepOutput:
    """Run forward, backward and the optimizer on one global batch.

    A batch without any target updates nothing: its gradients are zero, but momentum and weight decay would still move
    the parameters.

    Args:
        parts: model, optimizer and groups.
        batches: this rank's micro-batches; ``num_microbatches`` of them are taken.
        num_microbatches: micro-batches of this step on every rank.
        judge: takes loss and gradient norm and says whether they may update the weights.
    """
    optimizer = parts.optimizer
    assert optimizer is not None, "a training step needs an optimizer"
    if parts.graphs is not None:
        parts.graphs.before_step(num_microbatches=num_microbatches)
    for chunk in parts.chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    figures = accumulate_on_device(parts, batches, num_microbatches=num_microbatches)
    overflow = optimizer.prepare_grads()
    squared_norm = squared_gradient_norm(optimizer, device=parts.topology.device)
    square, *values = torch.cat((squared_norm.double()[None], figures)).tolist()  # the step's read of the device
    sums, grad_norm = _loss_sums(values, parts.cfg), math.sqrt(square)
    verdict = judge(sums.loss, grad_norm) if sums.weight else WITHOUT_TARGETS
    return StepOutput(
        loss=sums.loss,
        z_loss=sums.squared_lse / sums.weight if sums.weight else math.nan,
        targets=sums.weight,
        grad_norm=grad_norm,
        applied=_update(optimizer, grad_norm, allowed=verdict.updates and not overflow),
        verdict=verdict,
        router=sums.router,
        by_source=sums.by_source,
    )


def apply_gradients(optimizer: ChainedOptimizer, *, loss_is_finite: bool = True) -> tuple[float, bool]:
    """Clip by the global norm and update; leave everything as it was when loss or gradients are not finite.

    Returns:
        The global gradient norm before clipping (equal on every rank), and whether the parameters were updated.
    """
    overflow = optimizer.prepare_grads()
    grad_norm = math.sqrt(squared_gradient_norm(optimizer, device=torch.cuda.current_device()).item())
    return grad_norm, _update(optimizer, grad_norm, allowed=loss_is_finite and not overflow)


def _update(optimizer: ChainedOptimizer, grad_norm: float, *, allowed: bool) -> bool:
    """Clip and update the parameters from prepared gradients, if it is allowed and the norm is finite."""
    if not allowed or not math.isfinite(grad_norm):
        return False
    for part in optimizer.chained_optimizers:
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)
    return bool(optimizer.step_with_ready_grads())


def accumulate_gradients(parts: StepParts, batches: Iterator[MMBatch], *, num_microbatches: int) -> LossSums:
    """Run forward and backward on one global batch and leave final gradients in the buffers.

    Raises:
        DataError: the model has experts and the first micro-batch does not carry ``step_counts``.
    """
    return _loss_sums(accumulate_on_device(parts, batches, num_microbatches=num_microbatches).tolist(), parts.cfg)


def accumulate_on_device(parts: StepParts, batches: Iterator[MMBatch], *, num_microbatches: int) -> torch.Tensor:
    """What :func:`accumulate_gradients` does, with its sums left on the device: fp64, the losses' and the routers'."""
    cfg, topology = parts.cfg, parts.topology
    sums = _Sums(topology.device, sources=len(cfg.data.sources))
    batches = begin_step(parts.chunks, batches, cfg=cfg, topology=topology)
    set_gradient_hook(
        parts,
        lambda chunks: finalise_gradients(chunks, target_weight=sums.share(topology)[2].float(), topology=topology),
    )
    _run_schedule(parts, batches, sums, num_microbatches=num_microbatches, forward_only=False)
    return torch.cat((sums.total, router_totals(parts.chunks, cfg=cfg, topology=topology).flatten()))


def _loss_sums(values: Sequence[float], cfg: RunConfig) -> LossSums:
    """Name what :func:`accumulate_on_device` returned, read from the device."""
    stop = _WHOLE + 2 * len(cfg.data.sources)
    router = router_figures(values[stop:], cfg=cfg)
    return LossSums(*values[:_WHOLE], router=router, by_source=_pairs(values[_WHOLE:stop]))


def _pairs(values: Sequence[float]) -> tuple[tuple[float, float], ...]:
    return tuple(zip(values[::2], values[1::2], strict=True))


@torch.no_grad()
def evaluate_step(parts: StepParts, batches: Iterator[MMBatch], *, num_microbatches: int) -> LossSums:
    """Run forward only and return the sums over the global batch."""
    sums = _Sums(parts.topology.device, sources=len(parts.cfg.data.validation_sources))
    for chunk in parts.chunks:
        chunk.eval()
    _run_schedule(parts, batches, sums, num_microbatches=num_microbatches, forward_only=True)
    for chunk in parts.chunks:
        chunk.train()
    values = sums.share(parts.topology).tolist()
    return LossSums(*values[:_WHOLE], by_source=_pairs(values[_WHOLE:]))


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
    return output, partial(_loss, batch=batch, parts=parts, sums=sums)


def _loss(
    logits_1TV: torch.Tensor, *, batch: MMBatch, parts: StepParts, sums: _Sums
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted sum of token losses of one micro-batch (last stage only).

    The second value is megatron-core's integer token count, which is not used: weights may be fractions.
    """
    assert batch.labels_T is not None, "the last stage needs labels"
    assert batch.loss_mask_T is not None, "the last stage needs target weights"
    language, topology = parts.cfg.language, parts.topology
    labels_T, weight_T = (topology.own_tokens(whole_T) for whole_T in (batch.labels_T, batch.loss_mask_T))
    losses = target_losses(
        logits_1TV.flatten(0, 1),  # a view; an index would make the gradient a second tensor of this size
        labels_T,
        weight_T,
        shard=vocabulary_shard(
            vocab_size=language.vocab_size, padded_size=padded_vocab_size(parts.cfg), group=topology.groups.tp
        ),
        kernels=parts.loss_kernels,
        z_loss_coeff=language.z_loss_coeff,
    )
    per_token_3T = torch.stack((losses.cross_entropy_T, losses.squared_lse_T, torch.ones_like(weight_T))) * weight_T
    sums.add(per_token_3T, None if batch.sources_T is None else topology.own_tokens(batch.sources_T))
    return losses.total, torch.zeros((), dtype=torch.int, device=topology.device), {}
