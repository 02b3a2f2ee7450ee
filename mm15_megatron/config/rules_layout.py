"""Rules of the layout: how the world, the tensors, the layers and the batch split."""

from __future__ import annotations

from mm15_megatron.config.rule import Rule, divides
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import ConfigError


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


def virtual_stages(config: RunConfig) -> int:
    """Return the pieces that the decoder is cut into: pipeline stages x model chunks a stage holds."""
    p = config.parallel
    return p.pipeline_model_parallel_size * (p.virtual_pipeline_model_parallel_size or 1)


def feasible_first_stages(config: RunConfig) -> tuple[int, ...]:
    """Return the layers the first (virtual) stage may have so that every other one has a layer too."""
    return tuple(range(1, config.language.num_layers - virtual_stages(config) + 2))


def _world_size(config: RunConfig, world_size: int) -> None:
    data_parallel_size(config, world_size=world_size)


def _tensor_split_of_decoder(config: RunConfig, world_size: int) -> None:
    tp, language = config.parallel.tensor_model_parallel_size, config.language
    split = {
        "language.num_attention_heads": language.num_attention_heads,
        "language.num_query_groups": language.num_query_groups,
        "language.ffn_hidden_size": language.ffn_hidden_size,
        "language.make_vocab_size_divisible_by": language.make_vocab_size_divisible_by,
    }
    for path, value in split.items():
        divides(path, value, by="parallel.tensor_model_parallel_size", divisor=tp)


def _tensor_split_of_encoder(config: RunConfig, world_size: int) -> None:
    if config.parallel.encoder_parallel != "tensor":
        return
    tp, vision = config.parallel.tensor_model_parallel_size, config.vision
    fix = "set parallel.encoder_parallel=data, or change the sizes"
    for name, value in (
        ("num_attention_heads", vision.num_attention_heads),
        ("ffn_hidden_size", vision.ffn_hidden_size),
    ):
        divides(f"vision.{name}", value, by="parallel.tensor_model_parallel_size", divisor=tp, fix=fix)


def _pipeline_split(config: RunConfig, world_size: int) -> None:
    p, layers, pieces = config.parallel, config.language.num_layers, virtual_stages(config)
    first, chunks = p.num_layers_in_first_pipeline_stage, p.virtual_pipeline_model_parallel_size
    if layers < pieces:
        what = f"{p.pipeline_model_parallel_size} pipeline stages" + (f" x {chunks} model chunks" if chunks else "")
        raise ConfigError(
            f"language.num_layers = {layers} cannot give each of {what} a layer",
            fix=f"use at most {layers} stages x chunks",
        )
    if p.pipeline_model_parallel_size == 1:
        for path, value in (
            ("num_layers_in_first_pipeline_stage", first),
            ("virtual_pipeline_model_parallel_size", chunks),
        ):
            if value is not None:
                raise ConfigError(
                    f"parallel.{path} = {value} has no effect without a pipeline",
                    fix="remove it or raise parallel.pipeline_model_parallel_size",
                )
    if first is not None and first not in feasible_first_stages(config):
        raise ConfigError(
            f"parallel.num_layers_in_first_pipeline_stage = {first} leaves {layers - first} of {layers} layers to "
            f"{pieces - 1} other (virtual) stages",
            fix=f"use at most {layers - pieces + 1}, or leave it to the cost model",
        )


def _interleaving(config: RunConfig, world_size: int) -> None:
    chunks, stages = config.parallel.virtual_pipeline_model_parallel_size, config.parallel.pipeline_model_parallel_size
    if chunks is None:
        return
    if chunks == 1:
        path = "parallel.virtual_pipeline_model_parallel_size"
        raise ConfigError(f"{path} = 1 is a plain pipeline", fix=f"set {path}=null, or 2 and more")
    if config.data.batch_unit == "samples":
        return  # rows without samples fill the step up
    train = config.train
    rank_rows = train.micro_batch_size * data_parallel_size(config, world_size=world_size)
    sizes = [train.global_batch_size]
    if train.rampup_batch_size is not None:
        start, increment, _ = train.rampup_batch_size
        sizes += [start, increment]
    for rows in sizes:
        divides(
            "the micro-batches of a step",
            rows // rank_rows,
            by="parallel.pipeline_model_parallel_size (interleaved schedule)",
            divisor=stages,
            fix=f"use a train.global_batch_size that is a multiple of {rank_rows * stages}",
        )


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
    divides("data.seq_length x train.micro_batch_size", tokens, by="parallel.tensor_model_parallel_size", divisor=tp)


def _context_parallel(config: RunConfig, world_size: int) -> None:
    """Tokens are exchanged for heads, so every rank of the group needs some of each."""
    p, language = config.parallel, config.language
    size, tp = p.context_parallel_size, p.tensor_model_parallel_size
    if size == 1:
        return
    by = f"parallel.tensor_model_parallel_size {tp} x parallel.context_parallel_size {size}"
    for name, heads in (
        ("num_attention_heads", language.num_attention_heads),
        ("num_query_groups", language.num_query_groups),
    ):
        divides(f"language.{name}", heads, by=by, divisor=tp * size, fix="use fewer context-parallel ranks")
    tokens = config.data.seq_length * config.train.micro_batch_size
    divides("data.seq_length x train.micro_batch_size", tokens, by=by, divisor=tp * size)


def _batch(config: RunConfig, world_size: int) -> None:
    train, data_parallel = config.train, data_parallel_size(config, world_size=world_size)
    rows = train.micro_batch_size * data_parallel if config.data.batch_unit == "rows" else 1
    by = f"train.micro_batch_size {train.micro_batch_size} x data-parallel size {data_parallel}"
    divides("train.global_batch_size", train.global_batch_size, by=by, divisor=rows, fix=f"use a multiple of {rows}")
    if train.rampup_batch_size is None:
        return
    start, increment, ramp = train.rampup_batch_size
    if start < 1 or increment < 1 or ramp < 1 or start > train.global_batch_size:
        raise ConfigError(
            f"train.rampup_batch_size = {train.rampup_batch_size} does not lead up to {train.global_batch_size}",
            fix="give (start, increment, rows), all positive, start at most train.global_batch_size",
        )
    divides("the start of train.rampup_batch_size", start, by=by, divisor=rows, fix=f"use a multiple of {rows}")
    divides("the increment of train.rampup_batch_size", increment, by=by, divisor=rows, fix=f"use a multiple of {rows}")
    divides(
        "train.global_batch_size - start of the ramp",
        train.global_batch_size - start,
        by="its increment",
        divisor=increment,
        fix="choose an increment that reaches the global batch size exactly",
    )


def _optimizer_overlap(config: RunConfig, world_size: int) -> None:
    p = config.parallel
    if p.overlap_param_gather and not (p.use_distributed_optimizer and p.overlap_grad_reduce):
        raise ConfigError(
            "parallel.overlap_param_gather needs the distributed optimizer and overlapped gradient reduction, found "
            f"use_distributed_optimizer={p.use_distributed_optimizer}, overlap_grad_reduce={p.overlap_grad_reduce}",
            fix="set both to true, or parallel.overlap_param_gather=false",
        )


SPLIT_RULES: tuple[Rule, ...] = (_world_size, _tensor_split_of_decoder, _tensor_split_of_encoder)
"""What splits a model that only answers."""

LAYOUT_RULES: tuple[Rule, ...] = (
    *SPLIT_RULES,
    _pipeline_split,
    _sequence_parallel,
    _context_parallel,
    _batch,
    _interleaving,
    _optimizer_overlap,
)
