"""Field metadata: one line of documentation, the unit, the allowed choices and the command-line flag of an option."""

from __future__ import annotations

from dataclasses import field
from dataclasses import fields as dataclass_fields
from typing import Any, TypeVar

T = TypeVar("T")


def option(default: T, doc: str, *, choices: tuple[Any, ...] = (), flag: str | None = None) -> T:
    """Declare one configuration option.

    Args:
        default: the value when nothing sets it; a tuple, a scalar, None or a frozen dataclass.
        doc: one line: meaning, unit, and where the value comes from when it is published.
        choices: the only values allowed; empty = any value of the annotated type.
        flag: Megatron-style flag without the dashes; None derives it from the section and the name; "" = no flag.

    Returns:
        A dataclass field (typed as ``T`` for the reader and the type checker).
    """
    return field(default=default, metadata={"doc": doc, "choices": choices, "flag": flag})


def doc_of(cls: type, name: str) -> str:
    """Return the one-line documentation of ``cls.name``."""
    return str({f.name: f.metadata.get("doc", "") for f in dataclass_fields(cls)}[name])


def default_of(cls: type, name: str) -> Any:
    """Return the default of ``cls.name``."""
    (found,) = (f for f in dataclass_fields(cls) if f.name == name)
    return found.default
