"""The configuration as a flat list of options: every ``section.field`` with its type, documentation and flag."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from types import MappingProxyType
from typing import Any, get_type_hints

from mm15_megatron.config.fields import default_of
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.errors import ConfigError, did_you_mean

PREFIXED_SECTIONS = ("vision", "connector", "freeze", "tiling")
"""Sections whose flags carry the section's name; their field names repeat the decoder's."""


@dataclass(frozen=True)
class Option:
    """One leaf of :class:`RunConfig`.

    Attributes:
        path: ``section.field``, or the bare name of a field of RunConfig itself.
        annotation: the resolved type annotation.
        default: the schema's default.
        doc: one line of documentation.
        choices: the only values allowed; empty = any value of the type.
        flag: command-line flag without the dashes; empty = no flag.
    """

    path: str
    annotation: Any
    default: Any
    doc: str
    choices: tuple[Any, ...]
    flag: str


def _options_of(cls: type, section: str) -> dict[str, Option]:
    hints = get_type_hints(cls)
    found = {}
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
            continue
        path = f"{section}.{f.name}" if section else f.name
        prefix = f"{section}-" if section in PREFIXED_SECTIONS else ""
        derived = prefix + f.name.replace("_", "-")
        found[path] = Option(
            path=path,
            annotation=hints[f.name],
            default=default_of(cls, f.name),
            doc=f.metadata.get("doc", ""),
            choices=f.metadata.get("choices", ()),
            flag=derived if f.metadata.get("flag") is None else f.metadata["flag"],
        )
    return found


def _all_options() -> dict[str, Option]:
    options = _options_of(RunConfig, "")
    for name, cls in get_type_hints(RunConfig).items():
        if is_dataclass(cls):
            options |= _options_of(cls, name)  # type: ignore[arg-type]
    return options


OPTIONS: Mapping[str, Option] = MappingProxyType(_all_options())
"""Every option by path, in declaration order."""

SECTIONS: tuple[str, ...] = tuple(dict.fromkeys(path.split(".")[0] for path in OPTIONS if "." in path))
"""Names of the sections, in declaration order."""


def option_at(path: str) -> Option:
    """Return the option called ``path``.

    Raises:
        ConfigError: no such section or field; the message suggests near names.
    """
    if path in OPTIONS:
        return OPTIONS[path]
    section, _, name = path.partition(".")
    if not name:
        homes = [p for p in OPTIONS if p.endswith(f".{section}")]
        hint = "write it as " + " or ".join(repr(h) for h in homes) if homes else did_you_mean(path, OPTIONS)
        raise ConfigError(f"unknown option {path!r}", fix=hint)
    if section not in SECTIONS:
        raise ConfigError(f"unknown section {section!r} in {path!r}", fix=did_you_mean(section, SECTIONS))
    known = [p.partition(".")[2] for p in OPTIONS if p.startswith(f"{section}.")]
    raise ConfigError(f"section {section!r} has no field {name!r}", fix=did_you_mean(name, known))


def flatten(config: RunConfig) -> dict[str, Any]:
    """Return every value of ``config`` by path, in declaration order."""
    values = {}
    for path in OPTIONS:
        section, _, name = path.partition(".")
        owner = getattr(config, section) if name else config
        values[path] = getattr(owner, name or section)
    return values


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return ``config`` with already typed ``values`` (by path) put in place.

    Raises:
        ConfigError: a path does not exist.
    """
    sections: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for path, value in values.items():
        option_at(path)
        section, _, name = path.partition(".")
        if name:
            sections.setdefault(section, {})[name] = value
        else:
            top[path] = value
    for section, changed in sections.items():
        top[section] = replace(getattr(config, section), **changed)
    return replace(config, **top)
