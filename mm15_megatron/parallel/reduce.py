"""What happens to gradients between the last backward pass and the optimizer.

megatron-core reduces over data-parallel ranks, sums what sequence parallelism left partial and ties the embeddings. Two
things are ours: the encoder's gradients are summed over the tensor-parallel group when each of its ranks encoded other
tiles, and the loss is normalised by the weight of all targets of the global batch (numerics sections 1 and 5).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from mm15_megatron.parallel.topology import Topology

_ENCODER = ("vision_encoder.", "connector.")


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
        target_weight: scalar, sum of the target weights of this rank's micro-batches (last stage; ignored elsewhere).
        topology: the groups.
    """
    finalize_model_grads(list(chunks), num_tokens=None, pg_collection=topology.groups)
    if topology.encoder_shares_tiles and topology.tensor_size > 1 and topology.is_first_stage:
        _sum_encoder_gradients(chunks[0], topology)
    total = global_sum(target_weight, topology)
    # A batch without any target has zero gradients; dividing by one keeps them zero instead of NaN.
    scale = 1.0 / torch.where(total > 0, total, torch.ones_like(total))
    for chunk in chunks:
        chunk.scale_gradients(scale)


def _sum_encoder_gradients(chunk: DistributedDataParallel, topology: Topology) -> None:
    gradients = [
        parameter.main_grad
        for name, parameter in chunk.module.named_parameters()
        if parameter.requires_grad and name.startswith(_ENCODER)
    ]
    if not gradients:
        return
    flat = _flatten_dense_tensors(gradients)
    torch.distributed.all_reduce(flat, group=topology.groups.tp)
    for gradient, summed in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
        gradient.copy_(summed)
