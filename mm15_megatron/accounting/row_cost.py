"""What one row costs on the first pipeline stage, which encodes its images."""

from __future__ import annotations

from mm15_megatron.accounting.flops import planned_tiles_per_row, trained_tile
from mm15_megatron.accounting.pipeline import pipeline_layer_split, stage_costs
from mm15_megatron.config.schema import RunConfig


def row_cost(cfg: RunConfig, tiles: float) -> float:
    """Return the model FLOPs that pipeline stage 0 spends on a row of ``tiles`` tiles: a constant, and a price a tile.

    Raises:
        ConfigError: the layers cannot be split over the pipeline.
    """
    full_row = stage_costs(cfg, pipeline_layer_split(cfg))[0]
    return full_row + (tiles - planned_tiles_per_row(cfg)) * sum(trained_tile(cfg))
