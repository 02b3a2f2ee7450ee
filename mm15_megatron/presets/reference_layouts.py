"""How the family is laid out on 64 and on 512 GPUs of 80 GB: data, checked against the memory estimate by a test.

The papers publish no layout: all of this is ours. Tensor parallelism stays inside a machine of eight; experts are not
split but spread, since a split expert sends every token to more ranks; later stages train on 256 rows a step, so that
no layout may have more than 256 data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from mm15_megatron.config.schema import RunConfig
from mm15_megatron.config.tree import with_values
from mm15_megatron.errors import ConfigError
from mm15_megatron.presets import resolve
from mm15_megatron.presets.preset import Setting, settings
from mm15_megatron.presets.recipe import FITS_80_GB


@dataclass(frozen=True)
class ModelClass:
    """Presets that share their layouts.

    Attributes:
        patterns: shell patterns of the presets' names.
        layouts: settings of ``parallel`` by number of GPUs, on top of the preset's own.
    """

    patterns: tuple[str, ...]
    layouts: Mapping[int, tuple[Setting, ...]]


def _layout(
    *,
    tensor: int = 1,
    pipeline: int = 1,
    chunks: int | None = None,
    experts: int = 1,
    source: str = FITS_80_GB,
) -> tuple[Setting, ...]:
    return settings(
        source,
        parallel={
            "tensor_model_parallel_size": tensor,
            "sequence_parallel": tensor > 1,
            "pipeline_model_parallel_size": pipeline,
            "virtual_pipeline_model_parallel_size": chunks,
            "expert_model_parallel_size": experts,
            "expert_tensor_parallel_size": 1 if experts > 1 else None,
        },
    )


_BATCH_OF_256 = f"{FITS_80_GB}; two ranks share a row, for batches of 256"

CLASSES: tuple[ModelClass, ...] = (
    # 3B decoder, seven encoders; plain data parallelism holds even the largest of them (AIM-3B)
    ModelClass(("mm1_encoder_*",), {64: _layout(), 512: _layout(tensor=2, source=_BATCH_OF_256)}),
    # 1B decoder x 64 experts, 28B: four experts of each sparse layer a GPU, then one
    ModelClass(("*_1b_moe*",), {64: _layout(experts=16), 512: _layout(tensor=2, experts=64, source=_BATCH_OF_256)}),
    # 3B decoder x 64 experts, 65B: two experts a GPU
    ModelClass(("*_3b_moe*",), {64: _layout(experts=32), 512: _layout(tensor=2, pipeline=2, experts=32)}),
    # 7B decoder x 32 experts, 46B: one expert a GPU
    ModelClass(("*_7b_moe*",), {64: _layout(tensor=2, experts=32), 512: _layout(tensor=2, pipeline=2, experts=32)}),
    ModelClass(("*_30b*",), {64: _layout(tensor=8, pipeline=2), 512: _layout(tensor=8, pipeline=4, chunks=2)}),
    ModelClass(("*_7b*",), {64: _layout(tensor=2), 512: _layout(tensor=2, pipeline=2)}),
    ModelClass(("*_3b*",), {64: _layout(), 512: _layout(tensor=2, source=_BATCH_OF_256)}),
    # at most 1.2B parameters in the decoder
    ModelClass(
        ("*_1b*", "mm1_ablation_base", "mm1_connector_*", "mm1_lr_*"),
        {64: _layout(), 512: _layout(tensor=2, source=_BATCH_OF_256)},
    ),
)
"""The first class with a pattern that matches is a preset's; the debugging presets have none."""


def layouts_of(name: str) -> Mapping[int, tuple[Setting, ...]]:
    """Return the reference layouts of the preset called ``name`` by number of GPUs; empty if it has none."""
    matching = (c.layouts for c in CLASSES if any(fnmatchcase(name, pattern) for pattern in c.patterns))
    return next(matching, {})


def at_reference_layout(name: str, *, gpus: int) -> RunConfig:
    """Return a preset's configuration in its reference layout.

    Args:
        name: a preset of the family.
        gpus: world size, 64 or 512.

    Raises:
        ConfigError: there is no such preset, or it has no layout for that many GPUs.
    """
    cfg, layouts = resolve(name), layouts_of(name)
    if gpus not in layouts:
        raise ConfigError(
            f"preset {name!r} has no reference layout for {gpus} GPUs",
            fix=f"ask for one of {sorted(layouts)} GPUs" if layouts else "choose a preset of the family",
        )
    return with_values(cfg, {setting.path: setting.value for setting in layouts[gpus]})
