"""The configuration as flat text, one ``section.field = value`` a line, in declaration order; values are JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, NamedTuple

from mm15_megatron.config.coerce import coerce
from mm15_megatron.config.schema import RunConfig
from mm15_megatron.config.tree import OPTIONS, flatten, option_at, with_values
from mm15_megatron.errors import ConfigError


class Difference(NamedTuple):
    """One option in which two configurations differ."""

    path: str
    left: Any
    right: Any


def value_text(value: Any) -> str:
    """Return ``value`` as JSON on one line (tuples as lists, nested dataclasses as objects)."""
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise ConfigError(
        f"{value!r} cannot be written as text", fix="use numbers, text, booleans, null, lists or config dataclasses"
    )


def dump_flat(config: RunConfig, *, notes: Mapping[str, str] | None = None) -> str:
    """Return every option of ``config`` as flat text, ending with a line break.

    Args:
        config: what to write.
        notes: comments by path, written behind the value as ``# note``.
    """
    lines = []
    for path, value in flatten(config).items():
        note = notes.get(path, "") if notes else ""
        lines.append(f"{path} = {value_text(value)}" + (f"  # {note}" if note else ""))
    return "\n".join(lines) + "\n"


def load_flat(text: str) -> RunConfig:
    """Return the configuration that :func:`dump_flat` wrote.

    Options the text does not name keep the schema's default, so text written before an option existed still loads.

    Raises:
        ConfigError: an unknown option, a malformed line or value, or an option given twice.
    """
    values: dict[str, Any] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        path, separator, written = (part.strip() for part in line.partition("="))
        if not separator:
            raise ConfigError(f"line {number} is not `section.field = value`: {line!r}", fix="restore the line")
        if path in values:
            raise ConfigError(f"{path} is given twice, again in line {number}", fix="keep one of the lines")
        values[path] = coerce(option_at(path), _read_json(written, number=number, path=path), origin=f"line {number}")
    return with_values(RunConfig(), values)


def _read_json(text: str, *, number: int, path: str) -> Any:
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"the value of {path} in line {number} is not JSON: {text!r}", fix="restore the line"
        ) from error
    rest = text[end:].strip()
    if rest and not rest.startswith("#"):
        raise ConfigError(f"{rest!r} follows the value of {path} in line {number}", fix="remove it or start it with #")
    return value


def diff(left: RunConfig, right: RunConfig) -> list[Difference]:
    """Return the options in which two configurations differ, in declaration order."""
    a, b = flatten(left), flatten(right)
    return [Difference(path, a[path], b[path]) for path in OPTIONS if a[path] != b[path]]
