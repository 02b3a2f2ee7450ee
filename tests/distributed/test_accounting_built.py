"""Accounting against models that are really built: every rank of several layouts holds what the formulas say."""

from __future__ import annotations

import pytest
import torch

from mm15_megatron.accounting import (
    connector_parameters,
    language_parameters,
    memory_estimate,
    model_parameters,
    pipeline_layer_split,
    vision_parameters,
)
from mm15_megatron.config.parse import apply_overrides
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.models.build import build_model
from mm15_megatron.parallel.seeds import seed_everything
from mm15_megatron.parallel.topology import build_topology, close_topology
from mm15_megatron.presets import resolve
from tests.helpers.ranks import rank_place, run_on_ranks

TP2 = "parallel.tensor_model_parallel_size=2"
PP2 = "parallel.pipeline_model_parallel_size=2"
TIED = "language.share_embeddings_and_output_weights=true"


def build(cfg: RunConfig) -> tuple[int, dict[str, int]]:
    """Return this rank's pipeline stage and the parameters it holds, by top-level module."""
    topology = build_topology(cfg.parallel, place=rank_place())
    seed_everything(cfg.train.seed, topology=topology)
    model = build_model(cfg, stage=topology)
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        room = name.split(".")[0]
        counts[room] = counts.get(room, 0) + parameter.numel()
    index = torch.distributed.get_rank(topology.groups.pp)
    close_topology()
    return index, counts


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [TIED, "language.qk_layernorm=true", "language.activation=gelu", "language.vocab_size=300"],
        ["connector.kind=average_pool", "vision.class_token=false", "vision.post_layernorm=true"],
        ["vision.feature_layer=-2", "vision.position_grid_size=6", "connector.depth=2", "connector.hidden_size=32"],
        ["connector.position_embedding=false", "connector.mlp_depth=3"],
    ],
    ids=["plain", "tied-qk-gelu", "average-pool", "early-features", "deep-mlp"],
)
def test_modules_of_one_rank(overrides):
    cfg = apply_overrides(resolve("debug_dense"), overrides)
    ((_, counts),) = run_on_ranks(build, 1, cfg=cfg)
    expected = sorted((language_parameters(cfg).total, vision_parameters(cfg.vision), connector_parameters(cfg)))
    assert sorted(counts.values()) == expected
    assert sum(counts.values()) == model_parameters(cfg).total


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (2, [TP2]),
        (2, [TP2, TIED, "language.qk_layernorm=true"]),
        (2, [PP2]),
        (2, [PP2, TIED]),
        (4, [TP2, PP2]),
    ],
    ids=["tp2", "tp2-tied-qk", "pp2", "pp2-tied", "tp2pp2"],
)
def test_every_rank_of_a_layout(world, overrides):
    cfg = apply_overrides(resolve("debug_dense"), overrides)
    for stage, counts in run_on_ranks(build, world, cfg=cfg):
        assert sum(counts.values()) * 4 == memory_estimate(cfg, world_size=world, stage=stage).parameters
    assert sum(pipeline_layer_split(cfg)) == cfg.language.num_layers
