"""Bytes of one rank: parameters, gradients, optimizer state and an estimate of activations."""

from __future__ import annotations

from dataclasses import dataclass

from mm15_megatron.accounting.flops import planned_tiles_per_row
from mm15_megatron.accounting.parameters import (
    attention_matrices,
    built_vision_layers,
    connector_parameters,
    feed_forward_matrices,
    language_parameters,
    layer_norms,
    padded_vocab_size,
    router_matrix,
    sparse_layers,
    vision_parameters,
)
from mm15_megatron.accounting.pipeline import stage_layers
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.config.validate import data_parallel_size, expert_tensor_size

LOSS_CHUNK_TOKENS = 1024
"""Tokens whose losses are computed at a time."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank.

    Activations are an estimate: what the backward pass keeps, without workspaces, communication buffers, the static
    buffers of CUDA graphs or fragmentation. What FP8 adds and
    saves is modelled on Transformer Engine 2.11, which builds nothing without a GPU: a weight has an FP8 copy for each
    of the two directions it is multiplied in (with ``fp8_param_gather`` these are the weight), and what enters a linear
    layer is kept in FP8.
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
    # Two FP8 copies of one byte; with fp8_param_gather they take the place of the two bytes of bf16.
    copies = 0.0 if cfg.precision.fp8_param_gather else 2.0 * _fp8_weights(cfg, stage=stage)
    return MemoryEstimate(
        parameters=sum(h.count for h in held) * (2 if bf16 else 4) + copies,
        gradients=trained * (2 if bf16 and not cfg.parallel.grad_reduce_in_fp32 else 4),
        optimizer=sum(4.0 * kept_floats * h.count / (h.spread if spread else 1) for h in held if h.trained),
        activations=_activation_bytes(cfg, stage=stage),
    )


def _held_parameters(cfg: RunConfig, *, world_size: int, stage: int) -> list[_Held]:
    p, stages = cfg.parallel, cfg.parallel.pipeline_model_parallel_size
    tp = p.tensor_model_parallel_size
    spread = data_parallel_size(cfg, world_size=world_size) * p.context_parallel_size
    everywhere = sparse_layers(cfg)
    sparse = [everywhere[layer] for layer in stage_layers(cfg, stage)]
    expert_tp = expert_tensor_size(cfg)
    expert_spread = max(1, spread * tp // (p.expert_model_parallel_size * expert_tp))
    ffn, train_language = feed_forward_matrices(cfg), not cfg.freeze.language
    dense = sum(
        (attention_matrices(cfg) + (0 if s else ffn)) / tp + layer_norms(cfg) + s * router_matrix(cfg) for s in sparse
    )
    counts = language_parameters(cfg)
    if stage == 0:
        dense += counts.embedding / tp
    if stage == stages - 1:
        tied_copy = counts.embedding if stages > 1 and counts.output == 0 else 0
        dense += (counts.output + tied_copy) / tp + counts.final_norm
    experts = sum(sparse) * cfg.moe.num_moe_experts * ffn / (p.expert_model_parallel_size * expert_tp)
    held = [_Held(dense, train_language, spread), _Held(experts, train_language, expert_spread)]
    if stage == 0:
        share = tp if p.encoder_parallel == "tensor" else 1
        held.append(_Held(vision_parameters(cfg.vision) / share, not cfg.freeze.vision, spread))
        held.append(_Held(connector_parameters(cfg), not cfg.freeze.connector, spread))
    return held


def _computes_in_fp8(cfg: RunConfig, layer: int) -> bool:
    """Whether a decoder layer's linear layers multiply in FP8."""
    precision = cfg.precision
    if precision.fp8 is None or not precision.first_last_layers_bf16:
        return precision.fp8 is not None
    first, last = precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16
    return first <= layer < cfg.language.num_layers - last


def _fp8_weights(cfg: RunConfig, *, stage: int) -> float:
    """Return how many weights of one rank are multiplied in FP8."""
    p, sparse, ffn = cfg.parallel, sparse_layers(cfg), feed_forward_matrices(cfg)
    tp, split = p.tensor_model_parallel_size, p.expert_model_parallel_size * expert_tensor_size(cfg)
    count = 0.0
    for layer in stage_layers(cfg, stage):
        if _computes_in_fp8(cfg, layer):
            count += attention_matrices(cfg) / tp
            count += cfg.moe.num_moe_experts * ffn / split if sparse[layer] else ffn / tp
    if stage == 0 and cfg.precision.fp8 is not None and cfg.precision.fp8_vision:
        width, inner = cfg.vision.hidden_size, cfg.vision.ffn_hidden_size
        share = tp if p.encoder_parallel == "tensor" else 1
        count += built_vision_layers(cfg.vision) * (4 * width**2 + 2 * width * inner) / share
    return count


def _micro_batches_in_flight(cfg: RunConfig, *, stage: int) -> float:
    """Return how many micro-batches' activations of all its layers a stage keeps at most.

    One-forward-one-backward keeps one for each stage from it to the end. Interleaving keeps more passes, each of one
    model chunk (megatron-core's warm-up).
    """
    stages, chunks = cfg.parallel.pipeline_model_parallel_size, cfg.parallel.virtual_pipeline_model_parallel_size
    if chunks is None:
        return float(stages - stage)
    return (2 * (stages - stage - 1) + (chunks - 1) * stages + 1) / chunks


def _passes_of_first_chunk(cfg: RunConfig, *, stage: int) -> float:
    """Return how many passes of its first model chunk a stage keeps at most (the encoder is in that of stage 0)."""
    stages, chunks = cfg.parallel.pipeline_model_parallel_size, cfg.parallel.virtual_pipeline_model_parallel_size
    if chunks is None:
        return _micro_batches_in_flight(cfg, stage=stage)
    rounds, rest = divmod(2 * (stages - stage - 1) + (chunks - 1) * stages + 1, stages * chunks)
    return float(rounds * stages + min(rest, stages))


def _activation_bytes(cfg: RunConfig, *, stage: int) -> float:
    width = 2 if cfg.kernels.params_dtype == "bf16" else 4
    p, sparse = cfg.parallel, sparse_layers(cfg)
    tokens = cfg.data.seq_length * cfg.train.micro_batch_size / p.context_parallel_size
    layers = stage_layers(cfg, stage)
    per_token = width * sum(_layer_activations(cfg, sparse=sparse[layer]) for layer in layers)
    per_token -= sum(_linear_inputs(cfg, sparse=sparse[layer]) for layer in layers if _computes_in_fp8(cfg, layer))
    in_flight = _micro_batches_in_flight(cfg, stage=stage)
    total = float(tokens * per_token * in_flight)
    if stage == p.pipeline_model_parallel_size - 1:
        # The gradient takes the place of the logits; without fused kernels a chunk of bf16 ones is widened.
        widened = 4 * min(tokens, LOSS_CHUNK_TOKENS) if width == 2 and not cfg.kernels.compile_fusions else 0
        total += (width * tokens + widened) * padded_vocab_size(cfg) / p.tensor_model_parallel_size
    if stage == 0 and not cfg.freeze.vision:
        sharing = p.tensor_model_parallel_size * p.context_parallel_size
        tiles = planned_tiles_per_row(cfg) * cfg.train.micro_batch_size / sharing
        total += width * tiles * _tile_activations(cfg) * _passes_of_first_chunk(cfg, stage=stage)
    return total


def _recomputed(cfg: RunConfig) -> tuple[str, ...]:
    """Parts of a decoder layer that are recomputed selectively."""
    return cfg.kernels.recompute_modules if cfg.kernels.recompute_granularity == "selective" else ()


def _layer_activations(cfg: RunConfig, *, sparse: bool) -> float:
    """Return the values a decoder layer keeps for each token (flash attention: no score matrix).

    Recomputing the core attention spares nothing here: its inputs and its result, which the projection multiplies, are
    kept all the same.
    """
    language, tp, recomputed = cfg.language, cfg.parallel.tensor_model_parallel_size, _recomputed(cfg)
    h, shard = language.hidden_size, tp if cfg.parallel.sequence_parallel else 1
    if cfg.kernels.recompute_granularity == "full":
        return h / shard / cfg.kernels.recompute_num_layers
    q = language.num_attention_heads * language.kv_channels
    kv = language.num_query_groups * language.kv_channels
    attention = 2 * h / shard + (2 * q + 2 * kv) / tp  # residual, norm; queries, keys, values, result
    branches = 3 if language.activation == "swiglu" else 2
    if not sparse:
        inner = 0 if "mlp" in recomputed else branches * language.ffn_hidden_size / tp
        return attention + 2 * h / shard + inner
    inner = 0.0
    if "moe" not in recomputed:
        kept = branches - ("moe_act" in recomputed)  # the product of the activation
        # tokens as they are sent to the experts, and what these keep of them
        inner = cfg.moe.moe_router_topk * (h * expert_tensor_size(cfg) + kept * language.ffn_hidden_size) / tp
    return attention + (2 - ("layernorm" in recomputed)) * h / shard + inner


def _linear_inputs(cfg: RunConfig, *, sparse: bool) -> float:
    """Return how many of the values kept for each token enter a linear layer alone, so that FP8 halves them.

    The result of the attention is kept beside its FP8 copy, which takes half of it once more; the norm before a sparse
    block feeds the router too.
    """
    language, tp, recomputed = cfg.language, cfg.parallel.tensor_model_parallel_size, _recomputed(cfg)
    if cfg.kernels.recompute_granularity == "full":
        return 0.0
    h, shard = language.hidden_size, tp if cfg.parallel.sequence_parallel else 1
    attention = h / shard - language.num_attention_heads * language.kv_channels / tp
    if not sparse:
        inner = 0 if "mlp" in recomputed else language.ffn_hidden_size / tp
        return attention + h / shard + inner
    if "moe" in recomputed:
        return attention
    product = 0 if "moe_act" in recomputed else language.ffn_hidden_size
    return attention + cfg.moe.moe_router_topk * (h * expert_tensor_size(cfg) + product) / tp


def _tile_activations(cfg: RunConfig) -> float:
    """Return the values the encoder and the connector keep for each tile."""
    vision, connector = cfg.vision, cfg.connector
    block = vision.hidden_size if cfg.kernels.recompute_vision else 8 * vision.hidden_size + 2 * vision.ffn_hidden_size
    encoder = vision.grid_size**2 * built_vision_layers(vision) * block
    patches, channels = vision.grid_size**2, connector.hidden_size
    if connector.kind == "average_pool":
        return encoder
    if connector.kind == "attention_pool":  # normalised patches, keys and values, results of the queries
        return encoder + 2 * patches * (vision.hidden_size + channels) + 2 * connector.num_tokens * channels
    return encoder + 8 * channels * connector.depth * (patches + connector.num_tokens)
