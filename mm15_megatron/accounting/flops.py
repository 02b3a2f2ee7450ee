"""Model FLOPs of a step and the peaks of known devices (symbols and convention: see the package)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mm15_megatron.accounting.parameters import (
    attention_matrices,
    built_vision_layers,
    connector_blocks,
    feed_forward_matrices,
    padded_vocab_size,
    router_matrix,
    sparse_layers,
)
from mm15_megatron.config.schema import RunConfig, VisionConfig
from mm15_megatron.config.validate import tiles_of_split_image

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
    s, ffn = cfg.data.seq_length, feed_forward_matrices(cfg)
    used = cfg.moe.moe_router_topk * ffn + router_matrix(cfg) if sparse else ffn
    q = cfg.language.num_attention_heads * cfg.language.kv_channels
    return ForwardFlops(weights=2.0 * s * (attention_matrices(cfg) + used), attention=2.0 * s * s * q)


def output_forward_flops(cfg: RunConfig) -> ForwardFlops:
    """Return the FLOPs of the output layer for one row."""
    return ForwardFlops(weights=2.0 * cfg.data.seq_length * cfg.language.hidden_size * padded_vocab_size(cfg))


def vision_forward_flops(vision: VisionConfig) -> ForwardFlops:
    """Return the FLOPs of the encoder for one tile."""
    n, d, layers = vision.grid_size**2, vision.hidden_size, built_vision_layers(vision)
    matrices = layers * (4 * d * d + 2 * d * vision.ffn_hidden_size) + 3 * vision.patch_size**2 * d
    return ForwardFlops(weights=2.0 * n * matrices, attention=4.0 * layers * n * n * d)


def connector_forward_flops(cfg: RunConfig) -> ForwardFlops:
    """Return the FLOPs of the connector for one tile (attention pooling projects its queries once a micro-batch)."""
    connector, d, h = cfg.connector, cfg.vision.hidden_size, cfg.language.hidden_size
    tokens, patches, channels = connector.num_tokens, cfg.vision.grid_size**2, connector.hidden_size
    if connector.kind == "average_pool":
        return ForwardFlops(weights=2.0 * tokens * d * h)
    if connector.kind == "attention_pool":
        products = 2 * patches * d * channels + tokens * channels * h
        return ForwardFlops(weights=2.0 * products, attention=4.0 * tokens * patches * channels)
    flops = 2.0 * tokens * (channels * h + (connector.mlp_depth - 1) * h * h)
    for (c, times), pixels in zip(connector_blocks(connector, d), (patches, patches, tokens), strict=True):
        convolutions = c * channels * (2 if c != channels else 1) + 9 * channels + channels * channels
        squeeze_excite = 2 * channels * round(0.25 * c)
        flops += 2.0 * times * (pixels * convolutions + squeeze_excite)
    return ForwardFlops(weights=flops)


def trained_language(cfg: RunConfig, forward: ForwardFlops) -> float:
    """Return the FLOPs that a part of the decoder costs in training, given those of its forward pass."""
    freeze = cfg.freeze
    flows = not (freeze.language and freeze.connector and freeze.vision)
    return forward.trained(weight_gradients=not freeze.language, input_gradients=flows)


def trained_tile(cfg: RunConfig) -> tuple[float, float]:
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
    encoder, connector = trained_tile(cfg)
    return StepFlops(
        language=rows * trained_language(cfg, forward), vision=tiles * encoder, connector=tiles * connector
    )


def planned_tiles_per_row(cfg: RunConfig) -> int:
    """Return the tiles of a full row: as many as images, the tile cap and the row's length allow."""
    images = cfg.data.max_images * tiles_of_split_image(cfg)
    return min(images, cfg.data.max_tiles, cfg.data.seq_length // cfg.connector.num_tokens)
