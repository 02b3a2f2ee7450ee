"""From our configuration to megatron-core's TransformerConfig, for the decoder and for the encoder."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch.nn import functional as F

from mm15_megatron.accounting import pipeline_layer_split, sparse_layers
from mm15_megatron.config.schema import RunConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """``x * sigmoid(1.702 x)``, the activation of OpenAI's and DFN's CLIP weights."""
    return x * torch.sigmoid(1.702 * x)


def leave_uninitialised(weight: torch.Tensor) -> torch.Tensor:
    """Initialise nothing: ``initialise.py`` fills every parameter as a function of (seed, name)."""
    return weight


def clear(weight: torch.Tensor) -> torch.Tensor:
    """Fill with zeros: weights kept in FP8 are quantised when they are built, and delayed scaling notes their amax."""
    return weight.zero_()


def _shared(cfg: RunConfig) -> dict[str, Any]:
    """Settings that the decoder and the encoder share."""
    dtype = DTYPES[cfg.kernels.params_dtype]
    initialise = clear if cfg.precision.fp8_param_gather else leave_uninitialised
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method": initialise,
        "output_layer_init_method": initialise,
        # Loss normalisation is ours: sums and counts are reduced over the whole global batch.
        "calculate_per_token_loss": True,
        # Transformer Engine's layers are told by the backend; this setting is for megatron-core's own, through apex.
        "gradient_accumulation_fusion": (
            cfg.kernels.gradient_accumulation_fusion and cfg.kernels.transformer_impl == "local"
        ),
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": cfg.kernels.compile_fusions,
        "use_cpu_initialization": False,
        # gloo reads a tensor after the call that sends it; on CUDA the copy is queued before the memory is given back.
        "deallocate_pipeline_outputs": cfg.parallel.device == "cuda",
    }


def _fp8(cfg: RunConfig) -> dict[str, Any]:
    """Settings of FP8 layers; everything outside a transformer block (connector, embedding, output) has none."""
    precision = cfg.precision
    if precision.fp8 is None:
        return {}
    return {
        "fp8": precision.fp8,
        "fp8_recipe": precision.fp8_recipe,
        "fp8_param": precision.fp8_param_gather,
        "fp8_margin": precision.fp8_margin,
        "fp8_amax_history_len": precision.fp8_amax_history_len,
        "fp8_amax_compute_algo": precision.fp8_amax_compute_algo,
    }


def _fp8_decoder(cfg: RunConfig) -> dict[str, Any]:
    precision = cfg.precision
    if precision.fp8 is None:
        return {}
    return {
        **_fp8(cfg),
        "first_last_layers_bf16": precision.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": precision.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": precision.num_layers_at_end_in_bf16,
        "moe_router_padding_for_quantization": precision.moe_router_padding_for_quantization,
    }


def _experts(cfg: RunConfig) -> dict[str, Any]:
    """Settings of the sparse layers; routing, losses, capacity and padding are ours (``router.py``)."""
    moe, parallel = cfg.moe, cfg.parallel
    if not moe.num_moe_experts:
        return {}
    return {
        "num_moe_experts": moe.num_moe_experts,
        "moe_layer_freq": [int(sparse) for sparse in sparse_layers(cfg)],
        "moe_ffn_hidden_size": cfg.language.ffn_hidden_size,
        "moe_router_topk": moe.moe_router_topk,
        "moe_router_pre_softmax": moe.moe_router_topk == 1,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_permute_fusion": cfg.kernels.moe_permute_fusion,
        "moe_grouped_gemm": cfg.kernels.transformer_impl == "transformer_engine",
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
        "overlap_moe_expert_parallel_comm": parallel.overlap_moe_expert_parallel_comm,
    }


def _pipeline(cfg: RunConfig) -> dict[str, Any]:
    """Settings of the pipeline: the layers of each (virtual) stage, named one by one."""
    if cfg.parallel.pipeline_model_parallel_size == 1:
        return {}
    split, interleaved = pipeline_layer_split(cfg), cfg.parallel.virtual_pipeline_model_parallel_size is not None
    layout = [["decoder"] * layers for layers in split]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return {
        "pipeline_model_parallel_size": cfg.parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": cfg.parallel.virtual_pipeline_model_parallel_size,
        "pipeline_model_parallel_layout": layout,
        # With two interleaved stages a batch of transfers holds several between the same two ranks, and they are
        # matched in the wrong order; one by one, over two groups, they are not.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
    }


def language_transformer_config(cfg: RunConfig) -> TransformerConfig:
    """Return megatron-core's configuration of the decoder."""
    language, parallel, kernels = cfg.language, cfg.parallel, cfg.kernels
    full = kernels.recompute_granularity == "full"
    return TransformerConfig(
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.num_query_groups,
        kv_channels=language.kv_channels,
        ffn_hidden_size=language.ffn_hidden_size,
        gated_linear_unit=language.activation == "swiglu",
        activation_func=F.silu if language.activation == "swiglu" else F.gelu,
        bias_activation_fusion=kernels.compile_fusions and language.activation == "swiglu",
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=language.norm_epsilon,
        qk_layernorm=language.qk_layernorm,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        tp_comm_overlap=parallel.tp_comm_overlap,
        recompute_granularity=kernels.recompute_granularity,
        recompute_modules=list(kernels.recompute_modules),
        recompute_method="uniform" if full else None,
        recompute_num_layers=kernels.recompute_num_layers if full else None,
        cuda_graph_impl="transformer_engine" if kernels.cuda_graph_scope else "none",
        cuda_graph_scope=list(kernels.cuda_graph_scope),
        cuda_graph_warmup_steps=kernels.cuda_graph_warmup_steps,
        **_experts(cfg),
        **_fp8_decoder(cfg),
        **_pipeline(cfg),
        **_shared(cfg),
    )


def vision_layers_built(cfg: RunConfig) -> int:
    """Encoder blocks that are built: those after ``vision.feature_layer`` would never be used."""
    return cfg.vision.num_layers + 1 + cfg.vision.feature_layer


def vision_transformer_config(cfg: RunConfig) -> TransformerConfig:
    """Return megatron-core's configuration of the encoder.

    The encoder is never pipelined and never sequence-parallel: it lives whole on stage 0, and a tile's token count is
    odd.
    """
    vision, parallel = cfg.vision, cfg.parallel
    tensor = parallel.tensor_model_parallel_size if parallel.encoder_parallel == "tensor" else 1
    recompute = cfg.kernels.recompute_vision
    return TransformerConfig(
        num_layers=vision_layers_built(cfg),
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_attention_heads,
        ffn_hidden_size=vision.ffn_hidden_size,
        activation_func=quick_gelu if vision.activation == "quick_gelu" else F.gelu,
        bias_activation_fusion=False,
        add_bias_linear=vision.add_bias_linear,
        normalization="LayerNorm",
        layernorm_epsilon=vision.norm_epsilon,
        tensor_model_parallel_size=tensor,
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
        **(_fp8(cfg) if cfg.precision.fp8_vision else {}),
        **_shared(cfg),
    )
