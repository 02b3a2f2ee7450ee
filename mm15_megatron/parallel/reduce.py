"""What happens to gradients between the last backward pass and the optimizer. Nothing here asks the device for a value.

megatron-core reduces over data-parallel ranks, sums what sequence parallelism left partial and ties the embeddings.
Three things are ours. The gradients of the encoder, whose tensor-parallel ranks encoded other tiles, are summed over
the tensor-parallel group; so are those of the routers, whose tensor-parallel ranks routed other tokens. And the loss is
normalised by the weight of all targets of the global batch. The gradient norm is computed here because megatron-core's
reads it: once a chained optimizer, and, without Transformer Engine and apex, once a parameter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from mm15_megatron.parallel.topology import Topology

_ENCODER = ("vision_encoder.", "connector.")
_ROUTER = ".mlp.router.weight"


def global_sum(values: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Sum per-rank values of the last stage over data-parallel ranks and tell every stage.

    Args:
        values: any shape, fp32 or fp64; only the last stage's content counts.
        topology: the groups.

    Returns:
        The sum, equal on every rank.
    """
    total = values.clone()
    if topology.pipeline_size > 1:
        last = torch.distributed.get_global_rank(topology.groups.pp, topology.pipeline_size - 1)
        torch.distributed.broadcast(total, src=last, group=topology.groups.pp)
    torch.distributed.all_reduce(total, group=topology.groups.dp_cp)
    return total


def finalise_gradients(
    chunks: Sequence[DistributedDataParallel], *, target_weight: torch.Tensor, topology: Topology
) -> None:
    """Reduce every gradient and divide by the weight of the global batch's targets.

    Args:
        chunks: this rank's wrapped model chunks.
        target_weight: fp32 scalar, sum of the target weights of the global batch.
        topology: the groups.
    """
    finalize_model_grads(list(chunks), num_tokens=None, pg_collection=topology.groups)
    sum_over_tensor_group([p for chunk in chunks for p in partial_parameters(chunk, topology)], topology)
    # A batch without any target has zero gradients; dividing by one keeps them zero instead of NaN.
    scale = 1.0 / torch.where(target_weight > 0, target_weight, torch.ones_like(target_weight))
    for chunk in chunks:
        chunk.scale_gradients(scale)


def squared_gradient_norm(optimizer: ChainedOptimizer, *, device: torch.device) -> torch.Tensor:
    """Sum of the squares of all gradients that the optimizers hold, fp32 scalar, equal on every rank.

    Which gradients a rank counts, and the group that adds them up, are megatron-core's: each parameter counts once.
    """
    by_group: dict[torch.distributed.ProcessGroup, list[torch.Tensor]] = {}
    for part in optimizer.chained_optimizers:
        counted = by_group.setdefault(part.get_grad_stats_parallel_group(), [])
        counted += part.get_main_grads_for_grad_norm()
    total = torch.zeros((), device=device)
    for group, gradients in by_group.items():
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=device)
        square = norm.float().square()
        torch.distributed.all_reduce(square, group=group)
        total += square
    return total


def partial_parameters(chunk: DistributedDataParallel, topology: Topology) -> list[torch.nn.Parameter]:
    """Parameters whose gradient is still partial on each tensor-parallel rank after megatron-core's reductions.

    The encoder's and the connector's, if the tiles are shared; a router's, if the sparse layer cut the tokens by itself
    (under sequence parallelism megatron-core sums it).
    """
    if topology.tensor_size == 1:
        return []
    sequence_parallel = chunk.config.sequence_parallel
    return [
        parameter
        for name, parameter in chunk.module.named_parameters()
        if parameter.requires_grad
        and (
            (topology.encoder_shares_tiles and name.startswith(_ENCODER))
            or (name.endswith(_ROUTER) and not sequence_parallel)
        )
    ]


def sum_over_tensor_group(parameters: Sequence[torch.nn.Parameter], topology: Topology) -> None:
    """Sum gradients over the tensor-parallel group in one collective."""
    gradients = [parameter.main_grad for parameter in parameters]
    if not gradients:
        return
    flat = _flatten_dense_tensors(gradients)
    torch.distributed.all_reduce(flat, group=topology.groups.tp)
    for gradient, summed in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
        gradient.copy_(summed)
