"""Rules of the training: schedule, optimizer, freezing, sources and what only the user can name."""

from __future__ import annotations

from pathlib import Path

from mm15_megatron.config.rule import Rule
from mm15_megatron.config.schema import RunConfig, SourceConfig
from mm15_megatron.errors import ConfigError


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


def _something_trains(config: RunConfig, world_size: int) -> None:
    if config.freeze.vision and config.freeze.connector and config.freeze.language:
        raise ConfigError(
            "encoder, connector and decoder are all frozen: nothing to train", fix="unfreeze one of freeze.*"
        )


def _sources(config: RunConfig, world_size: int) -> None:
    for path, sources in (("sources", config.data.sources), ("validation_sources", config.data.validation_sources)):
        for i, source in enumerate(sources):
            _source(f"data.{path}[{i}]", source, held_out=path == "validation_sources")
    if config.train.validation_interval and not config.data.validation_sources:
        raise ConfigError(
            f"train.validation_interval = {config.train.validation_interval} but there is no data.validation_sources",
            fix="name a held-out source or set train.validation_interval=0",
        )


def _source(where: str, source: SourceConfig, *, held_out: bool) -> None:
    weights = [1.0 if source.weight is None else source.weight, *(change.weight for change in source.changes)]
    if not source.prefix or min(weights) < 0 or max(weights) <= 0:
        raise ConfigError(
            f"{where} has prefix {source.prefix!r} and weight {weights[0] if len(weights) == 1 else weights}",
            fix="give a path prefix and a weight above 0, or remove the source",
        )
    if source.epochs is not None and (source.weight is not None or source.changes or source.epochs <= 0):
        raise ConfigError(
            f"{where} has epochs {source.epochs} and weight {source.weight}, changes {len(source.changes)}",
            fix="give a weight, or epochs above 0: the one follows from the other",
        )
    firsts = [change.first for change in source.changes]
    if firsts and (firsts[0] < 1 or firsts != sorted(set(firsts))):
        raise ConfigError(
            f"{where} has changes from {firsts} on", fix="name each change once, ascending, after the start of the run"
        )
    if held_out and (source.changes or source.epochs is not None):
        raise ConfigError(
            f"{where} has changes or epochs: every validation reads the same first rows", fix="give a weight alone"
        )


def _data_units(config: RunConfig, world_size: int) -> None:
    data = config.data
    if data.batch_unit == "samples" and data.mixture_unit != "sample":
        raise ConfigError(
            f"data.batch_unit = samples packs the samples of a step, of all sources, and data.mixture_unit = "
            f"{data.mixture_unit} wants rows of one source",
            fix="set data.mixture_unit=sample, or data.batch_unit=rows",
        )
    if data.batch_unit == "samples" and config.kernels.cuda_graph_scope:
        raise ConfigError(
            "data.batch_unit = samples gives every step another number of micro-batches, and a captured graph replays "
            "one number of them",
            fix="set kernels.cuda_graph_scope=[], or data.batch_unit=rows",
        )
    if data.decoder == "dali_gpu" and (data.num_workers or config.parallel.device != "cuda"):
        raise ConfigError(
            f"data.decoder = dali_gpu decodes on the device of the training process, found data.num_workers = "
            f"{data.num_workers} and parallel.device = {config.parallel.device}",
            fix="set data.num_workers=0 and parallel.device=cuda, or data.decoder=dali",
        )
    together = data.shuffle_block * data.shuffle_window
    if data.shuffle == "blocks" and not (data.shuffle_block > 0 < data.shuffle_window and together <= 2**20):
        raise ConfigError(
            f"data.shuffle_block = {data.shuffle_block} x data.shuffle_window = {data.shuffle_window} is not between 1 "
            "and 2 ** 20 documents",
            fix="use fewer blocks, or smaller ones: a window is packed together, in memory",
        )


def _whole_parameters(config: RunConfig, world_size: int) -> None:
    if config.optimizer.name == "adafactor" and config.parallel.use_distributed_optimizer:
        raise ConfigError(
            "parallel.use_distributed_optimizer cuts parameters into flat shards, and optimizer.name = adafactor needs "
            "whole matrices (it spreads its state over data-parallel ranks by itself)",
            fix="set parallel.use_distributed_optimizer=false and parallel.overlap_param_gather=false",
        )


def _loss_spikes(config: RunConfig, world_size: int) -> None:
    faults = config.faults
    if faults.loss_spike != "off" and not 8 <= faults.loss_spike_window <= 10_000:
        raise ConfigError(
            f"faults.loss_spike_window = {faults.loss_spike_window} is not between 8 and 10000 steps",
            fix="say over how many steps a loss is normal, or set faults.loss_spike=off",
        )


def _hangs(config: RunConfig, world_size: int) -> None:
    limit, collectives = config.faults.hang_timeout_minutes, config.parallel.distributed_timeout_minutes
    if limit is not None and not 0 <= limit < collectives:
        raise ConfigError(
            f"faults.hang_timeout_minutes = {limit} is not between 0 and parallel.distributed_timeout_minutes = "
            f"{collectives}: collectives would give up before anybody has said which rank hangs",
            fix="lower it, or raise parallel.distributed_timeout_minutes",
        )


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


def _init_from(config: RunConfig, world_size: int) -> None:
    source, own = config.checkpoint.init_from, Path(config.train.run_dir).resolve()
    if not source:
        return
    if not source.strip():
        raise ConfigError(f"checkpoint.init_from = {source!r} names no checkpoint", fix="give a path, or remove it")
    place = Path(source).resolve()
    if place == own or own in place.parents:
        raise ConfigError(
            f"checkpoint.init_from = {source} is of train.run_dir = {config.train.run_dir}: a run takes its first "
            "weights from another one, and resumes from itself",
            fix="choose another train.run_dir, or remove checkpoint.init_from to go on where this run was",
        )


TRAINING_RULES: tuple[Rule, ...] = (
    _schedule,
    _something_trains,
    _whole_parameters,
    _loss_spikes,
    _hangs,
    _sources,
    _data_units,
)
LEFT_TO_THE_USER: tuple[Rule, ...] = (_training_sources, _tokenizer, _run_directory, _init_from)
"""What no preset can know."""
DATA_RULES: tuple[Rule, ...] = (_sources, _data_units, _training_sources, _tokenizer)
"""What decides which rows there are, whatever trains on them."""
