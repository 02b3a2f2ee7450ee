"""What each pipeline stage costs, and the split of the decoder that follows."""

from __future__ import annotations

from itertools import accumulate

from mm15_megatron.accounting.flops import (
    layer_forward_flops,
    output_forward_flops,
    planned_tiles_per_row,
    trained_language,
    trained_tile,
)
from mm15_megatron.accounting.parameters import sparse_layers
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.config.validate import feasible_first_stages, virtual_stages
from mm15_megatron.errors import ConfigError


def chunk_layers(cfg: RunConfig, split: tuple[int, ...] | None = None) -> tuple[range, ...]:
    """Return the decoder layers (global indices from 0) of each virtual stage, in the order of the forward pass.

    Virtual stage k is chunk k // stages of pipeline rank k % stages (megatron-core's order).
    """
    lengths = pipeline_layer_split(cfg) if split is None else split
    ends = tuple(accumulate(lengths))
    return tuple(range(end - length, end) for end, length in zip(ends, lengths, strict=True))


def stage_layers(cfg: RunConfig, stage: int) -> tuple[int, ...]:
    """Return the decoder layers (global indices from 0) that a rank of pipeline stage ``stage`` holds."""
    stages = cfg.parallel.pipeline_model_parallel_size
    return tuple(layer for chunk in chunk_layers(cfg)[stage::stages] for layer in chunk)


def stage_costs(cfg: RunConfig, split: tuple[int, ...]) -> tuple[float, ...]:
    """Return the model FLOPs each pipeline rank spends on one full row: the first encodes, the last one predicts.

    Args:
        cfg: the run.
        split: decoder layers of each virtual stage.
    """
    sparse, stages = sparse_layers(cfg), cfg.parallel.pipeline_model_parallel_size
    costs = [0.0] * stages
    for position, layers in enumerate(chunk_layers(cfg, split)):
        costs[position % stages] += sum(
            trained_language(cfg, layer_forward_flops(cfg, sparse=sparse[layer])) for layer in layers
        )
    costs[0] += planned_tiles_per_row(cfg) * sum(trained_tile(cfg))
    costs[-1] += trained_language(cfg, output_forward_flops(cfg))
    return tuple(costs)


def pipeline_layer_split(cfg: RunConfig) -> tuple[int, ...]:
    """Return the decoder layers of each virtual stage (of each pipeline stage without interleaving).

    The first one gets ``parallel.num_layers_in_first_pipeline_stage``, or the number that makes the slowest rank
    fastest. The others share the rest as evenly as it goes; what is left over goes to the earlier ones, because the
    last one has the output layer.

    Raises:
        ConfigError: there are fewer layers than stages, or the configured number leaves too few.
    """
    layers, pieces = cfg.language.num_layers, virtual_stages(cfg)
    if pieces == 1:
        return (layers,)
    feasible = feasible_first_stages(cfg)
    chosen = cfg.parallel.num_layers_in_first_pipeline_stage
    if not feasible or (chosen is not None and chosen not in feasible):
        raise ConfigError(
            f"{layers} layers cannot be split over {pieces} stages with {chosen or 'any number'} on the first",
            fix=f"use 1 to {feasible[-1]} layers on the first stage" if feasible else f"use at most {layers} stages",
        )

    def split(first: int) -> tuple[int, ...]:
        each, left_over = divmod(layers - first, pieces - 1)
        return (first, *(each + (i < left_over) for i in range(pieces - 1)))

    if chosen is not None:
        return split(chosen)
    return min((split(first) for first in feasible), key=lambda candidate: max(stage_costs(cfg, candidate)))
