"""Strict conversion of plain values (from YAML, the command line or Python) to the annotated type of an option."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from mm15_megatron.config.tree import Option
from mm15_megatron.errors import ConfigError, did_you_mean

_NAMES = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text (put it in quotes if it looks like a number)",
}


def describe(annotation: Any) -> str:
    """Say in words what values ``annotation`` allows."""
    if get_origin(annotation) is tuple:
        items = get_args(annotation)
        if items[-1] is Ellipsis:
            return f"a list of {describe(items[0])}"
        return f"a list of {len(items)} values, each {describe(items[0])}"
    if is_dataclass(annotation):
        return "a mapping with the keys " + ", ".join(f.name for f in fields(annotation))
    return _NAMES[annotation]


def is_union(annotation: Any) -> bool:
    """Return True for ``A | B`` and ``Optional[A]``."""
    return get_origin(annotation) in (Union, UnionType)


def scalar_type(annotation: Any) -> Any:
    """Return ``A`` for ``A`` and for ``A | None``."""
    return next(part for part in get_args(annotation) if part is not NoneType) if is_union(annotation) else annotation


def coerce(option: Option, value: Any, *, origin: str = "") -> Any:
    """Return ``value`` as the type of ``option``.

    Whole numbers become floats where a float is wanted, and so does text such as ``"1e-4"``; lists become tuples and
    mappings nested dataclasses. Nothing else is converted: ``true`` is not 1 and ``8.0`` is not 8.

    Args:
        option: the option that is set.
        value: what was found.
        origin: where it was found, for the message.

    Raises:
        ConfigError: the value has another type, or is not one of the choices.
    """
    typed = _convert(value, option.annotation, where=option.path, origin=origin)
    if option.choices and typed not in option.choices:
        shown = ", ".join("null" if c is None else str(c) for c in option.choices)
        raise ConfigError(
            f"{option.path} = {value!r}{_from(origin)} is not one of its choices", fix=f"choose from: {shown}"
        )
    return typed


def _from(origin: str) -> str:
    return f" ({origin})" if origin else ""


def _convert(value: Any, annotation: Any, *, where: str, origin: str, or_null: str = "") -> Any:
    if is_union(annotation):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        return _convert(value, scalar_type(annotation), where=where, origin=origin, or_null=" or null")
    if get_origin(annotation) is tuple:
        return _convert_tuple(value, annotation, where=where, origin=origin, or_null=or_null)
    if is_dataclass(annotation):
        return _convert_mapping(value, annotation, where=where, origin=origin)
    found = _convert_scalar(value, annotation)
    if found is None:
        raise _wrong_type(value, annotation, where=where, origin=origin, or_null=or_null)
    return found


def _wrong_type(value: Any, annotation: Any, *, where: str, origin: str, or_null: str = "") -> ConfigError:
    return ConfigError(
        f"{where} = {value!r}{_from(origin)} has the wrong type ({type(value).__name__})",
        fix=f"give {describe(annotation)}{or_null}",
    )


def _convert_scalar(value: Any, annotation: Any) -> Any:
    """Return the converted scalar, or None when the types do not fit."""
    if annotation is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            return None
        return number if math.isfinite(number) else None
    # type() rather than isinstance: bool is a subclass of int
    return value if type(value) is annotation else None


def _convert_tuple(value: Any, annotation: Any, *, where: str, origin: str, or_null: str) -> tuple[Any, ...]:
    items = get_args(annotation)
    if not isinstance(value, list | tuple) or (items[-1] is not Ellipsis and len(value) != len(items)):
        raise _wrong_type(value, annotation, where=where, origin=origin, or_null=or_null)
    kinds = [items[0]] * len(value) if items[-1] is Ellipsis else items
    return tuple(
        _convert(item, kind, where=f"{where}[{i}]", origin=origin)
        for i, (item, kind) in enumerate(zip(value, kinds, strict=True))
    )


def _convert_mapping(value: Any, cls: Any, *, where: str, origin: str) -> Any:
    if isinstance(value, cls):
        value = {f.name: getattr(value, f.name) for f in fields(cls)}
    if not isinstance(value, dict):
        raise _wrong_type(value, cls, where=where, origin=origin)
    hints = get_type_hints(cls)
    for key in value:
        if key not in hints:
            raise ConfigError(f"{where}{_from(origin)} has no key {key!r}", fix=did_you_mean(str(key), hints))
    given = {key: _convert(item, hints[key], where=f"{where}.{key}", origin=origin) for key, item in value.items()}
    absent = [f.name for f in fields(cls) if f.default is MISSING and f.name not in given]
    if absent:
        raise ConfigError(f"{where}{_from(origin)} lacks {', '.join(absent)}", fix=f"give {describe(cls)}")
    return cls(**given)
