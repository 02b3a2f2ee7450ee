"""The parity harness: one initial state, one stream of mixed batches, any layout; what it computes is compared.

Initial weights are a function of (seed, name), so every layout starts from the same model. A layout is a list of
overrides of the configuration; ``trace`` runs it on real gloo ranks and returns what one whole model would show: losses
and gradient norms of every step, every gradient gathered from its shards, and the final parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from megatron.core.distributed import DistributedDataParallel

from mm15_megatron.batch import MMBatch
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.models.build import build_model, check_replicas
from mm15_megatron.models.global_parameters import GlobalParameter, global_parameters
from mm15_megatron.parallel.batch_scatter import local_batch
from mm15_megatron.parallel.seeds import seed_everything
from mm15_megatron.parallel.topology import Topology, build_topology, close_topology
from mm15_megatron.training.optimizer import build_optimizer, wrap_chunks
from mm15_megatron.training.step import StepParts, accumulate_gradients, apply_gradients

from .ranks import rank_place, run_on_ranks
from .streams import batch_of_rows, global_batch

# fp32 sums taken in another order, five steps deep. Seen: 1e-5 of the largest entry of a gradient, 1e-6 of a loss.
FP32_REDUCTION = 5e-5
FP32_SCALAR = 5e-6
# AdamW divides by sqrt(v), which enlarges the noise of small gradients; seen: 5e-5 of what a parameter may move.
UPDATE_SHARE = 1e-3


@dataclass
class Trace:
    """What a layout showed.

    Attributes:
        losses: loss of each step.
        grad_norms: global gradient norm of each step.
        gradients: whole gradients of the last step by global name.
        parameters: whole parameters after the last step by global name.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)


def build_parts(cfg: RunConfig) -> StepParts:
    """Build topology, model and optimizer of this rank exactly as a run does."""
    torch.set_num_threads(1)
    topology = build_topology(cfg.parallel, place=rank_place())
    seed_everything(cfg.train.seed, topology=topology)
    model = build_model(cfg, stage=topology)
    check_replicas(model, group=topology.groups.tp)
    chunks = wrap_chunks(cfg, [model])
    optimizer = build_optimizer(cfg, chunks)
    for group in optimizer.param_groups:  # a constant schedule; the loop's own is tested with it
        group["lr"] = group["max_lr"]
        group["weight_decay"] = cfg.optimizer.weight_decay * group["wd_mult"]
    return StepParts(cfg=cfg, topology=topology, chunks=chunks, optimizer=optimizer)


def micro_batches(cfg: RunConfig, topology: Topology, *, step: int) -> Iterator[MMBatch]:
    """This rank's micro-batches of one step: row r goes to rank (r // micro_batch_size) % data_size."""
    rows = global_batch(cfg, step=step)
    size = cfg.train.micro_batch_size
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    for group in groups[topology.data_rank :: topology.data_size]:
        yield local_batch(batch_of_rows(group, cfg), topology=topology, image_size=cfg.vision.image_size)


def run_step(parts: StepParts, *, step: int) -> tuple[float, dict[str, torch.Tensor], float]:
    """One training step with its gathered gradients: (loss, gradients, norm)."""
    for chunk in parts.chunks:
        chunk.zero_grad_buffer()
    parts.optimizer.zero_grad()
    count = parts.cfg.train.global_batch_size // parts.cfg.train.micro_batch_size // parts.topology.data_size
    stream = micro_batches(parts.cfg, parts.topology, step=step)
    sums = accumulate_gradients(parts, stream, num_microbatches=count)
    gradients = gathered(parts, _whole_gradient(parts))
    norm, applied = apply_gradients(parts.optimizer)
    assert applied, "the update was skipped"
    return sums.loss, gradients, norm


def _whole_gradient(parts: StepParts) -> Callable[[GlobalParameter], torch.Tensor | None]:
    if parts.cfg.parallel.use_distributed_optimizer:
        for chunk in parts.chunks:
            _complete_sharded_gradients(chunk, parts.topology)
    return lambda item: item.parameter.main_grad if item.parameter.requires_grad else None


def _complete_sharded_gradients(chunk: DistributedDataParallel, topology: Topology) -> None:
    """After a reduce-scatter each rank holds one share of every bucket: collect the others."""
    for buffer in chunk.buffers:
        for bucket in buffer.buckets:
            shares = list(bucket.grad_data.view(topology.data_size, -1).unbind())
            mine = shares[topology.data_rank].clone()
            torch.distributed.all_gather(shares, mine, group=topology.groups.dp_cp)
            for target, share in zip(bucket.grad_data.view(topology.data_size, -1).unbind(), shares, strict=True):
                target.copy_(share)


def gathered(parts: StepParts, value: Callable[[GlobalParameter], torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """Gather a per-parameter tensor over the tensor-parallel group; only one rank of each replica group keeps it."""
    whole: dict[str, torch.Tensor] = {}
    for item in global_parameters([chunk.module for chunk in parts.chunks]):
        tensor = value(item)
        if tensor is None:
            continue
        collected = item.gather(tensor)
        if parts.topology.tensor_rank == 0 and parts.topology.data_rank == 0 and not item.tied_copy:
            whole[item.name] = collected.cpu()
    return whole


def trace_on_rank(cfg: RunConfig, steps: int) -> Trace:
    """Run ``steps`` steps on this rank."""
    parts = build_parts(cfg)
    trace = Trace()
    for step in range(steps):
        loss, gradients, norm = run_step(parts, step=step)
        trace.losses.append(loss)
        trace.grad_norms.append(norm)
        trace.gradients = gradients
    for chunk in parts.chunks:
        if cfg.parallel.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)  # otherwise the next forward pass would gather the last update
    trace.parameters = gathered(parts, lambda item: item.parameter.data)
    close_topology()
    return trace


def trace(cfg: RunConfig, *, world_size: int, steps: int = 5) -> Trace:
    """Run a layout on ``world_size`` ranks and merge what the pipeline stages hold."""
    results = run_on_ranks(trace_on_rank, world_size, cfg=cfg, steps=steps)
    merged = Trace(losses=results[0].losses, grad_norms=results[0].grad_norms)
    for result in results:
        assert result.losses == results[0].losses, "ranks disagree about the loss"
        merged.gradients.update(result.gradients)
        merged.parameters.update(result.parameters)
    return merged


@dataclass(frozen=True)
class Difference:
    """How far a layout is from the reference.

    Attributes:
        loss: largest absolute difference of a step's loss.
        grad_norm: largest relative difference of a gradient norm.
        gradient: largest difference of a gradient, relative to the largest entry of that gradient.
        parameter: largest difference of a parameter, in units of the learning rate times the steps taken.
        first: name of the gradient that differs most.
    """

    loss: float
    grad_norm: float
    gradient: float
    parameter: float
    first: str

    @property
    def passes(self) -> bool:
        """Whether every figure is within its named tolerance."""
        return (
            self.loss <= FP32_SCALAR
            and self.grad_norm <= FP32_SCALAR
            and self.gradient <= FP32_REDUCTION
            and self.parameter <= UPDATE_SHARE
        )


def distance(tensor: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference; infinite if the shapes differ or a value is not a number."""
    if tensor.shape != reference.shape or not tensor.isfinite().all():
        return float("inf")
    return (tensor - reference).abs().max().item()


def compare(reference: Trace, other: Trace, *, learning_rate: float) -> Difference:
    """Compare two traces.

    Raises:
        AssertionError: if they do not hold the same parameters.
    """
    assert reference.gradients.keys() == other.gradients.keys(), reference.gradients.keys() ^ other.gradients.keys()
    assert reference.parameters.keys() == other.parameters.keys(), reference.parameters.keys() ^ other.parameters.keys()
    gradients = {
        name: distance(other.gradients[name], whole) / max(whole.abs().max().item(), 1e-6)
        for name, whole in reference.gradients.items()
    }
    worst = max(gradients, key=gradients.__getitem__)
    update = learning_rate * len(reference.losses)
    return Difference(
        loss=max(abs(a - b) for a, b in zip(reference.losses, other.losses, strict=True)),
        grad_norm=max(abs(a - b) / a for a, b in zip(reference.grad_norms, other.grad_norms, strict=True)),
        gradient=gradients[worst],
        parameter=max(distance(other.parameters[name], whole) / update for name, whole in reference.parameters.items()),
        first=worst,
    )
