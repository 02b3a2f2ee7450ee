"""A preset is data: a list of settings, each with the place its value comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mm15_megatron.config.coerce import coerce
from mm15_megatron.config.dump import dump_flat
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.config.tree import OPTIONS, option_at, with_values


@dataclass(frozen=True)
class Setting:
    """One value of a preset.

    Attributes:
        path: ``section.field``.
        value: the value, of the option's type.
        source: ``published: ...`` (in the paper), ``derived: ...`` (computed from that) or ``ours: ...`` (unpublished).
    """

    path: str
    value: Any
    source: str


@dataclass(frozen=True)
class Preset:
    """A named configuration; a later setting of the same path replaces an earlier one.

    Attributes:
        name: what ``--preset`` takes.
        description: one line for ``--list-presets``.
        settings: what differs from the schema's defaults, or is worth a source.
    """

    name: str
    description: str
    settings: tuple[Setting, ...]

    def build(self) -> RunConfig:
        """Return the resolved configuration.

        Raises:
            ConfigError: a setting names no option or has the wrong type.
        """
        origin = f"preset {self.name}"
        values = {s.path: coerce(option_at(s.path), s.value, origin=origin) for s in self._all_settings()}
        return replace(with_values(RunConfig(), values), preset=self.name)

    def sources(self) -> Mapping[str, str]:
        """Return the source of every value this preset sets, by path."""
        return {s.path: s.source for s in self._all_settings()}

    def _all_settings(self) -> tuple[Setting, ...]:
        # a folder of its own, so that two presets never write into one another's runs
        return (Setting("train.run_dir", f"runs/{self.name}", "ours"), *self.settings)

    def text(self) -> str:
        """Return the golden text: every option with its value and source, ``default`` where nothing is set."""
        return dump_flat(self.build(), notes=dict.fromkeys(OPTIONS, "default") | dict(self.sources()))

    def derive(self, suffix: str, description: str, settings: tuple[Setting, ...]) -> Preset:
        """Return a follow-on stage: this preset with more settings on top."""
        return replace(self, name=f"{self.name}_{suffix}", description=description, settings=self.settings + settings)


def settings(source: str, **sections: Mapping[str, Any]) -> tuple[Setting, ...]:
    """Return the settings of several sections that share one source: ``settings("ours", train={"steps": 5})``."""
    return tuple(
        Setting(f"{section}.{name}", value, source)
        for section, values in sections.items()
        for name, value in values.items()
    )
