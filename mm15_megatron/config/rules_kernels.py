"""Rules of the kernels: which library computes what, and what is recomputed."""

from __future__ import annotations

from mm15_megatron.config.rule import Rule
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import ConfigError

RECOMPUTED = ("core_attn", "layernorm", "mlp", "moe", "moe_act")
"""What selective recomputation knows (megatron-core's names)."""

CAPTURED = ("mlp",)
"""What CUDA graphs may hold (megatron-core's names)."""


def _needs_cuda(config: RunConfig, world_size: int) -> None:
    kernels = config.kernels
    if config.parallel.device == "cuda":
        return
    for name, value, on_cpu in (
        ("transformer_impl", kernels.transformer_impl, kernels.transformer_impl == "local"),
        ("norm_impl", kernels.norm_impl, kernels.norm_impl == "backend"),
        ("optimizer_impl", kernels.optimizer_impl, kernels.optimizer_impl in (None, "torch")),
        ("gradient_accumulation_fusion", kernels.gradient_accumulation_fusion, False),
    ):
        if value and not on_cpu:
            raise ConfigError(
                f"kernels.{name} = {value} has no kernel for parallel.device = {config.parallel.device!r}",
                fix=f"leave kernels.{name} at its default, or set parallel.device=cuda",
            )


def _needs_transformer_engine(config: RunConfig, world_size: int) -> None:
    kernels = config.kernels
    if kernels.moe_permute_fusion and kernels.transformer_impl != "transformer_engine":
        raise ConfigError(
            "kernels.moe_permute_fusion = True needs Transformer Engine's kernel, and "
            f"kernels.transformer_impl = {kernels.transformer_impl}",
            fix="set kernels.transformer_impl=transformer_engine, or kernels.moe_permute_fusion=false",
        )
    if kernels.norm_impl == "apex" and kernels.transformer_impl == "transformer_engine":
        raise ConfigError(
            "kernels.norm_impl = apex, but Transformer Engine layers hold norms of their own",
            fix="set kernels.norm_impl=backend, or kernels.transformer_impl=local",
        )


def _recomputation(config: RunConfig, world_size: int) -> None:
    kernels = config.kernels
    unknown = [name for name in kernels.recompute_modules if name not in RECOMPUTED]
    if unknown or (kernels.recompute_granularity == "selective" and not kernels.recompute_modules):
        raise ConfigError(
            f"kernels.recompute_modules = {list(kernels.recompute_modules)} names "
            + (f"unknown modules {unknown}" if unknown else "nothing to recompute"),
            fix="choose from " + ", ".join(RECOMPUTED),
        )
    if kernels.recompute_granularity != "selective":
        return
    fused = [name for name in ("layernorm", "moe_act") if name in kernels.recompute_modules]
    if fused and kernels.transformer_impl != "transformer_engine":
        raise ConfigError(
            f"kernels.recompute_modules holds {', '.join(fused)}, which megatron-core recomputes with Transformer "
            "Engine's layers alone",
            fix="recompute mlp or moe instead, or set kernels.transformer_impl=transformer_engine",
        )
    sparse = [name for name in kernels.recompute_modules if name in ("moe", "moe_act", "layernorm")]
    if sparse and not config.moe.num_moe_experts:
        raise ConfigError(
            f"kernels.recompute_modules holds {', '.join(sparse)}, but the model has no experts"
            + (", and other norms are part of the linear layer behind them" if "layernorm" in sparse else ""),
            fix="recompute mlp instead",
        )
    if {"moe", "moe_act"} <= set(kernels.recompute_modules):
        raise ConfigError(
            "kernels.recompute_modules holds moe and moe_act: the second is part of the first",
            fix="keep one of them",
        )


def _cuda_graphs(config: RunConfig, world_size: int) -> None:
    kernels, p = config.kernels, config.parallel
    scope = kernels.cuda_graph_scope
    if not scope:
        return
    what, off = f"kernels.cuda_graph_scope = {list(scope)}", "kernels.cuda_graph_scope=[]"
    if unknown := [name for name in scope if name not in CAPTURED]:
        raise ConfigError(
            f"{what} names {unknown}, which have no static shapes", fix="choose from " + ", ".join(CAPTURED)
        )
    for name, found, needed in (
        ("kernels.transformer_impl", kernels.transformer_impl, "transformer_engine"),
        ("kernels.params_dtype", kernels.params_dtype, "bf16"),
        ("parallel.overlap_moe_expert_parallel_comm", p.overlap_moe_expert_parallel_comm, False),
        ("freeze.language", config.freeze.language, False),
    ):
        if found != needed:
            needed_text = str(needed).lower() if isinstance(needed, bool) else needed
            raise ConfigError(
                f"{what} captures trained bf16 layers of Transformer Engine one by one, found {name} = {found}",
                fix=f"set {name}={needed_text}, or {off}",
            )
    recomputed = kernels.recompute_granularity == "selective" and "mlp" in kernels.recompute_modules
    if recomputed or kernels.recompute_granularity == "full":
        raise ConfigError(
            f"{what}: what a graph holds cannot be recomputed, found kernels.recompute_granularity = "
            f"{kernels.recompute_granularity}" + (" with mlp in kernels.recompute_modules" if recomputed else ""),
            fix=f"recompute selectively and without mlp, or set {off}",
        )
    if config.moe.num_moe_experts and config.moe.moe_layer_period == 1:
        raise ConfigError(
            f"{what}: every layer is sparse (moe.moe_layer_period = 1), and a sparse block has no static shapes",
            fix=f"set {off}",
        )
    if p.pipeline_model_parallel_size > 1 and config.train.rampup_batch_size is not None:
        raise ConfigError(
            f"{what}: a pipeline's graphs are captured for one number of micro-batches, and train.rampup_batch_size = "
            f"{config.train.rampup_batch_size} changes it",
            fix=f"set train.rampup_batch_size=null, or {off}",
        )


KERNEL_RULES: tuple[Rule, ...] = (_needs_cuda, _needs_transformer_engine, _recomputation, _cuda_graphs)
