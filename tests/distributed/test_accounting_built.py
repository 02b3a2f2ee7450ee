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
from mm15_megatron.models.build import build_chunks
from mm15_megatron.parallel.seeds import seed_everything
from mm15_megatron.parallel.topology import build_topology, close_topology
from mm15_megatron.parity.ranks import rank_place, run_on_ranks
from mm15_megatron.presets import resolve

TP2 = "parallel.tensor_model_parallel_size=2"
PP2 = "parallel.pipeline_model_parallel_size=2"
AIM = [
    "connector.kind=attention_pool",
    "connector.position_embedding=false",
    "vision.position_embedding=sincos",
    "vision.pre_layernorm=patches",
    "vision.patch_bias=true",
    "vision.add_bias_linear=false",
    "vision.class_token=false",
    "vision.post_layernorm=true",
]
TIED = "language.share_embeddings_and_output_weights=true"


VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
EP2 = "parallel.expert_model_parallel_size=2"
ETP1 = "parallel.expert_tensor_parallel_size=1"


def build(cfg: RunConfig) -> tuple[int, dict[str, int]]:
    """Return this rank's pipeline stage and the parameters it holds, by top-level module."""
    topology = build_topology(cfg.parallel, place=rank_place())
    seed_everything(cfg.train.seed, topology=topology)
    counts: dict[str, int] = {}
    for model in build_chunks(cfg, stages=topology.stages):
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
        ["connector.kind=attention_pool", "connector.num_tokens=5", "vision.position_grid_size=6"],
        AIM,
    ],
    ids=["plain", "tied-qk-gelu", "average-pool", "early-features", "deep-mlp", "attention-pool", "aim"],
)
def test_modules_of_one_rank(overrides):
    cfg = apply_overrides(resolve("debug_dense"), overrides)
    ((_, counts),) = run_on_ranks(build, 1, cfg=cfg)
    expected = sorted((language_parameters(cfg).total, vision_parameters(cfg.vision), connector_parameters(cfg)))
    assert sorted(counts.values()) == expected
    assert sum(counts.values()) == model_parameters(cfg).total


@pytest.mark.parametrize(
    ("preset", "world", "overrides"),
    [
        ("debug_dense", 2, [TP2]),
        ("debug_dense", 2, [TP2, TIED, "language.qk_layernorm=true"]),
        ("debug_dense", 2, [PP2]),
        ("debug_dense", 2, [PP2, TIED]),
        ("debug_dense", 2, [PP2, VPP2, TIED]),
        ("debug_dense", 4, [TP2, PP2]),
        ("debug_moe", 1, []),
        ("debug_moe", 2, [TP2, "parallel.sequence_parallel=true"]),
        ("debug_moe", 2, [TP2, ETP1]),
        ("debug_moe", 2, [TP2, ETP1, EP2]),
        ("debug_moe", 4, [PP2, VPP2, EP2]),
    ],
    ids=["tp2", "tp2-tied-qk", "pp2", "pp2-tied", "vpp2-tied", "tp2pp2", "moe", "moe-tp2sp", "moe-tp2-etp1"]
    + ["moe-tp2-etp1-ep2", "moe-vpp2-ep2"],
)
def test_every_rank_of_a_layout(preset, world, overrides):
    cfg = apply_overrides(resolve(preset), overrides)
    for stage, counts in run_on_ranks(build, world, cfg=cfg):
        assert sum(counts.values()) * 4 == memory_estimate(cfg, world_size=world, stage=stage).parameters
    assert sum(pipeline_layer_split(cfg)) == cfg.language.num_layers
