"""Options that a run carries but never uses: what is set, and why it changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mm15_megatron.config.schema import RunConfig
from mm15_megatron.config.tree import OPTIONS, flatten
from mm15_megatron.config.validate import data_parallel_size


@dataclass(frozen=True)
class Idle:
    """An option that differs from its default without effect.

    Attributes:
        path: ``section.field``.
        value: what it is set to.
        reason: why it changes nothing, as the end of a sentence.
    """

    path: str
    value: Any
    reason: str


def without_effect(cfg: RunConfig, *, world_size: int) -> tuple[Idle, ...]:
    """Return the options that are set but change nothing in this run; for a report, since none of them is wrong.

    Args:
        cfg: a configuration that passed ``validate``.
        world_size: number of processes (ranks).

    Raises:
        ConfigError: the world cannot be split as configured.
    """
    situation = _Situation(cfg, data_parallel=data_parallel_size(cfg, world_size=world_size))
    values = flatten(cfg)
    return tuple(
        Idle(path, values[path], row.reason)
        for row in TABLE
        if row.idle(situation)
        for path in row.paths.split()
        if values[path] != OPTIONS[path].default
    )


@dataclass(frozen=True)
class _Situation:
    cfg: RunConfig
    data_parallel: int


@dataclass(frozen=True)
class Row:
    """Options that share one precondition.

    Attributes:
        paths: the options, separated by spaces.
        reason: what makes them idle.
        idle: whether that is so.
    """

    paths: str
    reason: str
    idle: Callable[[_Situation], bool]


def _connector_stores_positions(cfg: RunConfig) -> bool:
    return cfg.connector.position_embedding and cfg.connector.kind != "average_pool"


TABLE: tuple[Row, ...] = (
    Row(
        "moe.moe_layer_period moe.moe_router_topk moe.moe_aux_loss_coeff moe.moe_z_loss_coeff "
        "moe.moe_expert_capacity_factor moe.moe_router_load_balancing_type parallel.expert_tensor_parallel_size",
        "the model is dense (moe.num_moe_experts = 0)",
        lambda s: s.cfg.moe.num_moe_experts == 0,
    ),
    Row(
        "moe.moe_capacity_group_size moe.moe_token_drop_policy",
        "no token is dropped (moe.num_moe_experts = 0, or moe.moe_expert_capacity_factor = null)",
        lambda s: s.cfg.moe.num_moe_experts == 0 or s.cfg.moe.moe_expert_capacity_factor is None,
    ),
    Row(
        "connector.hidden_size connector.position_embedding connector.norm_epsilon",
        "average pooling has none (connector.kind = average_pool)",
        lambda s: s.cfg.connector.kind == "average_pool",
    ),
    Row(
        "connector.depth connector.mlp_depth",
        "they size the C-Abstractor (connector.kind = c_abstractor)",
        lambda s: s.cfg.connector.kind != "c_abstractor",
    ),
    Row(
        "connector.num_attention_heads",
        "only attention pooling has heads (connector.kind)",
        lambda s: s.cfg.connector.kind != "attention_pool",
    ),
    Row(
        "vision.position_grid_size",
        "sin-cos positions are computed for any grid, and the connector stores no table either",
        lambda s: s.cfg.vision.position_embedding == "sincos" and not _connector_stores_positions(s.cfg),
    ),
    Row(
        "optimizer.vision_lr kernels.recompute_vision",
        "the encoder is frozen (freeze.vision)",
        lambda s: s.cfg.freeze.vision,
    ),
    Row(
        "optimizer.connector_lr",
        "the connector is frozen (freeze.connector)",
        lambda s: s.cfg.freeze.connector,
    ),
    Row(
        "optimizer.lr",
        "the decoder is frozen, and encoder and connector are too or have rates of their own",
        lambda s: (
            s.cfg.freeze.language
            and (s.cfg.freeze.connector or s.cfg.optimizer.connector_lr is not None)
            and (s.cfg.freeze.vision or s.cfg.optimizer.vision_lr is not None)
        ),
    ),
    Row(
        "tiling.overview tiling.max_split_images tiling.mixed_resolution_images tiling.indicator",
        "no image is split (tiling.mode = none)",
        lambda s: s.cfg.tiling.mode == "none",
    ),
    Row(
        "tiling.min_tiles tiling.max_tiles",
        "only tiling.mode = dynamic chooses a grid",
        lambda s: s.cfg.tiling.mode != "dynamic",
    ),
    Row(
        "tiling.resize",
        "tiling.mode = dynamic always fits and pads",
        lambda s: s.cfg.tiling.mode == "dynamic",
    ),
    Row(
        "parallel.encoder_parallel",
        "there is no tensor-parallel group (parallel.tensor_model_parallel_size = 1)",
        lambda s: s.cfg.parallel.tensor_model_parallel_size == 1,
    ),
    Row(
        "parallel.use_distributed_optimizer parallel.overlap_grad_reduce parallel.overlap_param_gather",
        "one data-parallel rank has nothing to share or reduce",
        lambda s: s.data_parallel * s.cfg.parallel.context_parallel_size == 1,
    ),
    Row(
        "parallel.ddp_bucket_size",
        "gradients are reduced in one piece without parallel.overlap_grad_reduce",
        lambda s: not s.cfg.parallel.overlap_grad_reduce,
    ),
    Row(
        "parallel.grad_reduce_in_fp32",
        "gradients of fp32 parameters are fp32 (kernels.params_dtype)",
        lambda s: s.cfg.kernels.params_dtype == "fp32",
    ),
    Row(
        "kernels.recompute_num_layers",
        "only kernels.recompute_granularity = full recomputes whole layers",
        lambda s: s.cfg.kernels.recompute_granularity != "full",
    ),
    Row(
        "kernels.recompute_modules",
        "only kernels.recompute_granularity = selective names modules",
        lambda s: s.cfg.kernels.recompute_granularity != "selective",
    ),
    Row(
        "kernels.cuda_graph_warmup_steps",
        "nothing is captured (kernels.cuda_graph_scope)",
        lambda s: not s.cfg.kernels.cuda_graph_scope,
    ),
    Row(
        "kernels.moe_permute_fusion",
        "the model is dense (moe.num_moe_experts = 0)",
        lambda s: s.cfg.moe.num_moe_experts == 0,
    ),
    Row(
        "precision.fp8_recipe precision.fp8_vision precision.first_last_layers_bf16",
        "nothing computes in FP8 (precision.fp8 = null)",
        lambda s: s.cfg.precision.fp8 is None,
    ),
    Row(
        "precision.fp8_margin precision.fp8_amax_history_len precision.fp8_amax_compute_algo",
        "they belong to FP8 with precision.fp8_recipe = delayed",
        lambda s: s.cfg.precision.fp8 is None or s.cfg.precision.fp8_recipe != "delayed",
    ),
    Row(
        "precision.num_layers_at_start_in_bf16 precision.num_layers_at_end_in_bf16",
        "no layer of an FP8 model is kept in bf16 (precision.first_last_layers_bf16)",
        lambda s: s.cfg.precision.fp8 is None or not s.cfg.precision.first_last_layers_bf16,
    ),
    Row(
        "checkpoint.init_from",
        "a run that must resume starts from no other one (checkpoint.resume = required)",
        lambda s: s.cfg.checkpoint.resume == "required",
    ),
    Row(
        "data.row_dealing",
        "one data-parallel rank takes every row, in order",
        lambda s: s.data_parallel == 1,
    ),
    Row(
        "data.shuffle_block data.shuffle_window",
        "only data.shuffle = blocks has blocks",
        lambda s: s.cfg.data.shuffle != "blocks",
    ),
    Row(
        "data.prefetch_factor",
        "no worker prepares ahead (data.num_workers = 0)",
        lambda s: s.cfg.data.num_workers == 0,
    ),
    Row(
        "data.validation_sources train.validation_steps",
        "no validation runs (train.validation_interval = 0)",
        lambda s: s.cfg.train.validation_interval == 0,
    ),
    Row(
        "optimizer.adafactor_beta1 optimizer.adafactor_clip_threshold optimizer.adafactor_decay_rate "
        "optimizer.adafactor_eps",
        "they belong to AdaFactor (optimizer.name)",
        lambda s: s.cfg.optimizer.name != "adafactor",
    ),
    Row(
        "optimizer.adam_beta1 optimizer.adam_beta2 optimizer.adam_eps kernels.optimizer_impl",
        "they belong to AdamW (optimizer.name)",
        lambda s: s.cfg.optimizer.name != "adamw",
    ),
    Row(
        "faults.loss_spike_window faults.loss_spike_threshold",
        "nothing looks for jumps (faults.loss_spike = off)",
        lambda s: s.cfg.faults.loss_spike == "off",
    ),
    Row(
        "optimizer.decay_norms_and_biases",
        "nothing decays (optimizer.weight_decay = 0)",
        lambda s: s.cfg.optimizer.weight_decay == 0,
    ),
    Row(
        "schedule.min_lr_ratio",
        "a constant rate has no floor (schedule.decay)",
        lambda s: s.cfg.schedule.decay == "constant",
    ),
)
"""Every precondition of an option that another option decides."""
