"""Rules of overlapped communication: what megatron-core's schedules and Transformer Engine's buffers ask for."""

from __future__ import annotations

from mm15_megatron.config.rule import Rule, divides
from mm15_megatron.config.rules_layout import data_parallel_size
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import ConfigError

_MXFP8_BUFFER_ROWS = 128
"""Rows of a rank's share of a buffer that Transformer Engine 2.11 gathers in mxfp8."""


def _overlapped_experts(config: RunConfig, world_size: int) -> None:
    p, train = config.parallel, config.train
    if not p.overlap_moe_expert_parallel_comm:
        return
    what, off = "parallel.overlap_moe_expert_parallel_comm", "parallel.overlap_moe_expert_parallel_comm=false"
    if p.expert_model_parallel_size == 1:
        raise ConfigError(
            f"{what} hides the all-to-all between ranks that hold different experts, found moe.num_moe_experts = "
            f"{config.moe.num_moe_experts} and parallel.expert_model_parallel_size = 1",
            fix=f"spread the experts over more ranks, or set {off}",
        )
    if config.kernels.params_dtype != "bf16":
        raise ConfigError(
            f"{what}: megatron-core plans it for bf16, and kernels.params_dtype = {config.kernels.params_dtype}",
            fix=f"set kernels.params_dtype=bf16, or {off}",
        )
    if p.pipeline_model_parallel_size > 1 and p.virtual_pipeline_model_parallel_size is None:
        raise ConfigError(
            f"{what}: of pipelines, only the interleaved one runs a forward beside a backward pass, found "
            f"parallel.pipeline_model_parallel_size = {p.pipeline_model_parallel_size} without model chunks",
            fix=f"set parallel.virtual_pipeline_model_parallel_size=2 (or more), or {off}",
        )
    micro_batches = train.global_batch_size // (
        train.micro_batch_size * data_parallel_size(config, world_size=world_size)
    )
    if micro_batches == 1 and config.data.batch_unit == "rows":
        raise ConfigError(
            f"{what} has no effect on a step of one micro-batch (train.global_batch_size = {train.global_batch_size}, "
            f"train.micro_batch_size = {train.micro_batch_size}): there is no other to compute meanwhile",
            fix=f"use more micro-batches, or set {off}",
        )


def _overlapped_recomputation(config: RunConfig, world_size: int) -> None:
    kernels = config.kernels
    if not config.parallel.overlap_moe_expert_parallel_comm:
        return
    sparse_blocks = kernels.recompute_granularity == "selective" and "moe" in kernels.recompute_modules
    if kernels.recompute_granularity == "full" or sparse_blocks:
        raise ConfigError(
            "parallel.overlap_moe_expert_parallel_comm cuts sparse layers at their all-to-all, so that they cannot be "
            f"recomputed whole, found kernels.recompute_granularity = {kernels.recompute_granularity}"
            + (" with moe in kernels.recompute_modules" if sparse_blocks else ""),
            fix="recompute selectively and without moe (core_attn, mlp, layernorm, moe_act), or set "
            "parallel.overlap_moe_expert_parallel_comm=false",
        )


def _overlapped_tensor_parallelism(config: RunConfig, world_size: int) -> None:
    p, kernels, precision = config.parallel, config.kernels, config.precision
    if not p.tp_comm_overlap:
        return
    needs = {
        "kernels.transformer_impl=transformer_engine": (kernels.transformer_impl, "transformer_engine"),
        "kernels.params_dtype=bf16": (kernels.params_dtype, "bf16"),
        "parallel.sequence_parallel=true": (p.sequence_parallel, True),
    }
    for setting, (found, needed) in needs.items():
        if found != needed:
            raise ConfigError(
                "parallel.tp_comm_overlap runs the collectives of sequence parallelism in Transformer Engine's bf16 "
                f"layers, found {setting.partition('=')[0]} = {found}",
                fix=f"set {setting}, or parallel.tp_comm_overlap=false",
            )
    if precision.fp8 is None:
        return
    if precision.fp8_recipe == "blockwise":
        raise ConfigError(
            "parallel.tp_comm_overlap: Transformer Engine has no buffers for precision.fp8_recipe = blockwise",
            fix="choose another precision.fp8_recipe, or set parallel.tp_comm_overlap=false",
        )
    if precision.fp8_recipe == "mxfp8":
        shards = p.context_parallel_size * p.tensor_model_parallel_size
        divides(
            "data.seq_length x train.micro_batch_size",
            config.data.seq_length * config.train.micro_batch_size,
            by=f"parallel.context_parallel_size {p.context_parallel_size} x tensor_model_parallel_size "
            f"{p.tensor_model_parallel_size} x {_MXFP8_BUFFER_ROWS} (parallel.tp_comm_overlap with mxfp8)",
            divisor=shards * _MXFP8_BUFFER_ROWS,
            fix="choose a longer data.seq_length that is a multiple, or set parallel.tp_comm_overlap=false",
        )


OVERLAP_RULES: tuple[Rule, ...] = (_overlapped_experts, _overlapped_recomputation, _overlapped_tensor_parallelism)
