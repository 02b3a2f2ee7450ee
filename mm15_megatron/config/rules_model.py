"""Rules of the model and its input: types and ranges, decoder, encoder, connector, tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mm15_megatron.config.coerce import coerce
from mm15_megatron.config.rule import Rule, divides
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.config.tree import OPTIONS, flatten
from mm15_megatron.errors import ConfigError


def tiles_of_split_image(config: RunConfig) -> int:
    """Return the most tiles one image can become, overview included."""
    tiling = config.tiling
    return {"none": 1, "static": 5, "dynamic": tiling.max_tiles + 1}[tiling.mode]


@dataclass(frozen=True)
class _Range:
    """Allowed interval of a number; None values of an option are always allowed."""

    least: float
    most: float = math.inf
    open_below: bool = False
    open_above: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.least if self.open_below else value >= self.least
        return above and (value < self.most if self.open_above else value <= self.most)

    def __str__(self) -> str:
        lower = f"{'>' if self.open_below else '>='} {self.least:g}"
        return lower if self.most == math.inf else f"{lower} and {'<' if self.open_above else '<='} {self.most:g}"


_AT_LEAST_0, _AT_LEAST_1 = _Range(0), _Range(1)
_POSITIVE = _Range(0, open_below=True)
_SHARE = _Range(0, 1)
_DECAY = _Range(0, 1, open_above=True)

_RANGES: dict[_Range, tuple[str, ...]] = {
    _AT_LEAST_1: (
        "language.num_layers language.hidden_size language.num_attention_heads language.num_query_groups",
        "language.kv_channels language.ffn_hidden_size language.vocab_size language.make_vocab_size_divisible_by",
        "moe.moe_layer_period moe.moe_router_topk moe.moe_capacity_group_size",
        "vision.num_layers vision.hidden_size vision.num_attention_heads vision.ffn_hidden_size vision.patch_size",
        "vision.image_size connector.num_tokens connector.hidden_size connector.depth connector.mlp_depth",
        "connector.num_attention_heads",
        "data.seq_length data.max_images data.max_tiles data.prefetch_factor data.max_image_pixels",
        "tiling.min_tiles tiling.max_tiles",
        "parallel.tensor_model_parallel_size parallel.pipeline_model_parallel_size parallel.context_parallel_size",
        "parallel.expert_model_parallel_size parallel.expert_tensor_parallel_size",
        "parallel.virtual_pipeline_model_parallel_size parallel.num_layers_in_first_pipeline_stage",
        "parallel.distributed_timeout_minutes kernels.recompute_num_layers",
        "train.steps train.global_batch_size train.micro_batch_size train.validation_steps",
        "schedule.decay_steps logging.log_interval precision.fp8_amax_history_len",
    ),
    _AT_LEAST_0: (
        "tiling.mixed_resolution_images",
        "language.z_loss_coeff moe.num_moe_experts moe.moe_aux_loss_coeff moe.moe_z_loss_coeff",
        "vision.position_grid_size data.num_workers tiling.max_split_images",
        "train.validation_interval train.threads_per_rank train.seed optimizer.weight_decay optimizer.clip_grad",
        "faults.max_skips_in_a_row schedule.warmup_steps checkpoint.save_interval checkpoint.keep precision.fp8_margin",
        "precision.num_layers_at_start_in_bf16 precision.num_layers_at_end_in_bf16 kernels.cuda_graph_warmup_steps",
    ),
    _POSITIVE: (
        "language.norm_epsilon language.rotary_base language.init_method_std moe.moe_expert_capacity_factor",
        "vision.norm_epsilon connector.norm_epsilon optimizer.lr optimizer.connector_lr optimizer.vision_lr",
        "optimizer.adafactor_eps faults.loss_spike_threshold",
        "optimizer.adam_eps optimizer.adafactor_clip_threshold optimizer.adafactor_decay_rate logging.peak_tflops",
    ),
    _DECAY: ("optimizer.adam_beta1 optimizer.adam_beta2 optimizer.adafactor_beta1",),
    _SHARE: ("schedule.min_lr_ratio",),
}


def _types_and_choices(config: RunConfig, world_size: int) -> None:
    for path, value in flatten(config).items():
        coerce(OPTIONS[path], value)


def _ranges(config: RunConfig, world_size: int) -> None:
    values = flatten(config)
    for allowed, lines in _RANGES.items():
        for path in " ".join(lines).split():
            if values[path] is not None and not allowed.holds(values[path]):
                raise ConfigError(f"{path} = {values[path]} is out of range", fix=f"give a value {allowed}")


def _decoder_heads(config: RunConfig, world_size: int) -> None:
    language = config.language
    divides(
        "language.num_attention_heads",
        language.num_attention_heads,
        by="language.num_query_groups",
        divisor=language.num_query_groups,
    )
    divides(
        "language.kv_channels", language.kv_channels, by="the two halves of RoPE", divisor=2, fix="use an even number"
    )


def _encoder_shape(config: RunConfig, world_size: int) -> None:
    vision = config.vision
    divides(
        "vision.hidden_size", vision.hidden_size, by="vision.num_attention_heads", divisor=vision.num_attention_heads
    )
    divides("vision.image_size", vision.image_size, by="vision.patch_size", divisor=vision.patch_size)
    if vision.position_embedding == "sincos":
        divides(
            "vision.hidden_size",
            vision.hidden_size,
            by="the sines and cosines of two axes",
            divisor=4,
            fix="use a multiple of 4, or vision.position_embedding=learned",
        )


def _feature_layer(config: RunConfig, world_size: int) -> None:
    vision = config.vision
    if not -vision.num_layers <= vision.feature_layer <= -1:
        raise ConfigError(
            f"vision.feature_layer = {vision.feature_layer} is no block of an encoder of {vision.num_layers}",
            fix=f"count from the end: -1 = last block ... {-vision.num_layers} = first block",
        )


def _connector_grid(config: RunConfig, world_size: int) -> None:
    connector, grid = config.connector, config.vision.grid_size
    if not connector.pools_grid:
        return
    if connector.output_grid_size**2 != connector.num_tokens:
        near = connector.output_grid_size
        raise ConfigError(
            f"connector.num_tokens = {connector.num_tokens} is not a square", fix=f"use {near**2} or {(near + 1) ** 2}"
        )
    if connector.output_grid_size > grid:
        raise ConfigError(
            f"connector.num_tokens = {connector.num_tokens} is more than the {grid}x{grid} patches of a tile",
            fix="use fewer tokens or a larger vision.image_size",
        )


def _connector_heads(config: RunConfig, world_size: int) -> None:
    connector = config.connector
    if connector.kind == "attention_pool":
        heads = connector.num_attention_heads
        divides("connector.hidden_size", connector.hidden_size, by="connector.num_attention_heads", divisor=heads)


def _image_fits_row(config: RunConfig, world_size: int) -> None:
    tiles, tokens = tiles_of_split_image(config), config.connector.num_tokens
    # besides the image a row needs one target and the token that predicts it
    if tiles * tokens + 2 > config.data.seq_length:
        raise ConfigError(
            f"an image of {tiles} tiles x {tokens} tokens and text overflow data.seq_length = {config.data.seq_length}",
            fix=f"use a data.seq_length well above {tiles * tokens}, fewer tiles or fewer tokens",
        )


def _tile_budget(config: RunConfig, world_size: int) -> None:
    tiling, data = config.tiling, config.data
    if tiling.mode == "dynamic" and tiling.min_tiles > tiling.max_tiles:
        raise ConfigError(
            f"tiling.min_tiles = {tiling.min_tiles} is above tiling.max_tiles = {tiling.max_tiles}",
            fix="swap or change them",
        )
    if tiling.mode != "none" and max(tiling.max_split_images, tiling.mixed_resolution_images) < 1:
        raise ConfigError(
            f"tiling.mode = {tiling.mode!r} splits nothing with tiling.max_split_images = 0", fix="set tiling.mode=none"
        )
    if tiling.mixed_resolution_images and tiling.indicator == "index":
        raise ConfigError(
            f"tiling.mixed_resolution_images = {tiling.mixed_resolution_images} splits images of any number, and "
            "tiling.indicator = index has labels for the first tiling.max_split_images alone",
            fix="set tiling.indicator=none (MM1) or seps, or tiling.mixed_resolution_images=0",
        )
    images = 1 if tiling.mode == "none" else min(tiling.max_split_images, data.max_images)
    needed = max(images, min(tiling.mixed_resolution_images, data.max_images)) * tiles_of_split_image(config)
    if data.max_tiles < needed:
        raise ConfigError(
            f"data.max_tiles = {data.max_tiles} cannot hold {images} image(s) of {tiles_of_split_image(config)} tiles",
            fix=f"set data.max_tiles to at least {needed}",
        )


MODEL_RULES: tuple[Rule, ...] = (
    _types_and_choices,
    _ranges,
    _decoder_heads,
    _encoder_shape,
    _feature_layer,
    _connector_grid,
    _connector_heads,
    _image_fits_row,
    _tile_budget,
)
