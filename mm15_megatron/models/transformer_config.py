"""From our configuration to megatron-core's TransformerConfig, for the decoder and for the encoder."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch.nn import functional as F

from mm15_megatron.accounting import pipeline_layer_split
from mm15_megatron.config.schema import RunConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """``x * sigmoid(1.702 x)``, the activation of OpenAI's and DFN's CLIP weights."""
    return x * torch.sigmoid(1.702 * x)


def leave_uninitialised(weight: torch.Tensor) -> torch.Tensor:
    """Initialise nothing: ``initialise.py`` fills every parameter as a function of (seed, name)."""
    return weight


def _shared(cfg: RunConfig) -> dict[str, Any]:
    """Settings that the decoder and the encoder share."""
    dtype = DTYPES[cfg.kernels.params_dtype]
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method": leave_uninitialised,
        "output_layer_init_method": leave_uninitialised,
        # Loss normalisation is ours: sums and counts are reduced over the whole global batch (numerics section 1).
        "calculate_per_token_loss": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": cfg.kernels.compile_fusions,
        "use_cpu_initialization": False,
        "deallocate_pipeline_outputs": True,
    }


def language_transformer_config(cfg: RunConfig) -> TransformerConfig:
    """Return megatron-core's configuration of the decoder."""
    language, parallel, kernels = cfg.language, cfg.parallel, cfg.kernels
    stages = parallel.pipeline_model_parallel_size
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
        pipeline_model_parallel_size=stages,
        sequence_parallel=parallel.sequence_parallel,
        num_layers_in_first_pipeline_stage=pipeline_layer_split(cfg)[0] if stages > 1 else None,
        recompute_granularity=kernels.recompute_granularity,
        recompute_method="uniform" if full else None,
        recompute_num_layers=kernels.recompute_num_layers if full else None,
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
        add_bias_linear=True,
        normalization="LayerNorm",
        layernorm_epsilon=vision.norm_epsilon,
        tensor_model_parallel_size=tensor,
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
        **_shared(cfg),
    )
