"""Rules of the training: schedule, optimizer, freezing, sources and what only the user can name."""

from __future__ import annotations

from mm15_megatron.config.rule import Rule, not_trained
from mm15_megatron.config.schema import RunConfig
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


def _no_adafactor(config: RunConfig, world_size: int) -> None:
    if config.optimizer.name == "adafactor":
        raise not_trained("optimizer.name", "adafactor", fix="set optimizer.name=adamw and its learning rate")


def _no_batch_of_samples(config: RunConfig, world_size: int) -> None:
    if config.data.batch_unit != "rows":
        raise not_trained("data.batch_unit", config.data.batch_unit, fix="set data.batch_unit=rows")


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


TRAINING_RULES: tuple[Rule, ...] = (_schedule, _something_trains, _sources)
NOT_TRAINED_RECIPES: tuple[Rule, ...] = (_no_adafactor, _no_batch_of_samples)
LEFT_TO_THE_USER: tuple[Rule, ...] = (_training_sources, _tokenizer, _run_directory)
"""What no preset can know."""
