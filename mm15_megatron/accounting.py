"""Parameters, FLOPs, memory and cost of a configuration, computed without torch.

Symbols: h, width of the decoder; q and kv, summed widths of its query and key/value heads; f, inner width of a
feed-forward block; V, padded vocabulary; s, tokens of a row; d, width of the encoder; n, patches of a tile; C, channels
of the connector.

Model FLOPs follow Megatron's convention: a multiply-add is 2, causal attention is halved and sees the whole row, the
backward pass is twice the forward pass, and recomputation does not count. What a frozen module need not compute is left
out, and so is the class token (one of 730 tokens).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from mm15_megatron.config.schema import ConnectorConfig, MoEConfig, RunConfig, VisionConfig
from mm15_megatron.config.validate import data_parallel_size, feasible_first_stages, tiles_of_split_image
from mm15_megatron.errors import ConfigError

_DEVICE_PEAKS: tuple[tuple[str, float], ...] = (
    (r"\bB200\b", 2250.0),
    (r"\bH200\b", 989.4),
    (r"\bH100 PCIe\b", 756.0),
    (r"\bH100 NVL\b", 835.0),
    (r"\bH100\b", 989.4),
    (r"\bA100\b", 312.0),
)


def device_peak_tflops(name: str) -> float | None:
    """Return the vendor's dense bf16 peak of the device called ``name`` in TFLOP/s, or None if it is not known."""
    return next((peak for pattern, peak in _DEVICE_PEAKS if re.search(pattern, name)), None)


# --- parameters ------------------------------------------------------------------------------------------------------


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


def _attention_matrices(cfg: RunConfig) -> int:
    language = cfg.language
    q = language.num_attention_heads * language.kv_channels
    kv = language.num_query_groups * language.kv_channels
    return language.hidden_size * (2 * q + 2 * kv)


def _feed_forward_matrices(cfg: RunConfig) -> int:
    branches = 3 if cfg.language.activation == "swiglu" else 2
    return branches * cfg.language.hidden_size * cfg.language.ffn_hidden_size


def _layer_norms(cfg: RunConfig) -> int:
    return 2 * cfg.language.hidden_size + (2 * cfg.language.kv_channels if cfg.language.qk_layernorm else 0)


def _router(cfg: RunConfig) -> int:
    return cfg.language.hidden_size * cfg.moe.num_moe_experts


def language_parameters(cfg: RunConfig) -> LanguageParameters:
    """Count the decoder: two RMSNorms a layer, no biases, one router a sparse layer."""
    shared = _attention_matrices(cfg) + _layer_norms(cfg)
    ffn, router, moe = _feed_forward_matrices(cfg), _router(cfg), cfg.moe
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
    return 2 * (2 * d) + (3 * d * d + 3 * d) + (d * d + d) + (d * f + f) + (f * d + d)


def vision_parameters(vision: VisionConfig) -> int:
    """Count the image encoder as built: patch convolution without bias, class token, positions, ln_pre, blocks."""
    d = vision.hidden_size
    prefix = int(vision.class_token)
    patches = 3 * vision.patch_size**2 * d
    positions = (vision.stored_grid_size**2 + prefix) * d
    norms = (2 if vision.post_layernorm else 1) * 2 * d
    return patches + prefix * d + positions + norms + built_vision_layers(vision) * _vision_block_parameters(vision)


def vision_tower_parameters(vision: VisionConfig, *, projection: int) -> int:
    """Count a whole CLIP image tower: every block, ln_post and the projection to ``projection`` dimensions."""
    whole = replace(vision, feature_layer=-1, post_layernorm=True)
    return vision_parameters(whole) + vision.hidden_size * projection


def _connector_blocks(connector: ConnectorConfig, width: int) -> tuple[tuple[int, int], ...]:
    """Return (input channels, times) of the residual blocks before and after the pooling, as (in, count) pairs."""
    return ((width, 1), (connector.hidden_size, connector.depth - 1), (connector.hidden_size, connector.depth))


def _residual_block_parameters(channels_in: int, channels: int) -> int:
    squeezed = round(0.25 * channels_in)
    main = channels_in * channels + 9 * channels + channels * channels + 3 * (2 * channels)
    squeeze_excite = (channels * squeezed + squeezed) + (squeezed * channels + channels)
    shortcut = channels_in * channels + 2 * channels if channels_in != channels else 0
    return main + squeeze_excite + shortcut


def connector_parameters(cfg: RunConfig) -> int:
    """Count the connector (C-Abstractor: MM1 section 3.2 with Honeybee's blocks; average pooling: one linear layer)."""
    connector, d, h = cfg.connector, cfg.vision.hidden_size, cfg.language.hidden_size
    if connector.kind == "average_pool":
        return d * h + h
    channels = connector.hidden_size
    blocks = sum(times * _residual_block_parameters(c, channels) for c, times in _connector_blocks(connector, d))
    positions = cfg.vision.stored_grid_size**2 * d if connector.position_embedding else 0
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


# --- FLOPs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of a forward pass: products with weights, and products of activations (attention)."""

    weights: float
    attention: float = 0.0

    def __add__(self, other: ForwardFlops) -> ForwardFlops:
        return ForwardFlops(self.weights + other.weights, self.attention + other.attention)

    def times(self, factor: float) -> ForwardFlops:
        """Return the FLOPs of ``factor`` such passes."""
        return ForwardFlops(self.weights * factor, self.attention * factor)

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.attention

    def trained(self, *, weight_gradients: bool, input_gradients: bool) -> float:
        """Return forward plus backward: one more for gradients of inputs, one more for gradients of weights."""
        backward = self.weights * (weight_gradients + input_gradients) + self.attention * 2 * input_gradients
        return self.total + backward


@dataclass(frozen=True)
class StepFlops:
    """Model FLOPs of forward and backward passes, by module."""

    language: float
    vision: float
    connector: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.language + self.vision + self.connector


def layer_forward_flops(cfg: RunConfig, *, sparse: bool) -> ForwardFlops:
    """Return the FLOPs of one decoder layer for one row."""
    s, ffn = cfg.data.seq_length, _feed_forward_matrices(cfg)
    used = cfg.moe.moe_router_topk * ffn + _router(cfg) if sparse else ffn
    q = cfg.language.num_attention_heads * cfg.language.kv_channels
    return ForwardFlops(weights=2.0 * s * (_attention_matrices(cfg) + used), attention=2.0 * s * s * q)


def output_forward_flops(cfg: RunConfig) -> ForwardFlops:
    """Return the FLOPs of the output layer for one row."""
    return ForwardFlops(weights=2.0 * cfg.data.seq_length * cfg.language.hidden_size * padded_vocab_size(cfg))


def vision_forward_flops(vision: VisionConfig) -> ForwardFlops:
    """Return the FLOPs of the encoder for one tile."""
    n, d, layers = vision.grid_size**2, vision.hidden_size, built_vision_layers(vision)
    matrices = layers * (4 * d * d + 2 * d * vision.ffn_hidden_size) + 3 * vision.patch_size**2 * d
    return ForwardFlops(weights=2.0 * n * matrices, attention=4.0 * layers * n * n * d)


def connector_forward_flops(cfg: RunConfig) -> ForwardFlops:
    """Return the FLOPs of the connector for one tile."""
    connector, d, h = cfg.connector, cfg.vision.hidden_size, cfg.language.hidden_size
    tokens, patches, channels = connector.num_tokens, cfg.vision.grid_size**2, connector.hidden_size
    if connector.kind == "average_pool":
        return ForwardFlops(weights=2.0 * tokens * d * h)
    flops = 2.0 * tokens * (channels * h + (connector.mlp_depth - 1) * h * h)
    for (c, times), pixels in zip(_connector_blocks(connector, d), (patches, patches, tokens), strict=True):
        convolutions = c * channels * (2 if c != channels else 1) + 9 * channels + channels * channels
        squeeze_excite = 2 * channels * round(0.25 * c)
        flops += 2.0 * times * (pixels * convolutions + squeeze_excite)
    return ForwardFlops(weights=flops)


def _trained_language(cfg: RunConfig, forward: ForwardFlops) -> float:
    freeze = cfg.freeze
    flows = not (freeze.language and freeze.connector and freeze.vision)
    return forward.trained(weight_gradients=not freeze.language, input_gradients=flows)


def _trained_tile(cfg: RunConfig) -> tuple[float, float]:
    """Return the FLOPs that one tile costs in the encoder and in the connector."""
    freeze = cfg.freeze
    encoder = vision_forward_flops(cfg.vision).trained(
        weight_gradients=not freeze.vision, input_gradients=not freeze.vision
    )
    connector = connector_forward_flops(cfg).trained(
        weight_gradients=not freeze.connector, input_gradients=not (freeze.connector and freeze.vision)
    )
    return encoder, connector


def step_flops(cfg: RunConfig, *, rows: float, tiles: float) -> StepFlops:
    """Return the model FLOPs of training on ``rows`` rows that hold ``tiles`` tiles together."""
    forward = output_forward_flops(cfg)
    for sparse in sparse_layers(cfg):
        forward += layer_forward_flops(cfg, sparse=sparse)
    encoder, connector = _trained_tile(cfg)
    return StepFlops(
        language=rows * _trained_language(cfg, forward), vision=tiles * encoder, connector=tiles * connector
    )


def planned_tiles_per_row(cfg: RunConfig) -> int:
    """Return the tiles of a full row: as many as images, the tile cap and the row's length allow."""
    images = cfg.data.max_images * tiles_of_split_image(cfg)
    return min(images, cfg.data.max_tiles, cfg.data.seq_length // cfg.connector.num_tokens)


# --- pipeline --------------------------------------------------------------------------------------------------------


def stage_costs(cfg: RunConfig, layers_per_stage: tuple[int, ...]) -> tuple[float, ...]:
    """Return the model FLOPs each pipeline stage spends on one full row: stage 0 encodes, the last one predicts."""
    sparse = sparse_layers(cfg)
    costs, start = [], 0
    for layers in layers_per_stage:
        held = sparse[start : start + layers]
        costs.append(sum(_trained_language(cfg, layer_forward_flops(cfg, sparse=s)) for s in held))
        start += layers
    costs[0] += planned_tiles_per_row(cfg) * sum(_trained_tile(cfg))
    costs[-1] += _trained_language(cfg, output_forward_flops(cfg))
    return tuple(costs)


def pipeline_layer_split(cfg: RunConfig) -> tuple[int, ...]:
    """Return the decoder layers of each pipeline stage.

    Stage 0 gets ``parallel.num_layers_in_first_pipeline_stage``, or the number that makes the slowest stage fastest;
    the others share the rest evenly, as megatron-core asks.

    Raises:
        ConfigError: there are fewer layers than stages, or the configured number leaves an uneven rest.
    """
    stages, layers = cfg.parallel.pipeline_model_parallel_size, cfg.language.num_layers
    if stages == 1:
        return (layers,)
    feasible = feasible_first_stages(cfg)
    chosen = cfg.parallel.num_layers_in_first_pipeline_stage
    if not feasible or (chosen is not None and chosen not in feasible):
        raise ConfigError(
            f"{layers} layers cannot be split over {stages} stages with {chosen or 'any number'} on stage 0",
            fix=f"use one of {feasible} layers on stage 0" if feasible else f"use at most {layers} stages",
        )

    def split(first: int) -> tuple[int, ...]:
        return (first,) + ((layers - first) // (stages - 1),) * (stages - 1)

    if chosen is not None:
        return split(chosen)
    return min((split(first) for first in feasible), key=lambda candidate: max(stage_costs(cfg, candidate)))


# --- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank.

    Activations are an estimate: what the backward pass keeps, without workspaces or fragmentation.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.parameters + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class _Held:
    """Parameters one rank holds, and the ranks that its optimizer state could be spread over."""

    count: float
    trained: bool
    spread: int


def memory_estimate(cfg: RunConfig, *, world_size: int, stage: int = 0) -> MemoryEstimate:
    """Estimate the memory of one rank of pipeline stage ``stage``.

    Raises:
        ConfigError: the world or the layers cannot be split as configured.
    """
    held = _held_parameters(cfg, world_size=world_size, stage=stage)
    bf16 = cfg.kernels.params_dtype == "bf16"
    trained = sum(h.count for h in held if h.trained)
    spread = cfg.parallel.use_distributed_optimizer or cfg.optimizer.name == "adafactor"
    kept_floats = (2 if cfg.optimizer.name == "adamw" else int(cfg.optimizer.adafactor_beta1 is not None)) + bf16
    return MemoryEstimate(
        parameters=sum(h.count for h in held) * (2 if bf16 else 4),
        gradients=trained * (2 if bf16 and not cfg.parallel.grad_reduce_in_fp32 else 4),
        optimizer=sum(4.0 * kept_floats * h.count / (h.spread if spread else 1) for h in held if h.trained),
        activations=_activation_bytes(cfg, stage=stage),
    )


def _held_parameters(cfg: RunConfig, *, world_size: int, stage: int) -> list[_Held]:
    p, layers = cfg.parallel, pipeline_layer_split(cfg)
    data_parallel, tp = data_parallel_size(cfg, world_size=world_size), p.tensor_model_parallel_size
    first = sum(layers[:stage])
    sparse = sparse_layers(cfg)[first : first + layers[stage]]
    expert_tp = p.expert_tensor_parallel_size or tp
    expert_spread = max(1, data_parallel * tp // (p.expert_model_parallel_size * expert_tp))
    ffn, train_language = _feed_forward_matrices(cfg), not cfg.freeze.language
    dense = sum(
        (_attention_matrices(cfg) + (0 if s else ffn)) / tp + _layer_norms(cfg) + s * _router(cfg) for s in sparse
    )
    counts = language_parameters(cfg)
    if stage == 0:
        dense += counts.embedding / tp
    if stage == len(layers) - 1:
        tied_copy = counts.embedding if len(layers) > 1 and counts.output == 0 else 0
        dense += (counts.output + tied_copy) / tp + counts.final_norm
    experts = sum(sparse) * cfg.moe.num_moe_experts * ffn / (p.expert_model_parallel_size * expert_tp)
    held = [_Held(dense, train_language, data_parallel), _Held(experts, train_language, expert_spread)]
    if stage == 0:
        share = tp if p.encoder_parallel == "tensor" else 1
        held.append(_Held(vision_parameters(cfg.vision) / share, not cfg.freeze.vision, data_parallel))
        held.append(_Held(connector_parameters(cfg), not cfg.freeze.connector, data_parallel))
    return held


def _activation_bytes(cfg: RunConfig, *, stage: int) -> float:
    layers, width = pipeline_layer_split(cfg), 2 if cfg.kernels.params_dtype == "bf16" else 4
    first = sum(layers[:stage])
    tokens = cfg.data.seq_length * cfg.train.micro_batch_size
    per_token = sum(_layer_activations(cfg, sparse=s) for s in sparse_layers(cfg)[first : first + layers[stage]])
    # one-forward-one-backward: stage i keeps as many micro-batches as there are stages from it to the end
    in_flight = len(layers) - stage
    total = float(width * tokens * per_token * in_flight)
    if stage == len(layers) - 1:
        total += 2 * 4 * tokens * padded_vocab_size(cfg) / cfg.parallel.tensor_model_parallel_size
    if stage == 0 and not cfg.freeze.vision:
        tiles = planned_tiles_per_row(cfg) * cfg.train.micro_batch_size / cfg.parallel.tensor_model_parallel_size
        total += width * tiles * _tile_activations(cfg) * in_flight
    return total


def _layer_activations(cfg: RunConfig, *, sparse: bool) -> float:
    """Return the values a decoder layer keeps for each token (flash attention: no score matrix)."""
    language, tp = cfg.language, cfg.parallel.tensor_model_parallel_size
    h, shard = language.hidden_size, tp if cfg.parallel.sequence_parallel else 1
    if cfg.kernels.recompute_granularity == "full":
        return h / shard / cfg.kernels.recompute_num_layers
    q = language.num_attention_heads * language.kv_channels
    kv = language.num_query_groups * language.kv_channels
    attention = 0 if cfg.kernels.recompute_granularity == "selective" else q
    branches = 3 if language.activation == "swiglu" else 2
    inner = branches * language.ffn_hidden_size * (cfg.moe.moe_router_topk if sparse else 1)
    return 4 * h / shard + (q + 2 * kv + attention + inner) / tp


def _tile_activations(cfg: RunConfig) -> float:
    """Return the values the encoder and the connector keep for each tile."""
    vision, connector = cfg.vision, cfg.connector
    block = vision.hidden_size if cfg.kernels.recompute_vision else 8 * vision.hidden_size + 2 * vision.ffn_hidden_size
    encoder = vision.grid_size**2 * built_vision_layers(vision) * block
    if connector.kind == "average_pool":
        return encoder
    return encoder + 8 * connector.hidden_size * connector.depth * (vision.grid_size**2 + connector.num_tokens)
