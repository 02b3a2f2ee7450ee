"""What a configuration must satisfy before a process group exists: one small function a rule, each naming the fix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mm15_megatron.config.coerce import coerce
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.config.tree import OPTIONS, flatten
from mm15_megatron.errors import ConfigError


def validate(config: RunConfig, *, world_size: int) -> None:
    """Check that ``config`` can be trained by ``world_size`` processes.

    Args:
        config: the configuration of the run.
        world_size: number of processes (ranks).

    Raises:
        ConfigError: the first rule that fails, with the values and the fix.
    """
    for rule in RULES:
        rule(config, world_size)


def data_parallel_size(config: RunConfig, *, world_size: int) -> int:
    """Return the ranks of a data-parallel group.

    Raises:
        ConfigError: the world cannot be split this way.
    """
    p = config.parallel
    model = p.tensor_model_parallel_size * p.pipeline_model_parallel_size * p.context_parallel_size
    if world_size < 1 or world_size % model:
        raise ConfigError(
            f"{world_size} processes cannot be split into tensor {p.tensor_model_parallel_size} x pipeline "
            f"{p.pipeline_model_parallel_size} x context {p.context_parallel_size} = {model}",
            fix=f"start a multiple of {model} processes or change the parallel sizes",
        )
    return world_size // model


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
        "moe.moe_layer_period moe.moe_router_topk",
        "vision.num_layers vision.hidden_size vision.num_attention_heads vision.ffn_hidden_size vision.patch_size",
        "vision.image_size connector.num_tokens connector.hidden_size connector.depth connector.mlp_depth",
        "data.seq_length data.max_images data.max_tiles data.prefetch_factor data.max_image_pixels",
        "tiling.min_tiles tiling.max_tiles",
        "parallel.tensor_model_parallel_size parallel.pipeline_model_parallel_size parallel.context_parallel_size",
        "parallel.expert_model_parallel_size parallel.expert_tensor_parallel_size",
        "parallel.virtual_pipeline_model_parallel_size parallel.num_layers_in_first_pipeline_stage",
        "parallel.distributed_timeout_minutes kernels.recompute_num_layers",
        "train.steps train.global_batch_size train.micro_batch_size train.validation_steps",
        "schedule.decay_steps logging.log_interval",
    ),
    _AT_LEAST_0: (
        "language.z_loss_coeff moe.num_moe_experts moe.moe_aux_loss_coeff moe.moe_z_loss_coeff",
        "vision.position_grid_size data.num_workers tiling.max_split_images",
        "train.validation_interval train.threads_per_rank train.seed optimizer.weight_decay optimizer.clip_grad",
        "schedule.warmup_steps checkpoint.save_interval checkpoint.keep",
    ),
    _POSITIVE: (
        "language.norm_epsilon language.rotary_base language.init_method_std moe.moe_expert_capacity_factor",
        "vision.norm_epsilon connector.norm_epsilon optimizer.lr optimizer.connector_lr optimizer.vision_lr",
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


def _world_size(config: RunConfig, world_size: int) -> None:
    data_parallel_size(config, world_size=world_size)


def _divides(what: str, value: int, *, by: str, divisor: int, fix: str = "") -> None:
    if value % divisor:
        raise ConfigError(f"{what} = {value} is not divisible by {by} = {divisor}", fix=fix or f"change {what} or {by}")


def _tensor_split_of_decoder(config: RunConfig, world_size: int) -> None:
    tp, language = config.parallel.tensor_model_parallel_size, config.language
    split = {
        "language.num_attention_heads": language.num_attention_heads,
        "language.num_query_groups": language.num_query_groups,
        "language.ffn_hidden_size": language.ffn_hidden_size,
        "language.make_vocab_size_divisible_by": language.make_vocab_size_divisible_by,
    }
    for path, value in split.items():
        _divides(path, value, by="parallel.tensor_model_parallel_size", divisor=tp)


def _tensor_split_of_encoder(config: RunConfig, world_size: int) -> None:
    if config.parallel.encoder_parallel != "tensor":
        return
    tp, vision = config.parallel.tensor_model_parallel_size, config.vision
    fix = "set parallel.encoder_parallel=data, or change the sizes"
    for name, value in (
        ("num_attention_heads", vision.num_attention_heads),
        ("ffn_hidden_size", vision.ffn_hidden_size),
    ):
        _divides(f"vision.{name}", value, by="parallel.tensor_model_parallel_size", divisor=tp, fix=fix)


def _decoder_heads(config: RunConfig, world_size: int) -> None:
    language = config.language
    _divides(
        "language.num_attention_heads",
        language.num_attention_heads,
        by="language.num_query_groups",
        divisor=language.num_query_groups,
    )
    _divides(
        "language.kv_channels", language.kv_channels, by="the two halves of RoPE", divisor=2, fix="use an even number"
    )


def _encoder_shape(config: RunConfig, world_size: int) -> None:
    vision = config.vision
    _divides(
        "vision.hidden_size", vision.hidden_size, by="vision.num_attention_heads", divisor=vision.num_attention_heads
    )
    _divides("vision.image_size", vision.image_size, by="vision.patch_size", divisor=vision.patch_size)


def _feature_layer(config: RunConfig, world_size: int) -> None:
    vision = config.vision
    if not -vision.num_layers <= vision.feature_layer <= -1:
        raise ConfigError(
            f"vision.feature_layer = {vision.feature_layer} is no block of an encoder of {vision.num_layers}",
            fix=f"count from the end: -1 = last block ... {-vision.num_layers} = first block",
        )


def _connector_grid(config: RunConfig, world_size: int) -> None:
    connector, grid = config.connector, config.vision.grid_size
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
    if tiling.mode != "none" and tiling.max_split_images < 1:
        raise ConfigError(
            f"tiling.mode = {tiling.mode!r} splits nothing with tiling.max_split_images = 0", fix="set tiling.mode=none"
        )
    images = 1 if tiling.mode == "none" else min(tiling.max_split_images, data.max_images)
    needed = images * tiles_of_split_image(config)
    if data.max_tiles < needed:
        raise ConfigError(
            f"data.max_tiles = {data.max_tiles} cannot hold {images} image(s) of {tiles_of_split_image(config)} tiles",
            fix=f"set data.max_tiles to at least {needed}",
        )


def _pipeline_split(config: RunConfig, world_size: int) -> None:
    stages, layers = config.parallel.pipeline_model_parallel_size, config.language.num_layers
    first = config.parallel.num_layers_in_first_pipeline_stage
    if layers < stages:
        raise ConfigError(
            f"language.num_layers = {layers} cannot give each of {stages} pipeline stages a layer",
            fix=f"set parallel.pipeline_model_parallel_size to at most {layers}",
        )
    if first is None:
        return
    if stages == 1:
        raise ConfigError(
            f"parallel.num_layers_in_first_pipeline_stage = {first} has no effect without a pipeline",
            fix="remove it or raise parallel.pipeline_model_parallel_size",
        )
    rest = layers - first
    if rest < stages - 1 or rest % (stages - 1):
        raise ConfigError(
            f"with {first} layers on stage 0, the other {rest} of {layers} do not split evenly over {stages - 1}",
            fix="use " + " or ".join(str(k) for k in feasible_first_stages(config)) + ", or leave it to the cost model",
        )


def feasible_first_stages(config: RunConfig) -> tuple[int, ...]:
    """Return the layers stage 0 may have so that the others share the rest evenly (two stages or more)."""
    layers, others = config.language.num_layers, config.parallel.pipeline_model_parallel_size - 1
    return tuple(k for k in range(1, layers - others + 1) if (layers - k) % others == 0)


def _sequence_parallel(config: RunConfig, world_size: int) -> None:
    if not config.parallel.sequence_parallel:
        return
    tp = config.parallel.tensor_model_parallel_size
    if tp == 1:
        raise ConfigError(
            "parallel.sequence_parallel has no effect with parallel.tensor_model_parallel_size = 1",
            fix="set parallel.sequence_parallel=false or split the tensors",
        )
    tokens = config.data.seq_length * config.train.micro_batch_size
    _divides("data.seq_length x train.micro_batch_size", tokens, by="parallel.tensor_model_parallel_size", divisor=tp)


def _batch(config: RunConfig, world_size: int) -> None:
    train, data_parallel = config.train, data_parallel_size(config, world_size=world_size)
    rows = train.micro_batch_size * data_parallel
    by = f"train.micro_batch_size {train.micro_batch_size} x data-parallel size {data_parallel}"
    _divides("train.global_batch_size", train.global_batch_size, by=by, divisor=rows, fix=f"use a multiple of {rows}")
    if train.rampup_batch_size is None:
        return
    start, increment, ramp = train.rampup_batch_size
    if start < 1 or increment < 1 or ramp < 1 or start > train.global_batch_size:
        raise ConfigError(
            f"train.rampup_batch_size = {train.rampup_batch_size} does not lead up to {train.global_batch_size}",
            fix="give (start, increment, rows), all positive, start at most train.global_batch_size",
        )
    _divides("the start of train.rampup_batch_size", start, by=by, divisor=rows, fix=f"use a multiple of {rows}")
    _divides(
        "the increment of train.rampup_batch_size", increment, by=by, divisor=rows, fix=f"use a multiple of {rows}"
    )
    _divides(
        "train.global_batch_size - start of the ramp",
        train.global_batch_size - start,
        by="its increment",
        divisor=increment,
        fix="choose an increment that reaches the global batch size exactly",
    )


def _schedule(config: RunConfig, world_size: int) -> None:
    end = config.schedule.decay_steps or config.train.steps
    if config.schedule.warmup_steps >= end:
        raise ConfigError(
            f"schedule.warmup_steps = {config.schedule.warmup_steps} does not end before the schedule ({end} steps)",
            fix=f"set schedule.warmup_steps below {end}",
        )
    if config.schedule.decay == "constant" and config.schedule.decay_steps is not None:
        raise ConfigError(
            f"schedule.decay_steps = {config.schedule.decay_steps} has no effect on a constant rate", fix="remove it"
        )


def _optimizer_overlap(config: RunConfig, world_size: int) -> None:
    p = config.parallel
    if p.overlap_param_gather and not (p.use_distributed_optimizer and p.overlap_grad_reduce):
        raise ConfigError(
            "parallel.overlap_param_gather needs the distributed optimizer and overlapped gradient reduction, found "
            f"use_distributed_optimizer={p.use_distributed_optimizer}, overlap_grad_reduce={p.overlap_grad_reduce}",
            fix="set both to true, or parallel.overlap_param_gather=false",
        )


def _something_trains(config: RunConfig, world_size: int) -> None:
    if config.freeze.vision and config.freeze.connector and config.freeze.language:
        raise ConfigError(
            "encoder, connector and decoder are all frozen: nothing to train", fix="unfreeze one of freeze.*"
        )


def _device_and_kernels(config: RunConfig, world_size: int) -> None:
    if config.parallel.device == "cpu" and config.kernels.transformer_impl == "transformer_engine":
        raise ConfigError(
            "Transformer Engine layers do not run with parallel.device = 'cpu'",
            fix="set kernels.transformer_impl=local",
        )


def _sources(config: RunConfig, world_size: int) -> None:
    for path, sources in (("sources", config.data.sources), ("validation_sources", config.data.validation_sources)):
        for i, source in enumerate(sources):
            if not source.prefix or source.weight <= 0:
                raise ConfigError(
                    f"data.{path}[{i}] has prefix {source.prefix!r} and weight {source.weight}",
                    fix="give a path prefix and a weight above 0, or remove the source",
                )
    if config.train.validation_interval and not config.data.validation_sources:
        raise ConfigError(
            f"train.validation_interval = {config.train.validation_interval} but there is no data.validation_sources",
            fix="name a held-out source or set train.validation_interval=0",
        )


def _not_trained(path: str, value: Any, *, fix: str) -> ConfigError:
    return ConfigError(
        f"{path} = {value!r} can be printed and counted, not trained: this version trains dense decoders with AdamW on "
        "batches of rows, without interleaving, context parallelism or tile indicators",
        fix=fix,
    )


def _no_interleaving(config: RunConfig, world_size: int) -> None:
    chunks = config.parallel.virtual_pipeline_model_parallel_size
    if chunks is not None:
        path = "parallel.virtual_pipeline_model_parallel_size"
        raise _not_trained(path, chunks, fix=f"set {path}=null")


def _no_context_parallel(config: RunConfig, world_size: int) -> None:
    size = config.parallel.context_parallel_size
    if size > 1:
        raise _not_trained("parallel.context_parallel_size", size, fix="set parallel.context_parallel_size=1")


def _no_experts(config: RunConfig, world_size: int) -> None:
    if config.moe.num_moe_experts:
        raise _not_trained("moe.num_moe_experts", config.moe.num_moe_experts, fix="choose a dense preset")


def _no_expert_parallel(config: RunConfig, world_size: int) -> None:
    size = config.parallel.expert_model_parallel_size
    if size > 1:
        raise _not_trained("parallel.expert_model_parallel_size", size, fix="set parallel.expert_model_parallel_size=1")


def _no_adafactor(config: RunConfig, world_size: int) -> None:
    if config.optimizer.name == "adafactor":
        raise _not_trained("optimizer.name", "adafactor", fix="set optimizer.name=adamw and its learning rate")


def _no_tile_indicator(config: RunConfig, world_size: int) -> None:
    if config.tiling.indicator != "none":
        raise _not_trained("tiling.indicator", config.tiling.indicator, fix="set tiling.indicator=none")


def _no_batch_of_samples(config: RunConfig, world_size: int) -> None:
    if config.data.batch_unit != "rows":
        raise _not_trained("data.batch_unit", config.data.batch_unit, fix="set data.batch_unit=rows")


def _training_sources(config: RunConfig, world_size: int) -> None:
    if not config.data.sources:
        raise ConfigError(
            "data.sources is empty: there is nothing to train on",
            fix="name the indexed datasets in a file for --config: `data: {sources: [{prefix: PATH, weight: 1}]}`",
        )


def _tokenizer(config: RunConfig, world_size: int) -> None:
    if not config.data.tokenizer:
        raise ConfigError(
            "data.tokenizer is empty",
            fix="give data.tokenizer=PATH, the tokenizer.json or .model that the datasets were built with",
        )


def _run_directory(config: RunConfig, world_size: int) -> None:
    if not config.train.run_dir.strip():
        raise ConfigError(f"train.run_dir = {config.train.run_dir!r} names no directory", fix="give train.run_dir=PATH")


Rule = Callable[[RunConfig, int], None]

NOT_TRAINED_YET: tuple[Rule, ...] = (
    _no_interleaving,
    _no_context_parallel,
    _no_experts,
    _no_expert_parallel,
    _no_adafactor,
    _no_tile_indicator,
    _no_batch_of_samples,
)
"""What presets may describe but this version does not train; a rule goes when its part of the trainer exists."""

LEFT_TO_THE_USER: tuple[Rule, ...] = (_training_sources, _tokenizer, _run_directory)
"""What no preset can know."""

RULES: tuple[Rule, ...] = (
    _types_and_choices,
    _ranges,
    _world_size,
    _decoder_heads,
    _tensor_split_of_decoder,
    _tensor_split_of_encoder,
    _encoder_shape,
    _feature_layer,
    _connector_grid,
    _image_fits_row,
    _tile_budget,
    _pipeline_split,
    _sequence_parallel,
    _batch,
    _schedule,
    _optimizer_overlap,
    _something_trains,
    _device_and_kernels,
    _sources,
    *NOT_TRAINED_YET,
    *LEFT_TO_THE_USER,
)
"""Every rule, cheapest and most general first."""
