"""The family as data: every published model, its stages, and small ones for a laptop."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import ConfigError, did_you_mean
from mm15_megatron.presets import debug, mm1, mm1_ablations, mm15, mm15_moe
from mm15_megatron.presets.preset import Preset, Setting

__all__ = ["REGISTRY", "Preset", "Setting", "resolve"]

REGISTRY: Mapping[str, Preset] = MappingProxyType(
    {preset.name: preset for module in (mm1, mm1_ablations, mm15, mm15_moe, debug) for preset in module.PRESETS}
)
"""Every preset by name."""


def resolve(name: str) -> RunConfig:
    """Return the configuration of the preset called ``name``.

    Raises:
        ConfigError: there is no such preset.
    """
    if name not in REGISTRY:
        raise ConfigError(f"unknown preset {name!r}", fix=did_you_mean(name, REGISTRY))
    return REGISTRY[name].build()
