"""YAML as this project reads it: YAML 1.2 scalars, no duplicate keys, errors with file and line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from mm15_megatron.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars: ``no`` is text, ``1e-4`` a number, ``010`` not octal."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    _characters = ["" if c == "\0" else c for c in _first]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _characters)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise ConfigError(
                f"key {key!r} at {_place(key_node.start_mark)} is not text", fix="use a section or field name"
            )
        if key in seen:
            raise ConfigError(
                f"key {key!r} is given twice, again at {_place(key_node.start_mark)}", fix="keep one of them"
            )
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _place(mark: Any) -> str:
    return f"{mark.name}, line {mark.line + 1}"


def parse_yaml(text: str, *, name: str) -> Any:
    """Return the plain value that ``text`` describes.

    Args:
        text: one YAML document.
        name: file name or option, for messages.

    Raises:
        ConfigError: not well-formed, or a key is given twice.
    """
    loader = _Loader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{name} is not well-formed YAML: {error}", fix="correct the syntax at the place named"
        ) from error
    finally:
        loader.dispose()


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in the YAML file at ``path``; an empty file is an empty mapping.

    Raises:
        ConfigError: missing, unreadable, malformed, or not a mapping of sections.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration file {str(path)!r}: {error}", fix="check the path") from error
    data = parse_yaml(text, name=str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path} holds a {type(data).__name__}, not sections",
            fix="write it as `section:` with indented `field: value` lines",
        )
    return data
