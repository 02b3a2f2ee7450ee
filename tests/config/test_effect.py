"""Options without effect: every row of the table speaks and is silent, and no option escapes all of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mm15_megatron import config, presets
from mm15_megatron.config.effect import TABLE, Idle, without_effect
from mm15_megatron.config.parse import apply_overrides
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.config.tree import OPTIONS
from mm15_megatron.presets import REGISTRY, resolve

MOE = "moe.num_moe_experts=4"
CAPACITY = "moe.moe_expert_capacity_factor=1.0"
POOL = "connector.kind=average_pool"
ATTENTION = "connector.kind=attention_pool"
SINCOS = "vision.position_embedding=sincos"
DYNAMIC, STATIC = "tiling.mode=dynamic", "tiling.mode=static"
CONSTANT = "schedule.decay=constant"
ADAFACTOR = "optimizer.name=adafactor"
BF16 = "kernels.params_dtype=bf16"
FP8, DELAYED = "precision.fp8=hybrid", "precision.fp8_recipe=delayed"
TE = ["parallel.device=cuda", "kernels.transformer_impl=transformer_engine", "kernels.params_dtype=bf16"]
FULL = "kernels.recompute_granularity=full"
OVERLAP = "parallel.overlap_grad_reduce=true"
TP2 = "parallel.tensor_model_parallel_size=2"
FROZEN_DECODER = "freeze.language=true"
FROZEN_ENCODER = "freeze.vision=true"

# option = value, what else makes it idle, ranks then, what else gives it effect, ranks then
CASES = [
    ("moe.moe_layer_period=4", [], 1, [MOE], 1),
    ("moe.moe_router_topk=1", [], 1, [MOE], 1),
    ("moe.moe_aux_loss_coeff=0.1", [], 1, [MOE], 1),
    ("moe.moe_z_loss_coeff=0.1", [], 1, [MOE], 1),
    ("moe.moe_expert_capacity_factor=1.0", [], 1, [MOE], 1),
    ("moe.moe_router_load_balancing_type=gshard_top1", [], 1, [MOE], 1),
    ("moe.moe_capacity_group_size=32", [MOE], 1, [MOE, CAPACITY], 1),
    ("moe.moe_token_drop_policy=probs", [MOE], 1, [MOE, CAPACITY], 1),
    ("parallel.expert_tensor_parallel_size=2", [], 2, [MOE], 2),
    ("connector.hidden_size=32", [POOL], 1, [], 1),
    ("connector.depth=2", [POOL], 1, [], 1),
    ("connector.mlp_depth=1", [ATTENTION], 1, [], 1),
    ("connector.num_attention_heads=2", [POOL], 1, [ATTENTION], 1),
    ("vision.position_grid_size=2", [SINCOS, POOL], 1, [SINCOS], 1),
    ("connector.position_embedding=false", [POOL], 1, [], 1),
    ("connector.norm_epsilon=1e-6", [POOL], 1, [], 1),
    ("optimizer.vision_lr=1e-5", [FROZEN_ENCODER], 1, [], 1),
    ("kernels.recompute_vision=true", [FROZEN_ENCODER], 1, [], 1),
    ("optimizer.connector_lr=1e-4", ["freeze.connector=true"], 1, [], 1),
    ("optimizer.lr=1e-3", [FROZEN_DECODER, FROZEN_ENCODER, "optimizer.connector_lr=1e-4"], 1, [FROZEN_DECODER], 1),
    ("tiling.overview=before", [], 1, [STATIC], 1),
    ("tiling.max_split_images=1", [], 1, [DYNAMIC], 1),
    ("tiling.mixed_resolution_images=1", [], 1, [STATIC], 1),
    ("tiling.indicator=index", [], 1, [STATIC], 1),
    ("tiling.min_tiles=1", [STATIC], 1, [DYNAMIC], 1),
    ("tiling.max_tiles=5", [], 1, [DYNAMIC], 1),
    ("tiling.resize=fit", [DYNAMIC], 1, [], 1),
    ("parallel.encoder_parallel=tensor", [], 2, [TP2], 2),
    ("parallel.use_distributed_optimizer=true", [TP2], 2, [], 2),
    (OVERLAP, [], 1, [], 2),
    ("parallel.overlap_param_gather=true", [], 1, [], 2),
    ("parallel.ddp_bucket_size=1000", [], 2, [OVERLAP], 2),
    ("parallel.grad_reduce_in_fp32=false", [], 2, [BF16], 2),
    ("kernels.recompute_num_layers=2", ["kernels.recompute_granularity=selective"], 1, [FULL], 1),
    ("kernels.recompute_modules=[mlp]", [FULL], 1, ["kernels.recompute_granularity=selective"], 1),
    ("kernels.cuda_graph_warmup_steps=5", [], 1, ["kernels.cuda_graph_scope=[mlp]", *TE], 1),
    ("kernels.moe_permute_fusion=true", [], 1, [MOE], 1),
    ("precision.fp8_recipe=delayed", [], 1, [FP8], 1),
    ("precision.fp8_vision=true", [], 1, [FP8], 1),
    ("precision.first_last_layers_bf16=true", [], 1, [FP8], 1),
    ("precision.fp8_margin=1", [FP8], 1, [FP8, DELAYED], 1),
    ("precision.fp8_amax_history_len=16", [FP8], 1, [FP8, DELAYED], 1),
    ("precision.fp8_amax_compute_algo=most_recent", [FP8], 1, [FP8, DELAYED], 1),
    ("precision.num_layers_at_start_in_bf16=2", [FP8], 1, [FP8, "precision.first_last_layers_bf16=true"], 1),
    ("precision.num_layers_at_end_in_bf16=2", [FP8], 1, [FP8, "precision.first_last_layers_bf16=true"], 1),
    ("data.row_dealing=round_robin", [TP2], 2, [], 2),
    ("data.shuffle_block=8", [], 1, ["data.shuffle=blocks"], 1),
    ("data.shuffle_window=8", ["data.shuffle=none"], 1, ["data.shuffle=blocks"], 1),
    ("data.prefetch_factor=4", ["data.num_workers=0"], 1, [], 1),
    ("data.validation_sources=[{prefix: a}]", [], 1, ["train.validation_interval=5"], 1),
    ("train.validation_steps=3", [], 1, ["train.validation_interval=5"], 1),
    ("optimizer.adafactor_beta1=null", [], 1, [ADAFACTOR], 1),
    ("optimizer.adafactor_clip_threshold=1", [], 1, [ADAFACTOR], 1),
    ("optimizer.adafactor_decay_rate=0.5", [], 1, [ADAFACTOR], 1),
    ("optimizer.adafactor_eps=1e-20", [], 1, [ADAFACTOR], 1),
    ("kernels.optimizer_impl=torch", [ADAFACTOR], 1, [], 1),
    ("faults.loss_spike_window=50", ["faults.loss_spike=off"], 1, [], 1),
    ("faults.loss_spike_threshold=5", ["faults.loss_spike=off"], 1, ["faults.loss_spike=skip"], 1),
    ("optimizer.adam_beta1=0.8", [ADAFACTOR], 1, [], 1),
    ("optimizer.adam_beta2=0.99", [ADAFACTOR], 1, [], 1),
    ("optimizer.adam_eps=1e-6", [ADAFACTOR], 1, [], 1),
    ("optimizer.decay_norms_and_biases=true", ["optimizer.weight_decay=0"], 1, [], 1),
    ("schedule.min_lr_ratio=0.5", [CONSTANT], 1, [], 1),
    ("checkpoint.init_from=runs/base", ["checkpoint.resume=required"], 1, ["checkpoint.resume=never"], 1),
]


def idle_paths(overrides: list[str], *, world: int) -> set[str]:
    cfg = apply_overrides(resolve("debug_dense"), overrides)
    return {found.path for found in without_effect(cfg, world_size=world)}


@pytest.mark.parametrize(("option", "idle", "world", "used", "used_world"), CASES, ids=[case[0] for case in CASES])
def test_option_is_idle_or_not(option, idle, world, used, used_world):
    path = option.partition("=")[0]
    assert path in idle_paths([option, *idle], world=world)
    assert path not in idle_paths([option, *used], world=used_world)


def test_every_option_of_the_table_has_a_case_and_one_row():
    listed = " ".join(row.paths for row in TABLE).split()
    assert sorted(listed) == sorted(case[0].partition("=")[0] for case in CASES)
    assert set(listed) <= set(OPTIONS)


def test_an_option_at_its_default_is_not_idle():
    assert without_effect(RunConfig(), world_size=1) == ()
    assert without_effect(resolve("debug_dense"), world_size=1) == ()


def test_what_is_reported():
    cfg = apply_overrides(RunConfig(), ["optimizer.adafactor_beta1=0.5"])
    assert without_effect(cfg, world_size=1) == (
        Idle("optimizer.adafactor_beta1", 0.5, "they belong to AdaFactor (optimizer.name)"),
    )


@pytest.mark.parametrize("name", [name for name in REGISTRY if not name.startswith("debug")])
def test_presets_of_the_papers_carry_nothing_idle(name):
    assert without_effect(resolve(name), world_size=512) == ()


def _names_read() -> set[str]:
    """Attributes read by the package: not by the rules and the presets, but by the properties of the schema."""
    package = Path(config.__path__[0]).parent
    apart = (Path(config.__path__[0]), Path(presets.__path__[0]))
    files = [path for path in package.rglob("*.py") if not any(folder in path.parents for folder in apart)]
    files += apart[0].glob("schema*.py")
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    return {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def test_every_option_is_read_or_reported():
    listed = set(" ".join(row.paths for row in TABLE).split())
    read = _names_read()
    assert [path for path in set(OPTIONS) - listed - {"preset"} if path.rpartition(".")[2] not in read] == []
