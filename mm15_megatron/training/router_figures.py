"""What the routers did in a step, layer by layer, over the whole global batch; and the weight of their losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from megatron.core.distributed import DistributedDataParallel

from mm15_megatron.accounting import sparse_layers
from mm15_megatron.batch import MMBatch
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import DataError
from mm15_megatron.models.router_ledger import BALANCE, DROPPED, LOAD, Z
from mm15_megatron.parallel.topology import Topology


@dataclass(frozen=True)
class RouterFigures:
    """One sparse layer in one step; means are over the real tokens of the global batch.

    Attributes:
        layer: global index of the layer, from 0.
        balance: load-balance loss before its coefficient; 1 = balanced, the number of experts = all to one.
        z: mean of logsumexp(router logits) ** 2, before its coefficient.
        load: share of the choices that fell on each expert, before capacity; sums to 1.
        dropped: share of the choices that found their expert full.
    """

    layer: int
    balance: float
    z: float
    load: tuple[float, ...]
    dropped: float


def begin_step(
    chunks: Sequence[DistributedDataParallel], batches: Iterator[MMBatch], *, cfg: RunConfig, topology: Topology
) -> Iterator[MMBatch]:
    """Tell the routers what a token's loss weighs in this step, and return the step's micro-batches.

    Gradients are divided by the targets of the global batch at the end of the step; router losses are means over its
    tokens. Both counts are known from the rows of the step before the first of them is computed.

    Raises:
        DataError: the first micro-batch does not say what the step holds.
    """
    if not cfg.moe.num_moe_experts:
        return batches
    first = next(batches)
    if first.step_counts is None:
        raise DataError(
            "the first micro-batch of a step does not say what the step holds",
            fix="set MMBatch.step_counts, as the loader does",
        )
    # Filled, not copied: a copy of pageable memory would wait for the device.
    counts = (float(first.step_counts.targets), float(first.step_counts.tokens))
    totals = torch.stack([torch.full((), count, dtype=torch.float64, device=topology.device) for count in counts])
    torch.distributed.all_reduce(totals, group=topology.groups.dp_cp)
    targets, tokens = totals
    for chunk in chunks:
        chunk.module.router_ledger.begin(loss_scale=(targets / tokens.clamp(min=1.0)).float())
    return chain((first,), batches)


def router_totals(chunks: Sequence[DistributedDataParallel], *, cfg: RunConfig, topology: Topology) -> torch.Tensor:
    """Add up the books of every rank (every rank must call): each token was entered by exactly one of them.

    Returns:
        fp64 [sparse layers of the model, 3 + E] on the device, columns as ``RouterLedger.totals``.
    """
    layers = _sparse(cfg)
    totals = torch.zeros(len(layers), LOAD + cfg.moe.num_moe_experts, dtype=torch.float64, device=topology.device)
    for chunk in chunks:
        ledger = chunk.module.router_ledger
        for layer, row in zip(ledger.layers, ledger.totals, strict=True):
            totals[layers.index(layer)] += row
    if layers:
        torch.distributed.all_reduce(totals)
    return totals


def router_figures(values: Sequence[float], *, cfg: RunConfig) -> tuple[RouterFigures, ...]:
    """Turn ``router_totals``, flattened and read from the device, into figures."""
    layers, columns = _sparse(cfg), LOAD + cfg.moe.num_moe_experts
    figures = []
    for index, layer in enumerate(layers):
        row = values[index * columns : (index + 1) * columns]
        choices = max(1.0, sum(row[LOAD:]))
        tokens = choices / cfg.moe.moe_router_topk
        figures.append(
            RouterFigures(
                layer=layer,
                balance=row[BALANCE] / tokens,
                z=row[Z] / tokens,
                load=tuple(count / choices for count in row[LOAD:]),
                dropped=row[DROPPED] / choices,
            )
        )
    return tuple(figures)


def _sparse(cfg: RunConfig) -> list[int]:
    return [layer for layer, sparse in enumerate(sparse_layers(cfg)) if sparse]
