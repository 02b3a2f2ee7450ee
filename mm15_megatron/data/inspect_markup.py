"""HTML that cannot be broken by what stands in it: text and attributes are escaped unless they are markup already."""

from __future__ import annotations

import html
from typing import Final

_VOID: Final = frozenset(("img", "input", "meta", "link", "br"))


class Markup(str):
    """Text that is HTML."""


def markup(*parts: str) -> Markup:
    """Put parts behind one another; those that are no markup are escaped."""
    return Markup("".join(part if isinstance(part, Markup) else html.escape(part) for part in parts))


def element(name: str, /, *content: str, **attributes: str | int | float | None) -> Markup:
    """Return one element.

    Args:
        name: of the element.
        content: text or markup.
        attributes: a closing underscore of their names is dropped (``class_``), others become hyphens; floats are
            written with two digits, attributes that are None are left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_value(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{markup(*content)}</{name}>")


def counted(number: int, noun: str) -> str:
    """Return such as ``1 image`` or ``1,024 images``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _value(value: str | int | float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
