"""Parameters of every part, and the learning rate that follows from them (symbols: see the package)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mm15_megatron.config.schema import ConnectorConfig, MoEConfig, RunConfig, VisionConfig
from mm15_megatron.errors import ConfigError


@dataclass(frozen=True)
class LanguageParameters:
    """Parameters of the decoder.

    Attributes:
        embedding: input embedding, padded vocabulary.
        output: output layer; 0 if tied to the embedding.
        layers: parameters of each decoder layer.
        active_layers: parameters of each decoder layer that one token uses.
        final_norm: the norm behind the last layer.
    """

    embedding: int
    output: int
    layers: tuple[int, ...]
    active_layers: tuple[int, ...]
    final_norm: int

    @property
    def non_embedding(self) -> int:
        """N of the learning-rate law: everything but the embedding and the output layer."""
        return sum(self.layers) + self.final_norm

    @property
    def active_non_embedding(self) -> int:
        """The part of ``non_embedding`` that one token uses."""
        return sum(self.active_layers) + self.final_norm

    @property
    def total(self) -> int:
        """Every parameter of the decoder."""
        return self.non_embedding + self.embedding + self.output


@dataclass(frozen=True)
class ModelParameters:
    """Parameters of the whole model."""

    language: LanguageParameters
    vision: int
    connector: int

    @property
    def total(self) -> int:
        """Every parameter."""
        return self.language.total + self.vision + self.connector

    @property
    def active(self) -> int:
        """Parameters that one token or patch uses."""
        language = self.language
        return language.active_non_embedding + language.embedding + language.output + self.vision + self.connector


def padded_vocab_size(cfg: RunConfig) -> int:
    """Return V: the vocabulary rounded up to a multiple of ``make_vocab_size_divisible_by``."""
    multiple = cfg.language.make_vocab_size_divisible_by
    return -(-cfg.language.vocab_size // multiple) * multiple


def sparse_layers(cfg: RunConfig) -> tuple[bool, ...]:
    """Return for each decoder layer whether it holds experts: the last layer of every group of ``moe_layer_period``."""
    period, sparse = cfg.moe.moe_layer_period, cfg.moe.num_moe_experts > 0
    return tuple(sparse and i % period == period - 1 for i in range(cfg.language.num_layers))


def attention_matrices(cfg: RunConfig) -> int:
    """Return the weights of the query, key, value and output projections of a decoder layer."""
    language = cfg.language
    q = language.num_attention_heads * language.kv_channels
    kv = language.num_query_groups * language.kv_channels
    return language.hidden_size * (2 * q + 2 * kv)


def feed_forward_matrices(cfg: RunConfig) -> int:
    """Return the weights of one dense feed-forward block, or of one expert."""
    branches = 3 if cfg.language.activation == "swiglu" else 2
    return branches * cfg.language.hidden_size * cfg.language.ffn_hidden_size


def layer_norms(cfg: RunConfig) -> int:
    """Return the weights of a decoder layer's norms."""
    return 2 * cfg.language.hidden_size + (2 * cfg.language.kv_channels if cfg.language.qk_layernorm else 0)


def router_matrix(cfg: RunConfig) -> int:
    """Return the weights of the router of a sparse layer."""
    return cfg.language.hidden_size * cfg.moe.num_moe_experts


def language_parameters(cfg: RunConfig) -> LanguageParameters:
    """Count the decoder: two RMSNorms a layer, no biases, one router a sparse layer."""
    shared = attention_matrices(cfg) + layer_norms(cfg)
    ffn, router, moe = feed_forward_matrices(cfg), router_matrix(cfg), cfg.moe
    sparse = sparse_layers(cfg)
    embedding = padded_vocab_size(cfg) * cfg.language.hidden_size
    return LanguageParameters(
        embedding=embedding,
        output=0 if cfg.language.share_embeddings_and_output_weights else embedding,
        layers=tuple(shared + (router + moe.num_moe_experts * ffn if s else ffn) for s in sparse),
        active_layers=tuple(shared + (router + moe.moe_router_topk * ffn if s else ffn) for s in sparse),
        final_norm=cfg.language.hidden_size,
    )


def built_vision_layers(vision: VisionConfig) -> int:
    """Return how many encoder blocks are built: those up to ``feature_layer``."""
    return vision.num_layers + vision.feature_layer + 1


def _vision_block_parameters(vision: VisionConfig) -> int:
    d, f = vision.hidden_size, vision.ffn_hidden_size
    biases = 3 * d + d + f + d if vision.add_bias_linear else 0
    return 2 * (2 * d) + 4 * d * d + 2 * d * f + biases


def vision_parameters(vision: VisionConfig) -> int:
    """Count the image encoder as built: patch convolution, class token, learned positions, ln_pre, blocks."""
    d = vision.hidden_size
    prefix = int(vision.class_token)
    patches = (3 * vision.patch_size**2 + vision.patch_bias) * d
    positions = (vision.stored_grid_size**2 + prefix) * d if vision.position_embedding == "learned" else 0
    norms = (2 if vision.post_layernorm else 1) * 2 * d
    return patches + prefix * d + positions + norms + built_vision_layers(vision) * _vision_block_parameters(vision)


def vision_tower_parameters(vision: VisionConfig, *, projection: int) -> int:
    """Count a whole CLIP image tower: every block, ln_post and the projection to ``projection`` dimensions."""
    whole = replace(vision, feature_layer=-1, post_layernorm=True)
    return vision_parameters(whole) + vision.hidden_size * projection


def connector_blocks(connector: ConnectorConfig, width: int) -> tuple[tuple[int, int], ...]:
    """Return (input channels, times) of the residual blocks before and after the pooling, as (in, count) pairs."""
    return ((width, 1), (connector.hidden_size, connector.depth - 1), (connector.hidden_size, connector.depth))


def _residual_block_parameters(channels_in: int, channels: int) -> int:
    squeezed = round(0.25 * channels_in)
    main = channels_in * channels + 9 * channels + channels * channels + 3 * (2 * channels)
    squeeze_excite = (channels * squeezed + squeezed) + (squeezed * channels + channels)
    shortcut = channels_in * channels + 2 * channels if channels_in != channels else 0
    return main + squeeze_excite + shortcut


def connector_parameters(cfg: RunConfig) -> int:
    """Count the connector: average pooling is one linear layer, attention pooling one attention and a linear layer."""
    connector, d, h = cfg.connector, cfg.vision.hidden_size, cfg.language.hidden_size
    if connector.kind == "average_pool":
        return d * h + h
    channels = connector.hidden_size
    positions = cfg.vision.stored_grid_size**2 * d if connector.position_embedding else 0
    if connector.kind == "attention_pool":
        norms, attention = 2 * channels + 2 * d, channels * (channels + 2 * d)
        return connector.num_tokens * channels + positions + norms + attention + (channels * h + h)
    blocks = sum(times * _residual_block_parameters(c, channels) for c, times in connector_blocks(connector, d))
    mlp = (channels * h + h) + (connector.mlp_depth - 1) * (h * h + h)
    return blocks + positions + mlp


def model_parameters(cfg: RunConfig) -> ModelParameters:
    """Count the whole model."""
    return ModelParameters(
        language=language_parameters(cfg), vision=vision_parameters(cfg.vision), connector=connector_parameters(cfg)
    )


def learning_rate_law(non_embedding: float) -> float:
    """Return MM1's peak learning rate for a decoder of that many non-embedding parameters."""
    if non_embedding <= 0:
        raise ConfigError(f"the learning-rate law has no value at N = {non_embedding}", fix="pass a positive count")
    return math.exp(-0.4214 * math.log(non_embedding) - 0.5535)


def resolved_learning_rate(cfg: RunConfig) -> float:
    """Return ``optimizer.lr``, or the law's value; a sparse model takes its dense backbone's (MM1: same settings)."""
    if cfg.optimizer.lr is not None:
        return cfg.optimizer.lr
    return learning_rate_law(language_parameters(replace(cfg, moe=MoEConfig())).non_embedding)
