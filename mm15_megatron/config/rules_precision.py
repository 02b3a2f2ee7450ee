"""Rules of FP8: what Transformer Engine and megatron-core ask of a recipe, checked before a process group exists.

The sizes are those of Transformer Engine 2.11: a quantised matrix has a multiple of 16 in both dimensions, of 32 with
mxfp8, and under sequence parallelism blockwise scaling gathers whole blocks of 128 rows and
128 columns.
"""

from __future__ import annotations

from mm15_megatron.config.rule import Rule, divides
from mm15_megatron.config.rules_experts import expert_tensor_size
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import ConfigError

_BLOCK = 128


def fp8_alignment(recipe: str) -> int:
    """Return what the dimensions of a quantised matrix are multiples of."""
    return 32 if recipe == "mxfp8" else 16


def _fp8_needs(config: RunConfig, world_size: int) -> None:
    if config.precision.fp8 is None:
        return
    what = f"precision.fp8 = {config.precision.fp8}"
    if config.parallel.device != "cuda" or config.kernels.transformer_impl != "transformer_engine":
        raise ConfigError(
            f"{what} needs Transformer Engine on a GPU, found parallel.device = {config.parallel.device} and "
            f"kernels.transformer_impl = {config.kernels.transformer_impl}",
            fix="set kernels.transformer_impl=transformer_engine and parallel.device=cuda, or precision.fp8=null",
        )
    if config.kernels.params_dtype != "bf16":
        raise ConfigError(
            f"{what} quantises bf16 layers, and kernels.params_dtype = {config.kernels.params_dtype}",
            fix="set kernels.params_dtype=bf16",
        )


def _fp8_first_and_last_layers(config: RunConfig, world_size: int) -> None:
    precision, layers = config.precision, config.language.num_layers
    if precision.fp8 is None or not precision.first_last_layers_bf16:
        return
    if precision.fp8_recipe == "delayed":
        raise ConfigError(
            "precision.first_last_layers_bf16 with fp8_recipe = delayed: its amax reduction covers all layers at once",
            fix="use another precision.fp8_recipe, or set precision.first_last_layers_bf16=false",
        )
    start, end = precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16
    if start + end == 0:
        raise ConfigError(
            f"precision.first_last_layers_bf16 with num_layers_at_start_in_bf16 = {start} and "
            f"num_layers_at_end_in_bf16 = {end} keeps no layer in bf16",
            fix="keep at least one at either end, or set precision.first_last_layers_bf16=false",
        )
    most = layers // config.parallel.pipeline_model_parallel_size
    if max(start, end) > most or start + end > layers:
        raise ConfigError(
            f"precision.num_layers_at_start_in_bf16 = {start} and num_layers_at_end_in_bf16 = {end} of {layers} layers "
            f"on {config.parallel.pipeline_model_parallel_size} pipeline stages",
            fix=f"keep each at most {most} (the layers of a stage) and both together at most {layers}",
        )


def _fp8_parameter_gather(config: RunConfig, world_size: int) -> None:
    precision = config.precision
    if not precision.fp8_param_gather:
        return
    if precision.fp8 is None:
        raise ConfigError(
            "precision.fp8_param_gather needs layers that compute in FP8, and precision.fp8 is null",
            fix="set precision.fp8=hybrid, or precision.fp8_param_gather=false",
        )
    if precision.fp8_recipe == "mxfp8":
        raise ConfigError(
            "precision.fp8_param_gather with precision.fp8_recipe = mxfp8: megatron-core passes these weights through "
            "the gradient buffer, which is cleared between two steps",
            fix="set precision.fp8_param_gather=false, or choose another precision.fp8_recipe",
        )
    if not config.parallel.use_distributed_optimizer or config.optimizer.name != "adamw":
        raise ConfigError(
            "precision.fp8_param_gather needs fp32 masters that the distributed optimizer keeps, found "
            f"parallel.use_distributed_optimizer = {config.parallel.use_distributed_optimizer} and optimizer.name = "
            f"{config.optimizer.name}",
            fix="set parallel.use_distributed_optimizer=true and optimizer.name=adamw, or "
            "precision.fp8_param_gather=false",
        )


def _fp8_experts(config: RunConfig, world_size: int) -> None:
    if not config.precision.moe_router_padding_for_quantization:
        return
    if config.precision.fp8 is None or not config.moe.num_moe_experts:
        raise ConfigError(
            "precision.moe_router_padding_for_quantization fills the FP8 blocks of experts, found precision.fp8 = "
            f"{config.precision.fp8} and moe.num_moe_experts = {config.moe.num_moe_experts}",
            fix="set precision.moe_router_padding_for_quantization=false",
        )


def _fp8_recomputation(config: RunConfig, world_size: int) -> None:
    kernels, precision = config.kernels, config.precision
    if precision.fp8 is None or precision.fp8_recipe != "delayed" or kernels.recompute_granularity != "selective":
        return
    refused = [name for name in ("layernorm", "moe_act") if name in kernels.recompute_modules]
    if refused:
        raise ConfigError(
            f"kernels.recompute_modules holds {', '.join(refused)}, and precision.fp8_recipe = delayed would count the "
            "amax of a recomputed tensor twice",
            fix="recompute core_attn, mlp or moe, or use another precision.fp8_recipe",
        )


def _fp8_tokens(config: RunConfig, world_size: int) -> None:
    """The tokens of a rank are rows of a quantised matrix; rows have one length, so packing always meets this."""
    precision, p = config.precision, config.parallel
    if precision.fp8 is None:
        return
    shards, size = p.context_parallel_size, fp8_alignment(precision.fp8_recipe)
    by = f"parallel.context_parallel_size {p.context_parallel_size}"
    if p.sequence_parallel:
        shards *= p.tensor_model_parallel_size
        by += f" x tensor_model_parallel_size {p.tensor_model_parallel_size}"
        size = _BLOCK if precision.fp8_recipe == "blockwise" else size
    tokens = config.data.seq_length * config.train.micro_batch_size
    divides(
        "data.seq_length x train.micro_batch_size",
        tokens,
        by=f"{by} x {size} (precision.fp8_recipe = {precision.fp8_recipe})",
        divisor=shards * size,
        fix="choose a longer data.seq_length that is a multiple, or fewer ranks along the sequence",
    )


def _fp8_widths(config: RunConfig, world_size: int) -> None:
    """Each linear layer of a rank in FP8 has quantisable sides."""
    precision, p, language, vision = config.precision, config.parallel, config.language, config.vision
    if precision.fp8 is None:
        return
    tp, size = p.tensor_model_parallel_size, fp8_alignment(precision.fp8_recipe)
    query = language.num_attention_heads * language.kv_channels
    key_value = language.num_query_groups * language.kv_channels
    if precision.fp8_recipe == "blockwise" and p.sequence_parallel:
        divides(
            "language.hidden_size",
            language.hidden_size,
            by=f"{_BLOCK}, the blocks that precision.fp8_recipe = blockwise gathers under sequence parallelism",
            divisor=_BLOCK,
            fix="change the width, set parallel.sequence_parallel=false, or choose another precision.fp8_recipe",
        )
    sides = {
        "language.hidden_size": (language.hidden_size, 1),
        "language.num_attention_heads x kv_channels": (query, tp),
        "the fused query, key and value projection": (query + 2 * key_value, tp),
        "language.ffn_hidden_size": (language.ffn_hidden_size, tp),
    }
    if config.moe.num_moe_experts:
        sides["language.ffn_hidden_size of an expert"] = (language.ffn_hidden_size, expert_tensor_size(config))
    if precision.fp8_vision:
        split = tp if p.encoder_parallel == "tensor" else 1
        sides["vision.hidden_size"] = (vision.hidden_size, split)
        sides["vision.ffn_hidden_size"] = (vision.ffn_hidden_size, split)
    for what, (width, split) in sides.items():
        divides(
            what,
            width,
            by=f"{split} ranks x {size} (precision.fp8_recipe = {precision.fp8_recipe})",
            divisor=split * size,
            fix="change the width or the split, or set precision.fp8=null (precision.fp8_vision=false for the encoder)",
        )


PRECISION_RULES: tuple[Rule, ...] = (
    _fp8_needs,
    _fp8_first_and_last_layers,
    _fp8_parameter_gather,
    _fp8_experts,
    _fp8_recomputation,
    _fp8_tokens,
    _fp8_widths,
)
