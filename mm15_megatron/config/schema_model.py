"""Options of the model: decoder, experts, encoder, connector, and what of it trains."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mm15_megatron.config.fields import option


@dataclass(frozen=True)
class LanguageConfig:
    """The decoder LLM: pre-norm, no biases, RoPE (MM1: unpublished; dimensions as argued from AXLearn's configs)."""

    num_layers: int = option(24, "decoder layers")
    hidden_size: int = option(2048, "width of the residual stream")
    num_attention_heads: int = option(32, "query heads")
    num_query_groups: int = option(32, "key/value heads; equal to num_attention_heads = multi-head attention")
    kv_channels: int = option(64, "dimension of a head")
    ffn_hidden_size: int = option(5632, "inner width of the feed-forward block (one branch of SwiGLU)")
    vocab_size: int = option(49152, "token ids the model knows, before padding")
    make_vocab_size_divisible_by: int = option(
        128, "the embedding is padded to a multiple of this, whatever the layout"
    )
    activation: str = option("swiglu", "feed-forward activation", choices=("swiglu", "gelu"))
    norm_epsilon: float = option(1e-5, "RMSNorm epsilon")
    rotary_base: float = option(10000.0, "RoPE theta")
    qk_layernorm: bool = option(False, "RMSNorm on queries and keys, per head")
    share_embeddings_and_output_weights: bool = option(True, "tie the input embedding and the output layer")
    z_loss_coeff: float = option(0.0, "LM-head z-loss weight (MM1: 1e-4 for the 30B model alone)")
    init_method_std: float = option(0.02, "standard deviation of the initial weights (unpublished: our default)")


@dataclass(frozen=True)
class MoEConfig:
    """Sparse decoder layers (MM1 section 4); num_moe_experts = 0 is a dense model."""

    num_moe_experts: int = option(0, "experts of a sparse layer; 0 = dense model", flag="num-experts")
    moe_layer_period: int = option(2, "one sparse layer in this many; the LAST layer of each group is sparse")
    moe_router_topk: int = option(2, "experts a token visits (MM1: top-2)")
    moe_aux_loss_coeff: float = option(0.01, "load-balance loss weight (MM1: 0.01)")
    moe_z_loss_coeff: float = option(0.001, "router z-loss weight (MM1: 0.001)")
    moe_router_load_balancing_type: str = option(
        "seq_aux_loss",
        "what the balance loss of a row counts: seq_aux_loss = all choices of a token, gshard_top1 = its first one",
        choices=("seq_aux_loss", "gshard_top1"),
    )
    moe_expert_capacity_factor: float | None = option(
        None,
        "capacity factor in training, in megatron-core's convention (AXLearn's 2.0 is 1.0 here); None = dropless, as "
        "evaluation always is",
    )
    moe_capacity_group_size: int = option(
        256, "tokens that share the experts' capacity (a GShard group); divides the tokens of every rank"
    )
    moe_token_drop_policy: str = option(
        "position",
        "who stays when an expert is full: position = first choices before second ones, in token order (GShard); "
        "probs = the largest gates",
        choices=("position", "probs"),
    )


@dataclass(frozen=True)
class VisionConfig:
    """The ViT image encoder (CLIP ViT-L/14 and ViT-H/14; AIM with the options of its release)."""

    num_layers: int = option(32, "encoder blocks")
    hidden_size: int = option(1280, "width of the encoder")
    num_attention_heads: int = option(16, "heads; the head dimension is hidden_size / heads")
    ffn_hidden_size: int = option(5120, "inner width of the MLP")
    patch_size: int = option(14, "side of a patch, pixels")
    image_size: int = option(378, "side of a tile, pixels; a multiple of patch_size")
    position_embedding: str = option(
        "learned",
        "positions of patches: learned = a stored table (CLIP); sincos = fixed 2-D sines and cosines (AIM)",
        choices=("learned", "sincos"),
    )
    position_grid_size: int = option(
        0,
        "grid side of the stored position embedding; 0 = image_size / patch_size; another value is interpolated",
    )
    pre_layernorm: str = option(
        "tokens",
        "the LayerNorm before the blocks: tokens = after class token and positions (CLIP); patches = before them (AIM)",
        choices=("tokens", "patches"),
    )
    patch_bias: bool = option(False, "a bias on the patch embedding (CLIP: no; AIM: yes)")
    add_bias_linear: bool = option(True, "biases in the linear layers of the blocks (CLIP: yes; AIM: no)")
    activation: str = option("quick_gelu", "MLP activation", choices=("gelu", "quick_gelu"))
    class_token: bool = option(True, "a learned class token at index 0, dropped from the features")
    norm_epsilon: float = option(1e-5, "LayerNorm epsilon")
    feature_layer: int = option(
        -1,
        "block whose output is the feature: -1 = last, -2 = the one before; later ones are not built (unpublished)",
    )
    post_layernorm: bool = option(False, "apply ln_post to the features (Honeybee: no; MM1: unpublished)")
    image_mean: tuple[float, float, float] = option(
        (0.48145466, 0.4578275, 0.40821073), "per-channel mean, 0..1 (CLIP)"
    )
    image_std: tuple[float, float, float] = option((0.26862954, 0.26130258, 0.27577711), "per-channel deviation (CLIP)")

    @property
    def grid_size(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def stored_grid_size(self) -> int:
        """Grid side of the position-embedding table."""
        return self.position_grid_size or self.grid_size


@dataclass(frozen=True)
class ConnectorConfig:
    """What turns patch features into language tokens (MM1 section 3.2; sizes are Honeybee's released ones)."""

    kind: str = option("c_abstractor", "connector", choices=("c_abstractor", "average_pool", "attention_pool"))
    num_tokens: int = option(
        144, "language tokens a tile becomes; a perfect square (64, 81 or 144) unless attention pools"
    )
    hidden_size: int = option(1024, "width of the C-Abstractor's convolutions, or of attention pooling")
    depth: int = option(3, "residual blocks before and after the pooling")
    mlp_depth: int = option(2, "linear layers of the output MLP")
    num_attention_heads: int = option(16, "heads of attention pooling; they divide hidden_size (unpublished)")
    position_embedding: bool = option(True, "learned position embedding on the input grid")
    norm_epsilon: float = option(1e-5, "LayerNorm epsilon")

    @property
    def pools_grid(self) -> bool:
        """Whether the tokens are a square grid: all kinds but attention pooling, whose queries have no order."""
        return self.kind != "attention_pool"

    @property
    def output_grid_size(self) -> int:
        """Side of the pooled grid."""
        return round(math.sqrt(self.num_tokens))


@dataclass(frozen=True)
class FreezeConfig:
    """Modules that are not trained (MM1 and MM1.5 train everything in every stage)."""

    vision: bool = option(False, "freeze the image encoder")
    connector: bool = option(False, "freeze the connector")
    language: bool = option(False, "freeze the decoder, embeddings and output layer")
