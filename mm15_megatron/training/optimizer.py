"""Data-parallel wrapping and megatron-core's optimizer with our parameter groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from mm15_megatron.accounting import resolved_learning_rate
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.models.global_parameters import module_of
from mm15_megatron.models.mm_model import MM15Model
from mm15_megatron.training.precision import chosen_adam, use_fused_kernel
from mm15_megatron.training.whole_parameters import build_adafactor


def wrap_chunks(cfg: RunConfig, chunks: Sequence[MM15Model]) -> list[DistributedDataParallel]:
    """Wrap model chunks so that gradients accumulate in contiguous buffers and reduce over data-parallel ranks."""
    parallel = cfg.parallel
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=parallel.grad_reduce_in_fp32,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        bucket_size=parallel.ddp_bucket_size,
        fp8_param_gather=cfg.precision.fp8_param_gather,
        check_for_nan_in_grad=False,  # a non-finite norm skips the step instead of ending the run
    )
    wrapped = [
        DistributedDataParallel(config=chunk.config, ddp_config=config, module=chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    if parallel.overlap_grad_reduce:
        # Reduce after the last micro-batch alone.
        no_sync = [chunk.no_sync for chunk in wrapped]
        for chunk in chunks:
            chunk.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def learning_rates(cfg: RunConfig) -> dict[str, float]:
    """Peak learning rate of each module (MM1: connector 8e-5 for every size, encoder as the LLM)."""
    base = resolved_learning_rate(cfg)
    optimizer = cfg.optimizer
    return {
        "language": base,
        "connector": base if optimizer.connector_lr is None else optimizer.connector_lr,
        "vision": base if optimizer.vision_lr is None else optimizer.vision_lr,
    }


def build_optimizer(cfg: RunConfig, chunks: Sequence[DistributedDataParallel]) -> ChainedOptimizer:
    """Build AdamW or AdaFactor over the wrapped chunks.

    Every parameter group carries its peak learning rate as ``max_lr`` and its decay multiplier as ``wd_mult``; the
    schedule scales the former.

    Raises:
        BackendError: if AdamW's kernel is not usable here.
    """
    rates = learning_rates(cfg)
    config = _mcore_config(cfg, rates)
    if cfg.optimizer.name == "adafactor":
        return build_adafactor(cfg, chunks, config, rates=rates)
    with chosen_adam(cfg.kernels):
        optimizer = get_megatron_optimizer(
            config, list(chunks), config_overrides=_overrides(cfg, rates), use_gloo_process_groups=False
        )
    for part in optimizer.chained_optimizers:
        use_fused_kernel(part.optimizer)
    return optimizer


def _mcore_config(cfg: RunConfig, rates: dict[str, float]) -> OptimizerConfig:
    settings, bf16 = cfg.optimizer, cfg.kernels.params_dtype == "bf16"
    return OptimizerConfig(
        optimizer="adam",
        decoupled_weight_decay=True,
        lr=rates["language"],
        min_lr=0.0,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=cfg.parallel.use_distributed_optimizer,
        overlap_param_gather=cfg.parallel.overlap_param_gather,
        fp8_recipe=cfg.precision.fp8_recipe if cfg.precision.fp8 else None,
    )


def _overrides(cfg: RunConfig, rates: dict[str, float]) -> dict[ParamKey, ParamGroupOverride]:
    """One override a module that has its own peak, and one for parameters that are not decayed."""
    overrides: dict[ParamKey, ParamGroupOverride] = {}
    for module in ("connector", "vision"):
        if rates[module] != rates["language"]:
            chosen = ParamWithNamePredicate(name=module, fn=lambda _, name, module=module: module_of(name) == module)
            overrides[ParamKey(with_name_predicate=chosen)] = ParamGroupOverride(max_lr=rates[module])
    if not cfg.optimizer.decay_norms_and_biases:
        vectors = ParamWithNamePredicate(name="vectors", fn=lambda parameter, _: parameter.dim() <= 1)
        overrides[ParamKey(with_name_predicate=vectors)] = ParamGroupOverride(wd_mult=0.0)
    return overrides
